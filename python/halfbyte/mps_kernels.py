"""The Metal kernels as PyTorch calls them: halfbyte.metal compiled, and the arguments of each call put in its order.

torch.mps.compile_shader (torch 2.7 or newer) gives functions that take tensors as buffers (with their storage offset),
ints as int64, floats as float32 and lists of either as arrays of them; `threads` is the number of all threads. The
order of arguments is that of src/gpu/kernels.metal. Not yet run on Apple hardware.
"""

import functools

import torch

from . import metal
from .gpu_kernels import DTYPES, LARGEST, ONE_OFFSET, PAGE_TOKENS, ROTATIONS, GpuKernels
from .metal import ATTEND_THREADS, CODE_THREADS, FINISH_THREADS, MAX_RAW, NO_RAW, NO_TURN, TILE_ROWS
from .mps_pages import MpsPages


@functools.cache
def library():
    """The compiled kernels. NotImplementedError where PyTorch can not use an Apple GPU."""
    if not torch.backends.mps.is_available():
        raise NotImplementedError("device mps: PyTorch finds no Apple GPU here (torch.backends.mps.is_available())")
    if not hasattr(torch.mps, "compile_shader"):
        raise NotImplementedError(f"device mps: torch {torch.__version__} can not compile kernels; takes 2.7 or newer")
    return torch.mps.compile_shader(metal.source())


@functools.cache
def gpu_cores():
    """Cores of the GPU, 8 where PyTorch does not say."""
    count = getattr(torch._C, "_mps_get_core_count", None)
    return count() if count is not None else 8


