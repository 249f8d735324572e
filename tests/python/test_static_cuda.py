"""Int4StaticCache on CUDA: steps with the length on the device, against the eager layer; emulated and on a GPU."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from conftest import load  # noqa: E402
from gpu_walk import pretend_gpu  # noqa: E402
from halfbyte import Int4Cache, Int4StaticCache, _cuda, cuda_step, get_recipe  # noqa: E402
from halfbyte.cuda_kernels import CudaKernels  # noqa: E402
from halfbyte.gpu_layer import GpuLayer  # noqa: E402
from halfbyte.static_cuda import StaticRoom  # noqa: E402

NO_GPU = not torch.cuda.is_available() or _cuda.why_not(0) is not None
needs_gpu = pytest.mark.skipif(NO_GPU, reason="no CUDA device with libhalfbyte_cuda")
KV_HEADS, HEADS, CAPACITY = 2, 4, 320


@pytest.fixture
def device(cuda):
    """Where layers live: a GPU, or a small emulated one, whose thread blocks are few and narrow."""
    if cuda.type == "cuda":
        yield cuda
        return
    library = _cuda.load()
    library.halfbyte_emulator_device(2, 100 << 10)
    yield cuda
    library.halfbyte_emulator_device(132, 227 << 10)


class Pair:
    """A GpuLayer that counts on the host, and one that goes by its StaticRoom, told the same."""

    def __init__(self, device, recipe, dim=64, window=0, dtype="float16", batch=2, pairs=0, capacity=CAPACITY):
        self.device, self.dim, self.batch, self.dtype = device, dim, batch, getattr(torch, dtype)
        self.random = torch.Generator().manual_seed(dim + window + pairs)
        sizes = {"kv_heads": KV_HEADS, "head_dim_k": dim, "head_dim_v": dim, "dtype": dtype, "sliding_window": window}
        self.eager, self.static = (GpuLayer(CudaKernels, device, recipe=recipe, **sizes) for _ in range(2))
        if pairs:
            frequencies = torch.logspace(0, -4, pairs)
            for layer in (self.eager, self.static):
                layer.set_frequencies(frequencies.data_ptr(), pairs, bool(pairs % 3))
        self.room = StaticRoom(self.static, capacity, batch)

    def tensor(self, heads, tokens, bias=0.0):
        x = torch.randn(self.batch, heads, tokens, self.dim, generator=self.random)
        return (x + bias * (torch.arange(self.dim) % 7 == 3)).to(self.dtype).to(self.device)

    def states(self, tokens):
        return self.tensor(KV_HEADS, tokens, 8.0), self.tensor(KV_HEADS, tokens)

    def append(self, tokens, counted=None):
        """A prefill, or a step of several tokens, by the host on both sides."""
        pair = self.states(tokens)
        first = self.eager.length == 0
        self.eager.append(*pair, counted, answered=first)
        with self.room.editing():
            self.static.append(*pair, counted, answered=first)

    def step(self, masked=False, softcap=0.0, sinks=None):
        """The largest difference between both outputs after a token more, over the largest output."""
        (k, v), query = self.states(1), self.tensor(HEADS, 1)
        self.eager.append(k, v)
        want = torch.full((self.batch, 1, HEADS, self.dim), torch.nan, dtype=self.dtype, device=self.device)
        mask = whole = None
        if masked:
            whole = torch.rand(self.batch, 1, 1, self.room.capacity, generator=self.random).to(self.device) < 0.8
            mask = whole[..., self.eager.first : self.eager.length].contiguous()
        scale = self.dim**-0.5
        self.eager.attend(query, want, scale, None, mask, softcap, sinks)
        plan = self.room.plan.key
        got = cuda_step.step(query, k, v, whole, sinks, *self.room.storage, plan, scale, softcap, True)
        return ((got - want).abs().max() / want.abs().max()).item()

    def differing(self):
        """What of the content is not the same to the byte."""
        assert self.room.look() == self.eager.length
        want, got = self.eager.save(), self.static.save()
        return {name for name in want if not np.array_equal(want[name], got[name])}


# (recipe, its fields, the layer, tokens of the prefill, steps)
KNOWN_OFFSET = [
    ("default", {}, {"batch": 1}, 40, 210),  # 13 blocks and four pages more
    ("default", {}, {"window": 70}, 100, 60),
    ("no-sinks", {}, {"window": 20, "dtype": "bfloat16", "pairs": 32}, 30, 30),
    ("default", {"offset_span": 16}, {"dim": 128, "pairs": 64, "batch": 1}, 60, 20),
    ("default", {}, {"dim": 80, "dtype": "float32", "pairs": 30}, 40, 20),  # no tensor cores
    ("default", {}, {"dim": 256, "dtype": "bfloat16", "pairs": 128, "batch": 1}, 50, 20),
    ("k8v4", {"sink_tokens": 32}, {"dim": 128}, 70, 20),
    ("default", {"offset": False}, {}, 0, 40),
    ("g16", {}, {}, 40, 20),
]


@pytest.mark.parametrize(("recipe", "fields", "options", "prefill", "steps"), KNOWN_OFFSET)
def test_steps_give_the_bits_of_the_eager_layer(device, recipe, fields, options, prefill, steps):
    pair = Pair(device, get_recipe(recipe, **fields), **options)
    if prefill:
        pair.append(prefill)
    assert max(pair.step() for _ in range(steps)) == 0.0
    assert not pair.differing()


# The mean is summed in another order than PyTorch's, of up to 80 tokens: a millionth of an offset, and what that does
# to outputs' rounding to fp16 and bf16.
@pytest.mark.parametrize(("recipe", "fields", "options", "prefill", "steps"), [
    ("default", {}, {"dim": 128, "pairs": 64, "batch": 1}, 5, 40),
    ("default", {"offset_tokens": 64}, {"pairs": 20}, 7, 90),
    ("default", {"offset_span": 16, "offset_tokens": 48}, {"dtype": "bfloat16", "pairs": 32, "batch": 1}, 3, 60),
    ("no-sinks", {"raw_window": 32}, {"dtype": "float32", "dim": 48}, 1, 70),
])  # fmt: skip
def test_an_offset_that_a_step_has_to_find(device, recipe, fields, options, prefill, steps):
    pair = Pair(device, get_recipe(recipe, **fields), **options)
    pair.append(prefill)
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}[pair.dtype]
    assert max(pair.step() for _ in range(steps)) < bound
    assert pair.differing() <= {"offset_k", "offset_v"}
    for side in ("k", "v"):
        want, got = (layer.save()[f"offset_{side}"] for layer in (pair.eager, pair.static))
        assert np.abs(want - got).max() <= 1e-6 * np.abs(want).max()


def test_padding_is_left_out_of_an_offset_that_a_step_finds(device):
    counted = torch.ones(2, 9, dtype=torch.uint8)
    counted[1, :6] = 0
    pair = Pair(device, get_recipe("no-sinks"), pairs=32)
    pair.append(9, counted.to(device))
    assert max(pair.step() for _ in range(20)) < 2e-3
    assert pair.differing() <= {"offset_k", "offset_v"}
    want, got = (layer.save()["offset_k"] for layer in (pair.eager, pair.static))
    assert np.abs(want - got).max() <= 1e-6 * np.abs(want).max()


def test_raw_tokens_that_go_round_the_tail(device):
    """In two pieces, so that sums run in another order."""
    pair = Pair(device, get_recipe("default", raw_window=48))
    pair.append(100)
    assert max(pair.step() for _ in range(60)) < 2e-3
    assert not pair.differing()


def test_what_narrows_attention(device):
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(2)).to(device)
    for window in (0, 70):
        pair = Pair(device, get_recipe("default"), window=window)
        pair.append(90)
        for options in ({"masked": True}, {"softcap": 5.0}, {"sinks": sinks}):
            assert max(pair.step(**options) for _ in range(3)) == 0.0


def test_steps_of_several_tokens_crops_and_selections_in_between(device):
    pair = Pair(device, get_recipe("default"))
    pair.append(50)
    where = [tensor.data_ptr() for tensor in pair.room.storage]
    for change in (
        lambda layer: layer.crop(57),  # into a packed block, which fills up token by token
        lambda layer: layer.select([1, 0]),
        lambda layer: layer.crop(18),  # nothing is left packed: the offset is found anew
    ):
        assert max(pair.step() for _ in range(20)) < 2e-3
        pair.append(7)
        change(pair.eager)
        with pair.room.editing():
            change(pair.static)
    assert max(pair.step() for _ in range(30)) < 2e-3
    assert pair.differing() <= {"offset_k", "offset_v"}
    assert [tensor.data_ptr() for tensor in pair.room.storage] == where


def test_a_second_sequence_in_the_same_memory(device):
    recipe, pair = get_recipe("default"), Pair(device, get_recipe("default"), window=40)
    pair.append(100)
    for _ in range(20):
        pair.step()
    where = [tensor.data_ptr() for tensor in pair.room.storage]
    pair.room.reset()
    pair.eager.reset()
    pair.append(60)
    assert max(pair.step() for _ in range(40)) == 0.0
    assert not pair.differing(), recipe
    assert [tensor.data_ptr() for tensor in pair.room.storage] == where


def test_a_step_without_room_writes_nothing_and_is_noticed(device):
    pair = Pair(device, get_recipe("default"), capacity=70)
    pair.append(60)
    for _ in range(10):
        pair.step()
    before = [tensor.clone() for tensor in pair.room.storage]
    (k, v), query = pair.states(1), pair.tensor(HEADS, 1)
    for _ in range(3):
        out = cuda_step.step(query, k, v, None, None, *pair.room.storage, pair.room.plan.key, 0.1, 0.0, True)
        assert out.isfinite().all()
    changed = [int((now != was).sum()) for now, was in zip(pair.room.storage, before, strict=True)]
    assert changed[1:] == [0, 0, 0]
    assert int(cuda_step.tokens_seen(pair.room.state)) == 70
    with pytest.raises(ValueError, match="max_cache_len=70"):
        pair.room.look()
    pair.room.reset()
    assert pair.room.look() == 0


def test_a_value_that_can_not_be_coded_is_noticed(device):
    pair = Pair(device, get_recipe("default"))
    pair.append(60)
    (k, v), query = pair.states(1), pair.tensor(HEADS, 1)
    k[1, 0, 0, 5] = torch.nan
    for _ in range(20):
        cuda_step.step(query, k, v, None, None, *pair.room.storage, pair.room.plan.key, 0.1, 0.0, True)
    with pytest.raises(ValueError, match="not finite"):
        pair.room.look()
    pair.room.reset()
    assert pair.room.look() == 0


class NoReads(TorchDispatchMode):
    """Raises where a value of a tensor is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{func} reads a tensor")
        return func(*args, **(kwargs or {}))


