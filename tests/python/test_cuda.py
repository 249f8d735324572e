"""Int4Cache with models on a CUDA device: against the same cache on the CPU, and through everything generate() does.

Without a GPU the kernels run in an emulator, on tensors in CPU memory.
"""

import contextlib
import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from conftest import load  # noqa: E402
from gpu_walk import pretend_gpu  # noqa: E402
from halfbyte import Int4Cache, _cuda, rooms  # noqa: E402
from halfbyte.cuda_kernels import CudaKernels  # noqa: E402

NO_GPU = not torch.cuda.is_available() or _cuda.why_not(0) is not None
needs_gpu = pytest.mark.skipif(NO_GPU, reason="no CUDA device with libhalfbyte_cuda")


def test_without_a_library_the_cpu_serves_another_device(monkeypatch, qwen, text):
    """A layer for a device without kernels gives what the CPU layer gives, and says once where it works."""
    monkeypatch.setattr(_cuda, "why_not", lambda index: "no library in this test")
    rooms._warn_once.cache_clear()
    config = {
        "kv_heads": 2,
        "head_dim_k": 32,
        "head_dim_v": 32,
        "dtype": "float32",
        "recipe": Int4Cache(qwen.config).recipe,
    }
    with pytest.warns(UserWarning, match="no library in this test.*doctor.*CPU memory"):
        room = rooms.make_room(torch.device("cuda", 0), False, **config, layer_index=0, sliding_window=0)
    assert isinstance(room, rooms.HostLayer)
    room.device = torch.device("cpu")  # no tensor can be on a device that is not there
    native = rooms.make_room(torch.device("cpu"), False, **config, layer_index=0, sliding_window=0)
    k, v = torch.randn(2, 1, 2, 100, 32)
    room.append(k, v)
    rooms.append_native(native, k, v, None, False)
    query = torch.randn(1, 4, 1, 32)
    outs = [torch.full((1, 1, 4, 32), float("nan")) for _ in range(2)]
    room.attend(query, outs[0], 0.2, None, None, 0.0, None)
    rooms.attend_native(native, query, outs[1], 0.2, None, None, 0.0, None)
    assert torch.equal(*outs)
    unpacked = rooms.unpack_native(native, (32, 32), 2, 50, torch.float32)
    assert all(map(torch.equal, room.copy().unpack(50, torch.float32), unpacked))


def test_the_reason_is_said_when_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("HALFBYTE_CUDA_LIBRARY", str(tmp_path / "none.so"))
    _cuda.load.cache_clear()
    with pytest.raises(OSError, match=r"none\.so.*HALFBYTE_CUDA=ON"):
        _cuda.load()
    (tmp_path / "none.so").write_bytes(b"no library")
    _cuda.why_not.cache_clear()
    assert "none.so" in _cuda.why_not(0)
    _cuda.why_not.cache_clear()


@pytest.fixture(scope="module", params=["tiny-qwen", "tiny-gemma"])
def models(request):
    return load(request.param), load(request.param)


@pytest.fixture
def pair(models, cuda, monkeypatch):
    """(model on the CPU, the same on the GPU), float32."""
    if cuda.type == "cpu":
        pretend_gpu(monkeypatch, CudaKernels, cuda, of=models[1].config)
    return models[0], models[1].to(cuda)


def run(model, ids, cache, mask=None, steps=17):
    """Logits of a prefill and of single tokens after it, on the CPU: [batch, 1 + steps, vocabulary]."""
    model.set_attn_implementation("halfbyte")
    device, logits = model.device, []
    with torch.inference_mode():
        for part in (ids[:, :-steps], *ids[:, -steps:].split(1, 1)):
            shown = None if mask is None else mask[:, : cache.get_seq_length() + part.shape[1]].to(device)
            out = model(part.to(device), attention_mask=shown, past_key_values=cache, logits_to_keep=1)
            logits.append(out.logits.float().cpu())
    return torch.cat(logits, 1)


def distance(got, want):
    return ((got - want).norm() / want.norm()).item() if got.isfinite().all() else float("inf")


# The CPU's kernels quantise queries and weights to 8 bits, the GPU's compute in float32 here.
LOGITS = 0.03


@pytest.mark.parametrize("length", [30, 100, pytest.param(600, marks=needs_gpu)])
def test_decodes_as_on_the_cpu(pair, text, length):
    on_cpu, on_gpu = pair
    caches = Int4Cache(on_cpu.config), Int4Cache(on_gpu.config)
    want, got = (run(model, text[:, :length], cache) for model, cache in zip(pair, caches, strict=True))
    assert distance(got, want) < LOGITS
    assert all(isinstance(layer.native.kernels, CudaKernels) for layer in caches[1].layers)


def test_left_padding(pair, text):
    ids = torch.cat([text[:, :90], text[:, 100:190]])
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    want, got = (run(model, ids, Int4Cache(model.config), mask) for model in pair)
    assert distance(got, want) < LOGITS


