"""A GpuLayer and a C++ Layer that are told the same, and caches of CPU tensors that have GpuLayers, for tests."""

import numpy as np
import torch

from halfbyte import _native, get_recipe, rooms
from halfbyte import layer as packed
from halfbyte.gpu_layer import GpuLayer

KV_HEADS, HEADS = 2, 6
STEPS = (1, 1, 1, 1, 2, 5, 17, 40, 90)
COUNTS = ("length", "first", "visible", "batch", "packed_tokens", "has_offset")
# Of (attention, unpacked values), relative to the whole. The C++ Layer computes `exact` here, so that what is left are
# orders of sums, roundings of outputs and, on tensor cores, of factors, and codes that fall to the other side of a tie.
PLAIN = 1e-5, 1e-5
CODED = {"float32": (3e-3, 0.02), "float16": (4e-3, 0.02), "bfloat16": (1e-2, 0.02)}
CODES_DIFFER = 2e-3  # share of bytes, in an emulator


def relative(got, want):
    """Error of the whole; inf if anything is not finite."""
    got, want = got.double().cpu(), want.double()
    assert got.shape == want.shape
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item() if got.isfinite().all() else float("inf")


class Walk:
    """`ours` on `device` with some kernels, and `theirs` on the CPU. Nothing that is asked of both may tell them apart.

    pairs: of channels that RoPE turns, 0 for a fixed offset; fields: of the recipe.
    """

    def __init__(
        self, kernels, recipe="default", dim=32, dtype="float32", window=0, batch=2, pairs=0, seed=0, device="cpu",
        **fields,
    ):  # fmt: skip
        self.random = np.random.default_rng(seed)
        self.torch_random = torch.Generator().manual_seed(seed)
        self.kernels, self.device, self.dim, self.batch = kernels, torch.device(device), dim, batch
        self.dtype, self.recipe = getattr(torch, dtype), get_recipe(recipe, **fields)
        self.config = {"kv_heads": KV_HEADS, "head_dim_k": dim, "head_dim_v": dim, "dtype": dtype}
        self.config |= {"recipe": self.recipe, "layer_index": 0, "sliding_window": window}
        self.is_plain = self.recipe.k_bits == 32
        self.limits = PLAIN if self.is_plain else CODED[dtype]
        self.theirs = _native.Layer(**self.config)
        self.ours = GpuLayer(kernels, self.device, **self.config)
        if pairs:  # odd seeds have pairs side by side
            frequencies = torch.logspace(0, -4, pairs)
            self.both("set_frequencies", frequencies.data_ptr(), pairs, bool(seed % 2))

    def both(self, name, *arguments):
        for layer in (self.ours, self.theirs):
            getattr(layer, name)(*arguments)

    def there(self, *tensors):
        return [None if x is None else x.to(self.device) for x in tensors]

    def tensor(self, heads, tokens, bias=0.0):
        """Strided as projections give it: [batch, tokens, heads, channels], transposed."""
        x = 2 * torch.randn(self.batch, tokens, heads, self.dim, generator=self.torch_random)
        return (x + bias * (torch.arange(self.dim) % 7 == 3)).to(self.dtype).transpose(1, 2)

    def append(self, tokens, counted=None, answered=False):
        self.chunk = self.tensor(KV_HEADS, tokens, 8.0), self.tensor(KV_HEADS, tokens)
        rooms.append_native(self.theirs, *self.chunk, counted, answered)
        self.ours.append(*self.there(*self.chunk, counted), answered)

    def attend(self, queries=1, mask=None, softcap=0.0, sinks=None, appends=False):
        """appends: a token more, which our layer takes together with the query."""
        if appends:
            self.chunk = self.tensor(KV_HEADS, 1, 8.0), self.tensor(KV_HEADS, 1)
            rooms.append_native(self.theirs, *self.chunk, None, False)
        query = self.tensor(HEADS, queries)
        outs = [torch.full((self.batch, queries, HEADS, self.dim), np.nan, dtype=self.dtype) for _ in range(2)]
        chunk = [x[:, :, -queries:] for x in self.chunk] if queries > 1 else None
        scale = self.dim**-0.5
        rooms.attend_native(self.theirs, query, outs[0], scale, chunk, mask, softcap, sinks, exact=True)
        outs[1] = outs[1].to(self.device)
        chunk = chunk and self.there(*chunk)
        query, mask, sinks = self.there(query, mask, sinks)
        arguments = query, outs[1], scale, chunk, mask, softcap, sinks
        if appends:
            self.ours.step(*self.there(*self.chunk), *arguments)
        else:
            self.ours.attend(*arguments)
        assert relative(outs[1], outs[0]) < self.limits[0]

    def compare(self):
        """Counts and all content are the same, codes but for those at ties."""
        for name in COUNTS:
            assert getattr(self.ours, name) == getattr(self.theirs, name), name
        tokens = self.theirs.visible
        want = rooms.unpack_native(self.theirs, (self.dim, self.dim), KV_HEADS, tokens, torch.float32)
        for got, x in zip(self.ours.unpack(tokens, torch.float32), want, strict=True):
            assert relative(got, x) < self.limits[1]
        ours, theirs = (canonical(layer.save()) for layer in (self.ours, self.theirs))
        differing = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
        assert differing <= (set() if self.is_plain else {"pages", "offset_k", "offset_v"})
        for name in differing & {"offset_k", "offset_v"}:
            assert np.abs(ours[name] - theirs[name]).max() < 1e-3
        # Scales in float32 differ in their last bit.
        if "pages" in differing and self.device.type == "cpu" and self.recipe.scale_bits == 16:
            assert np.mean(ours["pages"] != theirs["pages"]) < CODES_DIFFER

    def check(self, queries=1, **options):
        self.attend(queries, **options)
        self.compare()

    def crop_back_and_go_on(self):
        """Crops into what the newest step packed, behind it, before it, and to nothing."""
        self.both("record_past", True)
        self.append(45)
        for length in (50, 60, 41):
            self.append(30)  # 45 … 74: packs, and may be taken back raw
            self.both("crop", length)
            self.append(2)
            self.check(2)
        self.both("crop", 0)
        self.append(20)
        self.check()

    def restore(self):
        """From now on each goes on from what the other had saved."""
        ours, theirs = self.ours.save(), self.theirs.save()
        self.ours = GpuLayer.load(self.kernels, self.device, theirs, **self.config)
        assert_same_content(self.ours.save(), theirs)
        self.theirs = _native.Layer.load(**self.config, parts=ours)
        self.ours = GpuLayer.load(self.kernels, self.device, ours, **self.config)

    def step(self, steps=STEPS):
        """One random change, then a look at all there is."""
        kind = self.random.integers(12)
        if not self.theirs.length or kind < 7:
            tokens = int(self.random.choice(steps))
            steps = tokens == 1 and self.theirs.length > 0 and self.ours.takes_new
            if not steps:
                self.append(tokens)
            mask = None
            queries = tokens if self.random.integers(2) else 1
            if self.random.integers(4) == 0:
                shape = self.batch, 1, queries, self.theirs.visible
                mask = torch.rand(shape, generator=self.torch_random) < 0.8
            self.attend(queries, mask, appends=steps)
        elif kind == 7:
            length = self.theirs.length - int(self.random.choice([1, 3, 20, 70]))
            lowest = 1 if not self.theirs.first else self.theirs.first + self.config["sliding_window"] - 1
            self.both("crop", max(length, lowest))
        elif kind == 8:
            rows = self.random.integers(self.batch, size=int(self.random.integers(1, 4))).tolist()
            self.both("select", rows)
            self.batch = len(rows)
        elif kind == 9:
            self.restore()
        elif kind == 10:
            before = self.ours
            self.ours = before.copy()
            self.append(1)
            saved = self.ours.save()
            tokens = int(self.random.choice([1, 33]))  # beside the others, or packed
            before.append(*self.there(self.tensor(KV_HEADS, tokens), self.tensor(KV_HEADS, tokens)))
            assert_same_content(self.ours.save(), saved)  # what the other writes is its own
        else:
            self.both("record_past", bool(self.random.integers(2)))
        self.compare()


