"""The Metal kernels as PyTorch calls them: halfbyte.metal compiled, and the arguments of each call put in its order.

torch.mps.compile_shader (torch 2.7 or newer) gives functions that take tensors as buffers (with their storage offset),
ints as int64, floats as float32 and lists of either as arrays of them; `threads` is the number of all threads. The
order of arguments is that of src/gpu/kernels.metal. Not yet run on Apple hardware.
"""

import functools
import math
from importlib import resources

import torch

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
ROTATIONS = {"identity": 0, "srft": 1, "srht": 2, "dense": 3}
SIMD, ENCODE_THREADS, ATTEND_THREADS, FINISH_THREADS = 32, 128, 128, 256
PART = 16  # channels of a lane in encode and decode
TILE_ROWS = 8  # rows (query heads × queries) of a group in attend and finish
SMALLEST_SPLIT = 128  # tokens
MAX_RAW = 3
NO_RAW = [0] * 10  # numbers of a span of raw tokens that is not there
ONE_OFFSET, NO_TURN = [0, 0, 1], [0, 0, 0]  # numbers of an offset that does not turn


def source():
    """The Metal text that this package brings."""
    return resources.files("halfbyte").joinpath("halfbyte.metal").read_text()


@functools.cache
def library():
    """The compiled kernels. NotImplementedError where PyTorch can not use an Apple GPU."""
    if not torch.backends.mps.is_available():
        raise NotImplementedError("device mps: PyTorch finds no Apple GPU here (torch.backends.mps.is_available())")
    if not hasattr(torch.mps, "compile_shader"):
        raise NotImplementedError(f"device mps: torch {torch.__version__} can not compile kernels; takes 2.7 or newer")
    return torch.mps.compile_shader(source())


@functools.cache
def gpu_cores():
    """Cores of the GPU, 8 where PyTorch does not say."""
    count = getattr(torch._C, "_mps_get_core_count", None)
    return count() if count is not None else 8


def why_not(config):
    """Why there are no kernels for a layer, or None. config: as _native.Layer takes it."""
    k, v = config["head_dim_k"], config["head_dim_v"]
    if k != v or k not in HEAD_DIMS:
        return f"the Metal kernels take heads of {', '.join(map(str, HEAD_DIMS))}, K and V alike, not {k} and {v}"
    if config["recipe"].k_bits == 32:
        return "the Metal kernels take 4 and 8 bits, not 32"
    try:
        library()
    except NotImplementedError as error:
        return str(error)
    return None