class MetalKernels(GpuKernels):
    """Launches on PyTorch's stream of an Apple GPU. Values are looked at before they are packed, which waits for it."""

    doubles = False

    @staticmethod
    def why_not(device, config, exact=False):
        """Why there are no kernels for a layer, or None. exact: attention in float32 is wanted, as these compute."""
        if reason := metal.why_not(config["head_dim_k"], config["head_dim_v"], config["recipe"]):
            return reason
        try:
            library()
        except NotImplementedError as error:
            return str(error)
        return None

    def __init__(self, device, **config):
        super().__init__(device, **config)
        recipe, self.dim = self.recipe, self.dims[0]
        self.padded = metal.padded(self.dim)
        self.bits = recipe.k_bits, recipe.v_bits
        self.nothing = torch.zeros(1, dtype=torch.float32, device=device)  # where a kernel has nothing to read
        self.flag = torch.zeros(1, dtype=torch.int32, device=device)  # `refuse` has looked before: nobody reads it
        self.tables = [torch.from_numpy(metal.rotation_table(recipe, self.layer_index, self.dim)).to(device)] * 2

    def pages(self, batch):
        return MpsPages(batch, self.page_bytes, self.device)

    @property
    def page_head_bytes(self):
        return metal.page_head_bytes(self.recipe, self.dim)

    @property
    def page_bytes(self):
        return self.kv_heads * self.page_head_bytes

    def set_rotations(self, matrices):
        """Those of a dense recipe, [head_dim, head_dim] of K and V."""
        self.tables = [torch.cat([r.reshape(-1), r.T.reshape(-1)]).to(self.device) for r in matrices]

    def refuse(self, spans):
        limit = LARGEST[self.recipe.scale_bits]
        held = [pair[side][:, :, : end - first] for side in (0, 1) for first, end, pair in spans]
        largest = torch.stack([x.abs().amax().float() for x in held])
        for name, value in zip("KV", largest.view(2, -1).amax(1).tolist(), strict=True):
            if not value <= limit:
                raise ValueError(
                    f"{name} holds {value} among the tokens up to {spans[-1][1]}: it takes finite values up to "
                    f"{limit:g}; the cache is as before"
                )

    def bind(self, batch, pages, offset, factors, turn, warm_up):
        super().bind(batch, pages, offset, factors, turn, warm_up)
        recipe = self.recipe
        self._batch, self._pages, self._table, self._warm_up = batch, pages, pages.table(), warm_up
        self._numbers = [batch, self.kv_heads, DTYPES[self.dtype], ROTATIONS[recipe.rotation]]
        self._numbers += [recipe.k_bits, recipe.k_group, recipe.v_bits, recipe.v_group]
        self._numbers += [recipe.scale_bits, int(recipe.search), int(recipe.signed_scale)]
        self._numbers += [self._table.shape[1], pages.first]
        self._lambdas, self._inverses = zip(*factors, strict=True)
        self._turn_numbers, self._waves = NO_TURN, self.nothing
        if self._turn is not None:
            self._turn_numbers = turn.span, turn.pairs, int(turn.interleaved)
            self._waves = turn.waves(pages.end * PAGE_TOKENS)

    def _or_nothing(self, *tensors):
        return [self.nothing if x is None else x for x in tensors]

    def _code(self, verb, side, begin, end, numbers, given, factor, result):
        """Launches a kernel for tokens [begin, end) of one side. The rest is what encode and decode differ in."""
        spans, (mu,) = self._offsets_of(side, begin, end) if self._offset else (ONE_OFFSET, (None,))
        numbers = [*self._numbers, int(side == 0), begin, end - begin, *numbers]
        numbers += [int(mu is not None), int(factor is not None), *spans]
        vectors = self._batch * self.kv_heads * (end - begin)
        getattr(library(), f"{verb}_d{self.dim}_int{self.bits[side]}")(
            numbers, *given, self.tables[side], *self._or_nothing(mu, factor), self._table, self._pages.pool.bytes,
            result, threads=metal.code_threads(self.dim, vectors), group_size=CODE_THREADS,
        )  # fmt: skip

    def encode(self, pair, data_first, begin, end):
        """Packs tokens [begin, end) of (K, V), which start at position data_first."""
        for side, data in enumerate(pair):
            numbers = data_first, *data.stride()[:3]
            given = LARGEST[self.recipe.scale_bits], data
            self._code("encode", side, begin, end, numbers, given, self._lambdas[side], self.flag)

    def decode(self, first_token, tokens, out_first, parts):
        """Unpacks tokens to float32 (K, V) [batch, kv_heads, tokens, head_dim] that start at position out_first."""
        for side, out in enumerate(parts):
            numbers = out_first, out.shape[2]
            self._code("decode", side, first_token, first_token + tokens, numbers, (), self._inverses[side], out)

    def copy_raw(self, pair, room, slot):
        """Copies (K, V) to where raw tokens are kept, from `slot` on."""
        for to, x in zip(room, pair, strict=True):
            to[:, :, slot : slot + x.shape[2]] = x

    def attend(self, query, out, scale, softcap, sinks, mask, counts, spans):
        """As GpuLayer.attend: packed tokens in parallel parts, then their merge and the raw tokens.

        counts: length, first, packed_end, kept. spans: ((K, V), position at their start, begin, end, are sinks) of raw
        tokens.
        """
        _, heads, queries, _ = query.shape
        length, first, packed_end, kept = counts
        recipe, tiles = self.recipe, -(-(heads // self.kv_heads * queries) // TILE_ROWS)
        segments = self._batch * self.kv_heads * tiles
        begin, end = max(self._first_seen(length, first, queries, mask), recipe.sink_tokens), min(length, packed_end)
        splits = metal.splits_of(segments, begin, end, gpu_cores())
        mu = [tables[0] for tables in self._offset or ((None,), (None,))]
        numbers = [*self._numbers, heads, queries, 1, length, first, self.sliding_window, recipe.sink_tokens]
        numbers += [packed_end, recipe.raw_window, self._warm_up, kept, begin, end, splits]
        # out is [batch, queries, heads, channels], the kernels say batch, head, token
        numbers += [*query.stride()[:3], out.stride(0), out.stride(2), out.stride(1)]
        numbers += [0, 0, 0, 0] if mask is None else [1, mask.shape[3], mask.stride(0), mask.stride(2)]
        numbers += [int(x is not None) for x in (sinks, *mu, *self._inverses)]
        numbers += [len(spans)]
        buffers = []
        for (k, v), *where in spans:
            numbers += [*k.stride()[:3], *v.stride()[:3], *where]
            buffers += [k, v]
        missing = MAX_RAW - len(spans)
        numbers += [*NO_RAW * missing, *self._turn_numbers]
        buffers += [self.nothing] * (2 * missing)
        reals = [float(scale), float(softcap or 0.0)]
        mask, sinks, mu_k, mu_v, inverse_k, inverse_v = self._or_nothing(mask, sinks, *mu, *self._inverses)
        partials = self.nothing
        if splits:
            partials = query.new_empty(segments * splits * TILE_ROWS * (self.padded + 2), dtype=torch.float32)
            getattr(library(), f"attend_d{self.dim}")(
                numbers, reals, query, self.tables[0], mu_k, inverse_k, mask, self._table, self._pages.pool.bytes,
                partials, self._waves, threads=segments * splits * ATTEND_THREADS, group_size=ATTEND_THREADS,
            )  # fmt: skip
        getattr(library(), f"finish_d{self.dim}")(
            numbers, reals, query, out, mask, sinks, self.tables[1], mu_v, inverse_v, partials, *buffers,
            threads=segments * FINISH_THREADS, group_size=FINISH_THREADS,
        )  # fmt: skip

    def _first_seen(self, length, first, queries, mask):
        """The first token that any of the newest `queries` tokens sees, as sight_of in src/gpu/attend.h."""
        if mask is not None:
            return max(first, length - mask.shape[3])
        return max(first, length - queries + 1 - self.sliding_window) if self.sliding_window else first