def test_steps_of_several_tokens_crop_and_reorder(pair, text):
    results = []
    for model in pair:
        cache = Int4Cache(model.config)
        run(model, text[:, 200:330], cache, steps=6)
        cache.activate_past_recording()
        with torch.inference_mode():
            model(text[:, 330:350].to(model.device), past_key_values=cache)
            cache.crop(-13)
            cache.batch_repeat_interleave(3)
            cache.reorder_cache(torch.tensor([2, 0, 1], device=model.device))
            twin = copy.deepcopy(cache)
            ids = torch.stack([text[0, 337 + i : 345 + i] for i in range(3)]).to(model.device)
            logits = [model(ids, past_key_values=each).logits.float().cpu() for each in (cache, twin)]
        assert torch.equal(*logits)
        results.append(logits[0])
    assert distance(results[1], results[0]) < LOGITS


def test_saved_bytes_go_to_the_cpu_and_back(pair, text, tmp_path):
    on_cpu, on_gpu = pair
    cache = Int4Cache(on_gpu.config)
    run(on_gpu, text[:, :300], cache)
    cache.save(tmp_path / "gpu.safetensors")
    there = Int4Cache.load(tmp_path / "gpu.safetensors", on_cpu.config)
    there.save(tmp_path / "cpu.safetensors")
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()
    back = Int4Cache.load(tmp_path / "cpu.safetensors", on_gpu.config)
    with torch.inference_mode():
        logits = [on_gpu(text[:, 300:301].to(on_gpu.device), past_key_values=each).logits for each in (cache, back)]
        want = on_cpu(text[:, 300:301], past_key_values=there).logits
    assert torch.equal(*logits)  # loaded in CPU memory, taken to the GPU by the first states
    assert distance(logits[0].cpu(), want) < LOGITS


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate(pair, text, options):
    _, model = pair
    model.set_attn_implementation("halfbyte")
    tokens = 40 if model.device.type == "cuda" else 10
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False} | options
    out = model.generate(text[:, :90].to(model.device), past_key_values=Int4Cache(model.config), **settings)
    assert out.shape == (1, 90 + tokens)


@pytest.mark.parametrize("prefill", ["exact", "consistent"])
def test_other_attention_and_prefill(pair, text, prefill):
    """Dense attention on unpacked tensors, and what the kernels do not do: the CPU serves it."""
    if prefill == "consistent":
        want, got = (run(model, text[:, :80], Int4Cache(model.config, prefill=prefill)) for model in pair)
        assert distance(got, want) < 1e-3
        return
    results = []
    for model in pair:
        cache = Int4Cache(model.config)
        model.set_attn_implementation("sdpa")
        with torch.inference_mode():
            model(text[:, :100].to(model.device), past_key_values=cache)
            results.append(model(text[:, 100:105].to(model.device), past_key_values=cache).logits.float().cpu())
    assert distance(results[1], results[0]) < 1e-2


def test_a_token_that_attention_has_not_seen_is_there(pair, text):
    """Attention adds the token of a step; whoever asks before it runs finds it too."""
    _, model = pair
    cache, tokens = Int4Cache(model.config), 40
    run(model, text[:, :tokens], cache, steps=1)
    layer, step = cache.layers[1], torch.Generator().manual_seed(2)
    before = layer.keys
    shape = *before.shape[:2], 1, before.shape[3]
    k, v = (torch.randn(shape, generator=step).to(model.device, before.dtype) for _ in range(2))

    def newest(x):
        return x[:, :, -1:]

    states = cache.update(k, v, 1)
    assert torch.equal(newest(states[0] + 0.0), k)  # anything but attention
    layer.crop(-1)
    assert torch.equal(layer.keys, before)
    cache.update(k, v, 1)
    assert torch.equal(newest(layer.values), v)
    layer.crop(-1)
    cache.update(k, v, 1)
    layer.crop(-1)
    assert layer.seen == layer.native.length == tokens
    assert torch.equal(layer.keys, before)
    cache.update(k, v, 1)
    cache.update(v, k, 1)
    assert layer.seen == tokens + 2
    assert torch.equal(newest(layer.keys), v)


@pytest.mark.parametrize("watched", [False, pytest.param(True, marks=needs_gpu)])
def test_a_decoding_step_makes_one_call_a_layer_and_never_waits(pair, text, watched):
    """Watched, in sync-debug mode, PyTorch raises where the host waits for the device."""
    _, model = pair
    model.set_attn_implementation("halfbyte")
    cache = Int4Cache(model.config)
    calls, there = [], model.device
    with torch.inference_mode():
        model(text[:, :300].to(there), past_key_values=cache)
        model(text[:, 300:301].to(there), past_key_values=cache)
        step = text[:, 301:318].to(there)
        position = [torch.tensor([[at]], device=there) for at in range(301, 318)]
        for layer in cache.layers:
            kernels = layer.native.kernels
            kernels._launch = lambda name, *rest, launch=kernels._launch: (calls.append(name), launch(name, *rest))
        with contextlib.ExitStack() as stack:
            if watched:
                torch.cuda.set_sync_debug_mode("error")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            for i in range(17):
                model(step[:, i : i + 1], past_key_values=cache, position_ids=position[i])
    layers = len(cache.layers)
    assert calls.count("attend") == 17 * layers
    assert calls.count("encode") == calls.count("copy") == layers  # the step that packs a block of 16 does more