def test_every_step_launches_the_same(device, monkeypatch):
    """What a CUDA graph repeats: kernels and arguments, addresses of the step's own tensors apart."""
    pair, calls = Pair(device, get_recipe("default"), pairs=32, window=100), []
    pair.append(50)

    def record(plan, name, call, launch=cuda_step.StepPlan.launch):
        launch(plan, name, call)
        same = type(call).from_buffer_copy(call)
        same.stream = None
        for view in {"append": ("k", "v"), "encode": (), "attend": ("q", "out")}[name]:
            getattr(same, view).data = None
        if name == "attend":
            same.space = None
        calls.append((name, bytes(same)))

    monkeypatch.setattr(cuda_step.StepPlan, "launch", record)
    (k, v), query = pair.states(1), pair.tensor(HEADS, 1)
    with NoReads():
        for _ in range(40):
            cuda_step.step(query, k, v, None, None, *pair.room.storage, pair.room.plan.key, 0.1, 0.0, True)
    assert [name for name, _ in calls] == ["append", "encode", "attend"] * 40
    assert len(set(calls)) == 3


def test_opcheck(device):
    pair = Pair(device, get_recipe("default"))
    pair.append(45)
    (k, v), query = pair.states(1), pair.tensor(HEADS, 1)
    mask = torch.ones(1, 1, 1, CAPACITY, dtype=torch.bool, device=device)
    for append in (True, False):
        arguments = query, k, v, mask, None, *pair.room.storage, pair.room.plan.key, 0.1, 0.0, append
        torch.library.opcheck(cuda_step.step, arguments)
    torch.library.opcheck(cuda_step.tokens_seen, (pair.room.state,))


