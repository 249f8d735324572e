"""What the kernels of every GPU have in common for a GpuLayer: limits, numbers of dtypes, offsets and raw tokens."""

import ctypes
import math

import torch

from .gpu_turn import mean_of

BLOCK_TOKENS, PAGE_TOKENS = 16, 64
NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
ROTATIONS = {"identity": 0, "srft": 1, "srht": 2, "dense": 3}
LARGEST = {16: 1e4, 32: 1e15}  # codable magnitudes by scale_bits, as in the C++ Layer
ONE_OFFSET = 0, 0, 1  # span, first and count where one offset serves all tokens
SPANS_AHEAD = 8  # whose turned offsets are computed together, as decoding comes to one after the other


class GpuKernels:
    """One layer's kernels on the current stream of a device, for tokens whose counts the caller keeps.

    A kind of device adds `why_not`, `pages`, `page_bytes`, `set_rotations` and the calls `encode`, `decode`, `copy_raw`
    and `attend`, and says how it meets a value that can not be coded: `refuse` before anything changes, or `failed`
    some time after.
    """

    doubles = True  # whether the device computes in float64
    failed = False  # whether an `encode` so far has met a value that it can not code
    takes_new = False  # whether `attend` copies the newest token to where raw ones are kept

    def __init__(self, device, kv_heads, head_dim_k, head_dim_v, dtype, recipe, layer_index=0, sliding_window=0):
        self.device, self.recipe, self.kv_heads, self.dims = device, recipe, kv_heads, (head_dim_k, head_dim_v)
        self.dtype, self.layer_index, self.sliding_window = dtype, layer_index, sliding_window
        self._offset = self._turn = self._turned = None

    def copy(self):
        """For a layer of its own; `bind` must follow."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def forgive(self):
        """Starts anew after `failed`."""

    def refuse(self, spans):
        """ValueError for raw tokens [(first, end, (K, V))] that can not be coded, unless `failed` tells of it later."""

    def offset_tables(self, side, mu):
        """The tables that kernels read of an offset of K or V, [..., head_dim]; mu comes first."""
        return (mu,)

    def means(self, spans, total, weights, turn, wanted):
        """The tables of offsets that are means of the first `total` tokens, for K and V, where they are wanted.

        spans, weights: as of `mean_of`; turn: how that of K turns, or None.
        """
        turns = turn, None
        return [
            self.offset_tables(side, mean_of(spans, side, total, weights, turns[side])) if wanted[side] else None
            for side in (0, 1)
        ]

    def turned_tables(self, turn, tables, first, last):
        """The tables of K's offset in spans first to last - 1, from those of the offset itself."""
        return self.offset_tables(0, turn.offsets(tables[0], first, last))

    def bind(self, batch, pages, offset, factors, turn, warm_up):
        """Tells of other pages, offsets or sequences.

        offset: `offset_tables` of K and V, or None; factors: (lambda, 1 / lambda) of K and V; turn: a Turn, or None;
        warm_up: tokens that stay raw until their mean is the offset.
        """
        if offset is not self._offset:
            self._turned = None
        self._offset, self._turn = offset, turn if offset else None

    def _offsets_of(self, side, begin, end):
        """Offsets of K or V, if there are any, for tokens [begin, end): ((span, first, count), their tables)."""
        turn = self._turn
        if side or turn is None:
            return ONE_OFFSET, self._offset[side]
        first, last = begin // turn.span, (end - 1) // turn.span + 1
        if self._turned is None or first < self._turned[0] or last > self._turned[1]:
            last = max(last, first + SPANS_AHEAD)
            self._turned = first, last, self.turned_tables(turn, self._offset[0], first, last)
        first, last, tables = self._turned
        return (turn.span, first, last - first), tables


def between(spans, begin, end):
    """(K, V) of the tokens [begin, end), which lie in spans [(first, end, (K, V))] one after the other."""
    found = []
    for first, last, pair in spans:
        lo, hi = max(begin, first), min(end, last)
        if lo < hi:
            found.append([x[:, :, lo - first : hi - first] for x in pair])
    return found[0] if len(found) == 1 else [torch.cat(side, 2) for side in zip(*found, strict=True)]


def host_floats(address, shape):
    """A copy of the float32 array of that shape in CPU memory."""
    count = math.prod(shape)
    array = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(array, dtype=torch.float32).view(shape).clone()