def canonical(parts):
    """Saved parts with the pages of each sequence in order: which sequences share pages is not content."""
    parts = dict(parts)
    table = parts.pop("page_table")
    if len(table):
        pages = parts["pages"].reshape(len(set(table.tolist())), -1)
        parts["pages"] = pages[table]
    return parts


def assert_same_content(got, want):
    got, want = canonical(got), canonical(want)
    for name in want:
        assert np.array_equal(got[name], want[name]), name


def pretend_gpu(monkeypatch, kernels, device, of=None):
    """Caches of CPU tensors have these kernels from now on, where there are some for them; of: those of one config."""
    make_room, make_layer = packed.make_room, packed.Int4Layer._make_room

    def gpu_room(_, exact, parts=None, **config):
        if kernels.why_not(device, config, exact):
            return make_room(device, exact, parts, **config)
        return GpuLayer(kernels, device, **config) if parts is None else GpuLayer.load(kernels, device, parts, **config)

    def make(self, *args):
        with monkeypatch.context() as patch:
            if of is None or self._shared.config is of:
                patch.setattr(packed, "make_room", gpu_room)
            room = make_layer(self, *args)
        self._on_cpu = not isinstance(room, GpuLayer)
        return room

    monkeypatch.setattr(packed.Int4Layer, "_make_room", make)