def test_what_a_step_does_not_take_is_refused(device):
    pair = Pair(device, get_recipe("default"))
    pair.append(45)
    (k, v), query = pair.states(1), pair.tensor(HEADS, 1)
    whole = torch.ones(1, 1, 1, CAPACITY, dtype=torch.bool, device=device)
    plan = pair.room.plan.key
    for changed, match in (
        ({"key": k[:1]}, "key: got"),
        ({"query": query.float()}, "query: got .*float32"),
        ({"mask": whole[..., :100]}, "attention_mask: got"),
        ({"mask": whole.float()}, "attention_mask: got"),
    ):
        arguments = {"query": query, "key": k, "value": v, "mask": None} | changed
        with pytest.raises(ValueError, match=match):
            cuda_step.step(*arguments.values(), None, *pair.room.storage, plan, 0.1, 0.0, True)
    with pytest.raises(RuntimeError, match="gone"):
        cuda_step.step(query, k, v, None, None, *pair.room.storage, "no plan", 0.1, 0.0, True)


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module", params=["tiny-qwen", "tiny-gemma"])
def loaded(request):
    return load(request.param)


@pytest.fixture
def model(loaded, device, monkeypatch):
    if device.type == "cpu":
        pretend_gpu(monkeypatch, CudaKernels, device)
    loaded.set_attn_implementation("halfbyte")
    return loaded.to(device)