class Kernels:
    """The kernels of one layer: its constant arguments and its rotations' tables. For layers without why_not."""

    def __init__(self, config, device):
        recipe = config["recipe"]
        self.recipe, self.device, self.dim, self.kv_heads = recipe, device, config["head_dim_k"], config["kv_heads"]
        self.padded = -(-self.dim // 32) * 32
        self.dtype = DTYPES[config["dtype"]]
        self.bits = recipe.k_bits, recipe.v_bits
        self.nothing = torch.zeros(1, device=device)  # where a kernel has nothing to read
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)
        self.tables = [rotation_table(recipe, config["layer_index"], self.dim).to(device)] * 2
        self.inverse = [None, None]  # (lambda, its inverse) of each side

    def set_rotations(self, matrices):
        """Tables of a dense recipe's rotations."""
        self.tables = [self.nothing if r is None else torch.cat([r.reshape(-1), r.T.reshape(-1)]) for r in matrices]

    @property
    def page_head_bytes(self):
        """Of one KV head's part of a page: docs/format.md."""
        total = 0
        for bits, group in zip(self.bits, (self.recipe.k_group, self.recipe.v_group), strict=True):
            groups = 1 if group == 0 else -(-self.padded // min(group, self.padded))
            total += 64 * (self.padded * bits // 8 + groups * self.recipe.scale_bits // 8)
        return -(-total // 64) * 64

    @property
    def nbytes(self):
        return sum(table.numel() * 4 for table in {id(t): t for t in self.tables}.values())

    def _layer_numbers(self, layer):
        recipe = self.recipe
        codec = [recipe.k_bits, recipe.k_group, recipe.v_bits, recipe.v_group]
        codec += [recipe.scale_bits, int(recipe.search), int(recipe.signed_scale)]
        head = [layer.batch, self.kv_heads, self.dtype, ROTATIONS[recipe.rotation]]
        return [*head, *codec, layer.page_table().shape[1], layer.pages_dropped]

    def _inverse_lambda(self, layer, side):
        factors = layer.lambdas[side]
        if factors is None:
            return None
        if self.inverse[side] is None or self.inverse[side][0] is not factors:
            self.inverse[side] = factors, 1.0 / factors
        return self.inverse[side][1]

    def _or_nothing(self, *tensors):
        return [self.nothing if x is None else x for x in tensors]

    def _code_threads(self, layer, tokens):
        lanes = 2
        while lanes * PART < self.dim:
            lanes *= 2
        vectors = layer.batch * self.kv_heads * tokens
        return -(-vectors // (ENCODE_THREADS // lanes)) * ENCODE_THREADS

    def encode(self, layer, raw, data_first, begin, end):
        """Packs tokens [begin, end) of K and V; raw holds tokens from data_first on."""
        numbers = self._layer_numbers(layer)
        for side, data in enumerate(raw):
            offset = None if layer.offset is None else layer.offset[side]
            has = int(offset is not None), int(layer.lambdas[side] is not None)
            kernel = getattr(library(), f"encode_d{self.dim}_int{self.bits[side]}")
            kernel(
                [*numbers, int(side == 0), begin, end - begin, data_first, *data.stride()[:3], *has, *ONE_OFFSET],
                layer.limit,
                data,
                self.tables[side],
                *self._or_nothing(offset, layer.lambdas[side]),
                layer.page_table(),
                layer.pool.bytes,
                self.flag,
                threads=self._code_threads(layer, end - begin),
                group_size=ENCODE_THREADS,
            )

    def decode(self, layer, out, out_first, begin, end):
        """Unpacks tokens [begin, end) to float32 `out`, a pair whose first token is out_first."""
        numbers = self._layer_numbers(layer)
        for side, to in enumerate(out):
            offset = None if layer.offset is None else layer.offset[side]
            inverse = self._inverse_lambda(layer, side)
            has = int(offset is not None), int(inverse is not None)
            kernel = getattr(library(), f"decode_d{self.dim}_int{self.bits[side]}")
            kernel(
                [*numbers, int(side == 0), begin, end - begin, out_first, to.shape[2], *has, *ONE_OFFSET],
                self.tables[side],
                *self._or_nothing(offset, inverse),
                layer.page_table(),
                layer.pool.bytes,
                to,
                threads=self._code_threads(layer, end - begin),
                group_size=ENCODE_THREADS,
            )

    def attend(self, layer, query, out, scale, raw_parts, kept, mask, softcap, sinks):
        """Packed tokens in parallel parts, then their merge and the raw tokens: see MpsLayer.attend."""
        _, heads, queries, _ = query.shape
        begin, end = packed_range(layer, queries, kept, mask)
        tiles = -(-(heads // self.kv_heads * queries) // TILE_ROWS)
        segments = layer.batch * self.kv_heads * tiles
        splits = splits_of(segments, begin, end)
        offsets = layer.offset or (None, None)
        inverses = [self._inverse_lambda(layer, side) for side in (0, 1)]
        numbers = [*self._layer_numbers(layer), heads, queries, 1]
        numbers += [layer.length, layer.first, layer.sliding_window, layer.sink, layer.packed_end]
        numbers += [self.recipe.raw_window, layer.warm_up, kept, begin, end, splits]
        # out is [batch, queries, heads, channels], the kernels say batch, head, token
        numbers += [*query.stride()[:3], out.stride(0), out.stride(2), out.stride(1)]
        numbers += [0, 0, 0, 0] if mask is None else [1, mask.shape[3], mask.stride(0), mask.stride(2)]
        numbers += [int(x is not None) for x in (sinks, *offsets, *inverses)]
        numbers += [len(raw_parts)]
        buffers = []
        for (k, v), first, start, stop, are_sinks in raw_parts:
            numbers += [*k.stride()[:3], *v.stride()[:3], first, start, stop, int(are_sinks)]
            buffers += [k, v]
        missing = MAX_RAW - len(raw_parts)
        numbers, buffers = numbers + NO_RAW * missing + NO_TURN, buffers + [self.nothing] * (2 * missing)
        reals = [float(scale), float(softcap or 0.0)]
        mask, sinks, *rest = self._or_nothing(mask, sinks, *offsets, *inverses)
        offset_k, offset_v, inverse_k, inverse_v = rest
        partials = self.nothing
        if splits:
            partials = query.new_empty(segments * splits * TILE_ROWS * (self.padded + 2), dtype=torch.float32)
            getattr(library(), f"attend_d{self.dim}")(
                numbers, reals, query, self.tables[0], offset_k, inverse_k, mask, layer.page_table(), layer.pool.bytes,
                partials, self.nothing, threads=segments * splits * ATTEND_THREADS, group_size=ATTEND_THREADS,
            )  # fmt: skip
        getattr(library(), f"finish_d{self.dim}")(
            numbers, reals, query, out, mask, sinks, self.tables[1], offset_v, inverse_v, partials, *buffers,
            threads=segments * FINISH_THREADS, group_size=FINISH_THREADS,
        )  # fmt: skip


def packed_range(layer, queries, kept, mask):
    """[begin, end) of the packed tokens that any of the newest `queries` tokens sees, as sight_of in src/gpu/attend.h.

    Queries come in order of position, so that the first sees the oldest and the last the newest.
    """
    first, last = layer.length - queries, layer.length - 1
    low = layer.first
    if mask is not None:
        low = max(low, layer.length - mask.shape[3])
    elif layer.sliding_window:
        low = max(low, first + 1 - layer.sliding_window)
    raw_from = max(layer.raw_start(last), min(kept, last + 1))
    return max(low, layer.sink), min(layer.length, raw_from, layer.packed_end)


def splits_of(segments, begin, end):
    """Into how many parts the packed tokens go, so that each core has a few groups; 0 when there are none."""
    if begin >= end:
        return 0
    return max(1, min(-(-4 * gpu_cores() // segments), (end - begin) // SMALLEST_SPLIT))


# ----------------------------------------------------------------------------------------------------------- rotations


def _mixed(x):
    """The output function of splitmix64, as in docs/format.md."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def signs(seed, layer_index, dim):
    """±1 for each channel of a layer: docs/format.md."""
    counters = (seed + 0x9E3779B97F4A7C15 * (1 + 512 * layer_index + c) for c in range(dim))
    return torch.tensor([-1.0 if _mixed(x % 2**64) >> 63 else 1.0 for x in counters])


def rotation_table(recipe, layer_index, dim):
    """What a kernel reads of a rotation that is not dense: factors of the channels, and roots for srft."""
    if recipe.rotation == "srht":
        return signs(recipe.seed, layer_index, dim) / math.sqrt(dim)
    if recipe.rotation != "srft":
        return torch.zeros(1)
    angles = -2.0 * math.pi * torch.arange(dim, dtype=torch.float64) / dim
    roots = torch.stack([angles.cos(), angles.sin()], dim=1).reshape(-1).float()
    return torch.cat([signs(recipe.seed, layer_index, dim) / math.sqrt(2 * dim), roots])
