"""CudaLayer against the C++ Layer on random walks: its bookkeeping anywhere, its kernels where there is a GPU."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from halfbyte import RECIPES, _cuda, _native, cuda_layer, get_recipe, rooms  # noqa: E402
from plain_kernels import PlainKernels  # noqa: E402

NO_GPU = not torch.cuda.is_available() or _cuda.why_not(0) is not None
needs_gpu = pytest.mark.skipif(NO_GPU, reason="no CUDA device with libhalfbyte_cuda")
KV_HEADS, HEADS, DIM = 2, 4, 32
STEPS = (1, 1, 1, 1, 2, 5, 17, 40, 90)


def relative_error(got, want):
    """Of the whole; inf if anything is not finite."""
    got, want = got.double().cpu(), want.double()
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item() if got.isfinite().all() else float("inf")


class Walk:
    """One C++ Layer and one CudaLayer that are told the same, on `device`."""

    def __init__(self, seed, device, recipe, tolerance, dtype="float32", batch=2, window=0, dim=DIM, pairs=0):
        self.random = np.random.default_rng(seed)
        self.torch_random = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.tolerance = torch.device(device), getattr(torch, dtype), tolerance
        self.config = {"kv_heads": KV_HEADS, "head_dim_k": dim, "head_dim_v": dim, "dtype": dtype}
        self.config |= {"recipe": recipe, "layer_index": 0, "sliding_window": window}
        self.dim, self.batch = dim, batch
        self.theirs = _native.Layer(**self.config)
        self.ours = cuda_layer.CudaLayer(self.device, **self.config)
        if pairs:  # an offset that turns; odd seeds have pairs side by side
            frequencies = torch.logspace(0, -4, pairs)
            for layer in (self.ours, self.theirs):
                layer.set_frequencies(frequencies.data_ptr(), pairs, bool(seed % 2))

    def tensor(self, heads, tokens, bias=0.0):
        x = torch.randn(self.batch, heads, tokens, self.dim, generator=self.torch_random)
        return (x + bias * (torch.arange(self.dim) % 7 == 3)).to(self.dtype)

    def append(self, tokens, counted=None):
        self.chunk = self.tensor(KV_HEADS, tokens, 8.0), self.tensor(KV_HEADS, tokens)
        rooms.append_native(self.theirs, *self.chunk, counted, False)
        on_device = [x.to(self.device) for x in self.chunk]
        self.ours.append(*on_device, None if counted is None else counted.to(self.device))

    def attend(self, queries, masked=False, softcap=0.0, with_sinks=False):
        query = self.tensor(HEADS, queries)
        outs = [torch.full((self.batch, queries, HEADS, self.dim), np.nan, dtype=self.dtype) for _ in range(2)]
        outs[1] = outs[1].to(self.device)
        mask = sinks = None
        if masked:
            mask = torch.rand(self.batch, 1, queries, self.theirs.visible, generator=self.torch_random) < 0.8
        if with_sinks:
            sinks = torch.randn(HEADS, generator=self.torch_random)
        chunk = [x[:, :, -queries:] for x in self.chunk] if queries > 1 else None
        scale = self.dim**-0.5
        rooms.attend_native(self.theirs, query, outs[0], scale, chunk, mask, softcap, sinks)

        def there(x):
            return None if x is None else x.to(self.device)

        chunk = None if chunk is None else [there(x) for x in chunk]
        self.ours.attend(there(query), outs[1], scale, chunk, there(mask), softcap, there(sinks))
        assert relative_error(outs[1], outs[0]) < self.tolerance

    def compare(self):
        for name in ("length", "first", "visible", "batch", "packed_tokens", "has_offset"):
            assert getattr(self.ours, name) == getattr(self.theirs, name), name
        tokens = self.theirs.visible
        want = rooms.unpack_native(self.theirs, (self.dim, self.dim), KV_HEADS, tokens, torch.float32)
        for got, x in zip(self.ours.unpack(tokens, torch.float32), want, strict=True):
            assert relative_error(got, x) < self.tolerance
        ours, theirs = (canonical(layer.save(), self.config) for layer in (self.ours, self.theirs))
        differing = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
        assert differing <= ({"pages", "offset_k", "offset_v"} if self.tolerance > 1e-5 else set())
        if "offset_k" in differing:
            assert np.abs(ours["offset_k"] - theirs["offset_k"]).max() < 1e-3

    def restore(self):
        """From now on each goes on from what the other had saved."""
        ours, theirs = self.ours.save(), self.theirs.save()
        self.ours = cuda_layer.CudaLayer.load(self.device, theirs, **self.config)
        assert_same_content(self.ours.save(), theirs, self.config)
        self.theirs = _native.Layer.load(**self.config, parts=ours)
        self.ours = cuda_layer.CudaLayer.load(self.device, ours, **self.config)

    def step(self):
        """One random change, then a look at all there is."""
        kind = self.random.integers(12)
        if not self.theirs.length or kind < 7:
            tokens = int(self.random.choice(STEPS))
            self.append(tokens)
            self.attend(tokens if self.random.integers(2) else 1, masked=self.random.integers(4) == 0)
        elif kind == 7:
            length = self.theirs.length - int(self.random.choice([1, 3, 20, 70]))
            lowest = 1 if not self.theirs.first else self.theirs.first + self.config["sliding_window"] - 1
            for layer in (self.ours, self.theirs):
                layer.crop(max(length, lowest))
        elif kind == 8:
            rows = self.random.integers(self.batch, size=int(self.random.integers(1, 4))).tolist()
            for layer in (self.ours, self.theirs):
                layer.select(rows)
            self.batch = len(rows)
        elif kind == 9:
            self.restore()
        elif kind == 10:
            before = self.ours
            self.ours = before.copy()
            saved = self.ours.save()
            before.append(*(x.to(self.device) for x in (self.tensor(KV_HEADS, 33), self.tensor(KV_HEADS, 33))))
            assert_same_content(self.ours.save(), saved, self.config)  # what the other writes is its own
        else:
            recorded = bool(self.random.integers(2))
            for layer in (self.ours, self.theirs):
                layer.record_past(recorded)
        self.compare()


def canonical(parts, config):
    """Saved parts with the pages of each sequence in order: which sequences share pages is not content."""
    parts = dict(parts)
    table = parts.pop("page_table")
    if len(table):
        pages = parts["pages"].reshape(len(set(table.tolist())), -1)
        parts["pages"] = pages[table]
    return parts


def assert_same_content(got, want, config):
    got, want = canonical(got, config), canonical(want, config)
    for name in want:
        assert np.array_equal(got[name], want[name]), name


@pytest.mark.parametrize(
    "options", [{}, {"sink_tokens": 16}, {"raw_window": 32}, {"sink_tokens": 32, "raw_window": 16}]
)
@pytest.mark.parametrize("window", [0, 70])
def test_bookkeeping_is_the_cpp_layers(monkeypatch, options, window):
    monkeypatch.setattr(cuda_layer, "Kernels", PlainKernels)
    walk = Walk(len(options) + window, "cpu", get_recipe("passthrough", **options), 1e-5, window=window)
    for _ in range(15):
        walk.step()


def test_pages_are_added_in_ever_larger_pieces(monkeypatch):
    monkeypatch.setattr(cuda_layer, "Kernels", PlainKernels)
    walk = Walk(0, "cpu", RECIPES["passthrough"], 1e-5, batch=1)
    walk.append(3200)
    held = []
    for _ in range(5):
        for _ in range(64):
            walk.append(1)
        held.append(len(walk.ours._pages._chunks))
    assert held == [2, 2, 2, 2, 3]  # four pages at a time
    assert walk.ours.nbytes < 1.2 * walk.theirs.nbytes


GPU_CASES = [
    ("default", "float16", 128, {}),
    ("default", "bfloat16", 256, {}),
    ("default", "float32", 80, {}),
    ("g16", "float16", 64, {}),
    ("k8v4", "bfloat16", 128, {}),
    ("default", "float16", 128, {"raw_window": 16}),
    ("no-sinks", "float16", 64, {}),
    ("paper-g32", "float16", 128, {}),
    ("default", "float16", 128, {"offset_tokens": 64}),
]


# Codes of values next to a rounding boundary fall either way, and the CPU's kernels quantise queries and weights to 8
# bits where the GPU's use fp16: about 1 % of the output.
@needs_gpu
@pytest.mark.parametrize(("recipe", "dtype", "dim", "options"), GPU_CASES)
@pytest.mark.parametrize("window", [0, 70])
def test_walks_like_the_cpp_layer(recipe, dtype, dim, options, window):
    recipe = get_recipe(recipe, **options)
    walk = Walk(dim + window, "cuda:0", recipe, 0.03, dtype=dtype, window=window, dim=dim)
    for _ in range(40):
        walk.step()


@needs_gpu
@pytest.mark.parametrize(("dtype", "dim", "span", "pairs"), [
    ("float16", 128, 64, 64), ("bfloat16", 64, 16, 20), ("float16", 256, 64, 128), ("float32", 80, 16, 40),
    ("bfloat16", 128, 64, 30), ("float16", 96, 64, 48),
])  # fmt: skip
@pytest.mark.parametrize("window", [0, 70])
def test_an_offset_that_turns(dtype, dim, span, pairs, window):
    recipe = get_recipe("default", offset_span=span, sink_tokens=16 * (span == 16))
    walk = Walk(pairs + 1, "cuda:0", recipe, 0.03, dtype=dtype, window=window, dim=dim, pairs=pairs)
    for _ in range(30):
        walk.step()


@needs_gpu
def test_attends_with_all_that_narrows_it():
    walk = Walk(3, "cuda:0", RECIPES["default"], 0.03, dtype="float16", dim=128)
    walk.append(300)
    for queries in (1, 7):
        walk.append(queries)
        for options in ({"masked": True}, {"softcap": 5.0}, {"with_sinks": True}):
            walk.attend(queries, **options)


@needs_gpu
def test_padding_is_left_out_of_the_offset():
    for first in (7, 40):
        walk = Walk(first, "cuda:0", RECIPES["no-sinks"], 0.03, dtype="float16", dim=128, pairs=first // 2)
        counted = torch.ones(2, first, dtype=torch.uint8)
        counted[1, : first // 2] = 0
        walk.append(first, counted)
        walk.append(20)
        walk.compare()
        for side in ("k", "v"):
            ours, theirs = (layer.save()[f"offset_{side}"] for layer in (walk.ours, walk.theirs))
            assert np.abs(ours - theirs).max() < 1e-4


@needs_gpu
def test_a_value_that_can_not_be_coded_raises_later():
    walk = Walk(4, "cuda:0", RECIPES["default"], 0.03, dtype="float16", dim=128)
    k, v = (torch.zeros(2, KV_HEADS, 33, 128, dtype=torch.float16, device="cuda:0") for _ in range(2))
    k[1, 0, 17, 7] = float("nan")  # behind the sinks
    walk.ours.append(k, v)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="not finite"):
        walk.ours.append(k[:, :, :1], v[:, :, :1])
    walk.ours.reset()
    walk.append(40)
    walk.compare()


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_works_on_the_second_gpu_while_the_first_is_current():
    walk = Walk(5, "cuda:1", RECIPES["default"], 0.03, dtype="float16", dim=128)
    assert torch.cuda.current_device() == 0
    for _ in range(10):
        walk.step()
    assert torch.cuda.current_device() == 0