@torch.no_grad()
def forward(model, ids, cache, **options):
    return (options.pop("step", model))(ids.to(model.device), past_key_values=cache, **options).logits


def generate(model, ids, cache, **options):
    settings = {"max_new_tokens": 10, "do_sample": False, "disable_compile": True} | options
    return model.generate(ids.to(model.device), past_key_values=cache, **settings)


def static(model):
    return Int4StaticCache(model.config, CAPACITY)


def test_it_gives_the_tokens_of_int4_cache(model, text):
    ids, mask = torch.cat([text[:, :70], text[:, 200:270]]), torch.ones(2, 70, dtype=torch.long)
    mask[1, :20] = 0
    for options in ({}, {"attention_mask": mask.to(model.device)}, {"num_beams": 2, "max_new_tokens": 4}):
        results = [generate(model, ids, cache, **options) for cache in (Int4Cache(model.config), static(model))]
        assert torch.equal(*results)


def test_crop_copy_save_and_a_second_text(model, text, tmp_path):
    cache, other = static(model), Int4Cache(model.config)
    with torch.no_grad():
        for prompt in (60, 45):
            for each in (cache, other):
                each.activate_past_recording()
                forward(model, text[:, :prompt], each)
                for at in range(prompt, prompt + 5):
                    forward(model, text[:, at : at + 1], each)
                forward(model, text[:, prompt + 5 : prompt + 25], each)
                each.crop(-12)
            twin = copy.deepcopy(cache)
            ids = text[:, prompt + 13 : prompt + 14]
            logits = [forward(model, ids, each) for each in (cache, twin, other)]
            assert torch.equal(logits[0], logits[1])
            assert torch.equal(logits[0], logits[2])
            cache.save(tmp_path / "static")
            back = Int4Cache.load(tmp_path / "static", model.config)
            assert back.get_seq_length() == int(cache.get_seq_length()) == prompt + 14
            logits = [forward(model, text[:, prompt + 14 : prompt + 15], each) for each in (cache, back)]
            assert torch.equal(*logits)
            cache.reset()
            assert int(cache.get_seq_length()) == 0
            other = Int4Cache(model.config)


def test_a_prompt_without_room_is_refused(model, text):
    cache = Int4StaticCache(model.config, 64)
    forward(model, text[:, :60], cache)
    with pytest.raises(ValueError, match=r"60 tokens and 5 more exceed max_cache_len=64"):
        forward(model, text[:, 60:65], cache)
    assert int(cache.get_seq_length()) == 60
    logits = [forward(model, text[:, 60:61], cache)]
    other = Int4Cache(model.config)
    forward(model, text[:, :60], other)
    logits.append(forward(model, text[:, 60:61], other))
    assert torch.equal(*logits)


def test_compiled_steps_are_eager_ones(model, text):
    """Without a graph break, compiled once for all lengths and caches; what the operator changes is cloned there."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    for prompt in (90, 60):
        compiled, eager = static(model), static(model)
        for cache in (compiled, eager):
            forward(model, text[:, :prompt], cache)
        for at in range(prompt, prompt + 8):
            ids = text[:, at : at + 1]
            assert torch.equal(forward(model, ids, compiled, step=step), forward(model, ids, eager))
        assert int(compiled.get_seq_length()) == prompt + 8
    assert counter.frame_count == 1
    with pytest.raises(Exception, match="takes one; run prefills eagerly"):
        forward(model, text[:, 200:203], compiled, step=step)
    torch.compiler.reset()


@pytest.mark.slow
def test_inductor_computes_positions_from_before_the_step(model, text):
    """Steps change what positions are read from, in place: read late, they would be off by one from layer 2 on.

    Sums of inductor's run in another order, which may move a code: the bound is that of a few.
    """
    torch.compiler.reset()
    step = torch.compile(model.forward, fullgraph=True)
    compiled, eager = static(model), static(model)
    for cache in (compiled, eager):
        forward(model, text[:, :90], cache)
    for at in range(90, 98):
        ids = text[:, at : at + 1]
        torch.testing.assert_close(
            forward(model, ids, compiled, step=step), forward(model, ids, eager), rtol=0, atol=2e-2
        )
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------ CUDA graphs


@needs_gpu
@pytest.mark.parametrize("window", [0, 70])
def test_a_captured_step_is_replayed(window):
    """One graph, captured once, across blocks and pages: the bits of the eager layer."""
    pair = Pair(torch.device("cuda", 0), get_recipe("default"), dim=128, pairs=64, window=window)
    pair.append(50)
    (k, v), query, scale = pair.states(1), pair.tensor(HEADS, 1), pair.dim**-0.5
    where = *pair.room.storage, pair.room.plan.key

    def step():
        return cuda_step.step(query, k, v, None, None, *where, scale, 0.0, True)

    before = [tensor.clone() for tensor in pair.room.storage]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what is captured must have run before: on storage that is put back after it
    torch.cuda.synchronize()
    for tensor, was in zip(pair.room.storage, before, strict=True):
        tensor.copy_(was)
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    for _ in range(150):
        (new_k, new_v), new_query = pair.states(1), pair.tensor(HEADS, 1)
        for to, x in ((k, new_k), (v, new_v), (query, new_query)):
            to.copy_(x)
        graph.replay()
        want = torch.full_like(out, torch.nan)
        pair.eager.append(new_k, new_v)
        pair.eager.attend(new_query, want, scale, None, None, 0.0, None)
        assert torch.equal(out, want)
    assert not pair.differing()


@needs_gpu
@pytest.mark.parametrize("name", ["tiny-qwen", "tiny-gemma"])
def test_reduce_overhead_gives_the_logits_of_eager_steps(name, text):
    """With CUDA graphs of PyTorch's own, on two caches one after the other; no step waits for the device."""
    torch.compiler.reset()
    model = load(name, "bfloat16").cuda()
    model.set_attn_implementation("halfbyte")
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for prompt in (90, 60):
        compiled, eager = static(model), static(model)
        for cache in (compiled, eager):
            forward(model, text[:, :prompt], cache)
        ids = text.cuda()
        for at in range(prompt, prompt + 40):
            one = ids[:, at : at + 1]
            if at == prompt + 4:  # compiled, warmed up and recorded by now
                torch.cuda.set_sync_debug_mode("error")
            try:
                got = forward(model, one, compiled, step=step).clone()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            want = forward(model, one, eager)
            # bf16 logits of sums in another order, and codes that this moves
            assert ((got - want).float().norm() / want.float().norm()).item() < 0.03
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped
    torch.compiler.reset()
