"""The kernels of libhalfbyte_cuda for one layer: what they are told, their scratch memory, the tables of rotations."""

import ctypes
import functools

import torch

from . import _cuda
from .cuda_pages import CudaPages
from .gpu_kernels import DTYPES, LARGEST, PAGE_TOKENS, ROTATIONS, GpuKernels

ROW_TILE = 8  # rows (query heads x queries) that one part of an attention kernel takes
NO_TABLES = None, None


def describe(view, tensor):
    """Writes a [batch, heads, tokens, channels] tensor into a View of the library; channels lie in one piece."""
    view.data = tensor.data_ptr()
    view.batch_stride, view.head_stride, view.token_stride, _ = tensor.stride()


class CudaKernels(GpuKernels):
    """Launches on the current stream of a device. Nothing waits for it, so `failed` comes true some steps later."""

    takes_new = True

    @staticmethod
    def why_not(device, config, exact=False):
        """Why there are no kernels for a layer, or None. exact: attention in float32 is wanted."""
        if exact or config["recipe"].k_bits == 32:
            return 'the CUDA kernels do neither prefill="consistent" nor 32 bits'
        reason = _cuda.why_not(device.index)
        return reason and f"no CUDA kernels ({reason}; see `halfbyte doctor`)"

    def __init__(self, device, **config):
        super().__init__(device, **config)
        recipe = self.recipe
        self._library = _cuda.load()
        names = "encode", "copy", "attend", "decode", "offsets"
        self._functions = {name: getattr(self._library, f"halfbyte_cuda_{name}") for name in names}
        self._description = _cuda.LayerDescription(
            self.kv_heads, *self.dims, DTYPES[self.dtype],
            recipe.k_bits, recipe.v_bits, recipe.k_group, recipe.v_group, recipe.scale_bits, recipe.search,
            recipe.signed_scale, ROTATIONS[recipe.rotation], recipe.seed, self.layer_index,
        )  # fmt: skip
        self.page_bytes = self.kv_heads * self._library.halfbyte_cuda_page_bytes(self._description)
        self._rotations = [(None,) * 5] * 2
        if recipe.rotation != "dense":
            self._rotations = _shared_tables(bytes(self._description), device)
        self._own_flag()

    def _own_flag(self):
        self._flag = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=True)  # which the device can write to
        self._failed = ctypes.c_int32.from_address(self._flag.data_ptr())

    @property
    def failed(self):
        """Whether an encode so far has met a value that it can not code."""
        return self._failed.value != 0

    def forgive(self):
        if self.failed:
            torch.cuda.synchronize(self.device)
            self._failed.value = 0

    def copy(self):
        other = super().copy()
        other._own_flag()
        other._failed.value = self._failed.value
        return other

    def pages(self, batch):
        return CudaPages(batch, self.page_bytes, self.device, one_by_one=self.sliding_window > 0)

    def set_rotations(self, matrices):
        """Those of a dense recipe, [head_dim, head_dim] of K and V."""
        self._rotations = [
            _tables(self._library, self._description, self.device, side, matrix) for side, matrix in enumerate(matrices)
        ]

    def offset_tables(self, side, mu):
        """mu and R mu."""
        rotation = self._rotations[side][0]
        return mu, mu if rotation is None else (mu.double() @ rotation.double().T).float()

    def means(self, spans, total, weights, turn, wanted):
        call = self._offsets_call(turn, total)
        call.total, call.n_raw = total, len(spans)
        for raw, (begin, end, (k, v)) in zip(call.raw, spans, strict=False):
            raw.first, raw.begin, raw.end = begin, begin, min(end, total)
            describe(raw.k, k)
            describe(raw.v, v)
        call.batch = spans[0][2][0].shape[0]
        if weights is not None:
            counts = weights.sum(1)
            call.weights, call.counts, call.weight_stride = weights.data_ptr(), counts.data_ptr(), weights.stride(0)
        made = [None, None]
        for side, offset in enumerate((call.k, call.v)):
            if wanted[side]:
                mu, rotated = made[side] = self._new_offsets(call.batch, self.dims[side])
                offset.offset, offset.rotated_offset = mu.data_ptr(), rotated.data_ptr()
        space = torch.empty(self._library.halfbyte_cuda_offsets_space(call), dtype=torch.uint8, device=self.device)
        call.space = space.data_ptr()
        self._launch("offsets", call)
        return made

    def turned_tables(self, turn, tables, first, last):
        call = self._offsets_call(turn, last * turn.span)
        mu, rotated = tables
        call.batch, call.first_span, call.k.span_count = mu.shape[0], first, last - first
        call.k.offset, call.k.rotated_offset = mu.data_ptr(), rotated.data_ptr()
        turned = self._new_offsets(mu.shape[0], last - first, self.dims[0])
        call.k.span_offset, call.k.span_rotated_offset = (x.data_ptr() for x in turned)
        self._launch("offsets", call)
        return turned

    def _offsets_call(self, turn, tokens):
        """A call for offsets of which K's turns as in so many tokens, if it does."""
        call = _cuda.Offsets(self._description, device=self.device.index)
        if turn is not None:
            call.turn = _cuda.Turn(turn.waves(tokens).data_ptr(), turn.span, turn.pairs, turn.interleaved)
        for offset, (_, transposed, *_) in zip((call.k, call.v), self._rotations, strict=True):
            offset.transposed = None if transposed is None else transposed.data_ptr()
        return call

    def _new_offsets(self, batch, *shape):
        """Room for offsets [batch, kv_heads, …, head_dim], and for them rotated."""
        return tuple(
            torch.empty(batch, self.kv_heads, *shape, dtype=torch.float32, device=self.device) for _ in range(2)
        )

    def bind(self, batch, pages, offset, factors, turn, warm_up):
        super().bind(batch, pages, offset, factors, turn, warm_up)
        self._unbound = batch, pages, factors, warm_up  # a prefill tells of changes three times before it needs a call

    def _describe_calls(self):
        """The calls as far as they stay alike until the next `bind`."""
        batch, pages, factors, warm_up = self._unbound
        self._unbound = None
        tables = []
        for side in (0, 1):
            held = *self._rotations[side], *(self._offset[side] if self._offset else NO_TABLES), *factors[side]
            tables.append(_cuda.Tables(*(None if x is None else x.data_ptr() for x in held)))
        common = self._description, *tables, pages.described()
        self._encode, self._attend, self._decode = (
            kind(*common) for kind in (_cuda.Encode, _cuda.Attend, _cuda.Decode)
        )
        self._copy = _cuda.Copy(self._description)
        for call in (self._encode, self._attend, self._decode, self._copy):
            call.batch, call.device = batch, self.device.index
        self._encode.limit, self._encode.bad = LARGEST[self.recipe.scale_bits], self._flag.data_ptr()
        call = self._attend
        call.causal, call.sliding_window, call.warm_up = 1, self.sliding_window, warm_up
        call.sink_tokens, call.raw_window = self.recipe.sink_tokens, self.recipe.raw_window
        if (turn := self._turn) is not None:
            self._waves = turn.waves(pages.end * PAGE_TOKENS)  # kept: calls hold its address
            call.turn = _cuda.Turn(self._waves.data_ptr(), turn.span, turn.pairs, turn.interleaved)
        # A decoding step writes few fields: structures inside others are kept, and views of tensors that stay.
        self._q, self._out, self._raw = call.q, call.out, list(call.raw)
        self._new_k, self._new_v = call.new_k, call.new_v
        self._k, self._v = self._copy.k, self._copy.v
        self._room = self._form = self._stream_seen = None
        self._spans = [None] * len(self._raw)

    def _stream(self):
        # torch.cuda.current_stream() asks this, at ten times the cost.
        return torch._C._cuda_getCurrentRawStream(self.device.index)

    def _launch(self, name, call, stream=None):
        call.stream = self._stream() if stream is None else stream
        error = self._functions[name](call)
        if error:
            raise RuntimeError(f"CUDA: {self._library.halfbyte_cuda_error(error).decode()}")

    def encode(self, pair, data_first, begin, end):
        """Packs tokens [begin, end) of (K, V), which start at position data_first."""
        if self._unbound is not None:
            self._describe_calls()
        call = self._encode
        describe(call.k, pair[0])
        describe(call.v, pair[1])
        call.data_first, call.first_token, call.tokens = data_first, begin, end - begin
        self._describe_offsets(call.k_tables, begin, end)
        self._launch("encode", call)

    def copy_raw(self, pair, room, slot):
        """Copies (K, V) to where raw tokens are kept, from `slot` on."""
        if self._unbound is not None:
            self._describe_calls()
        call = self._copy
        k, v = pair
        describe(self._k, k)
        describe(self._v, v)
        if room is not self._room:
            self._room = room
            k_to, v_to = self._to = call.k_to, call.v_to
            describe(k_to, room[0])
            describe(v_to, room[1])
            self._start = k_to.data, v_to.data
        k_to, v_to = self._to
        element = k.element_size()
        k_to.data = self._start[0] + slot * k_to.token_stride * element
        v_to.data = self._start[1] + slot * v_to.token_stride * element
        call.tokens = k.shape[2]
        self._launch("copy", call)

    def decode(self, first_token, tokens, out_first, parts):
        """Unpacks tokens to float32 (K, V) [batch, kv_heads, tokens, head_dim] that start at position out_first."""
        if self._unbound is not None:
            self._describe_calls()
        call = self._decode
        call.first_token, call.tokens, call.out_first = first_token, tokens, out_first
        call.out_tokens, call.k, call.v = parts[0].shape[2], parts[0].data_ptr(), parts[1].data_ptr()
        self._describe_offsets(call.k_tables, first_token, first_token + tokens)
        self._launch("decode", call)

    def _describe_offsets(self, tables, begin, end):
        """Offsets of K for the spans of tokens [begin, end), if it turns."""
        if self._turn is not None:
            (span, first, count), (mu, rotated) = self._offsets_of(0, begin, end)
            tables.offset, tables.rotated_offset = mu.data_ptr(), rotated.data_ptr()
            tables.offset_span, tables.offset_first, tables.offset_count = span, first, count

    def attend(self, query, out, scale, softcap, sinks, mask, counts, spans, new=None, strides=None):
        """As GpuLayer.attend, to an `out` in one piece. counts: length, first, packed_end, kept.

        spans: ((K, V), position at their start, begin, end, are sinks) of raw tokens. new: K, V of a token that goes to
        the last place of the last of them before anything is read; then strides are those of query, K and V.
        """
        if self._unbound is not None:
            self._describe_calls()
        call = self._attend
        form = query.shape, strides, scale, softcap
        if new is None:
            self._take_form(query, None, scale, softcap)
            self._new_k.data = None
        else:
            k, v = new
            if form != self._form:
                self._take_form(query, new, scale, softcap)
                self._form = form
            self._new_k.data, self._new_v.data = k.data_ptr(), v.data_ptr()
        self._q.data, self._out.data = query.data_ptr(), out.data_ptr()
        call.length, call.first, call.packed_end, call.kept = counts
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.mask = None
        if mask is not None:
            call.mask, call.mask_tokens = mask.data_ptr(), mask.shape[3]
            call.mask_batch_stride, call.mask_query_stride = mask.stride(0), mask.stride(2)
        raws, described = self._raw, self._spans
        for i, (pair, first, begin, end, are_sinks) in enumerate(spans):
            raw = raws[i]
            if pair is not described[i]:
                described[i] = pair
                describe(raw.k, pair[0])
                describe(raw.v, pair[1])
            raw.first, raw.begin, raw.end, raw.are_sinks = first, begin, end, are_sinks
        call.n_raw = len(spans)
        stream = self._stream()
        if stream != self._stream_seen:
            self._scratch = Scratch.of(self.device, stream)
            self._scratch.make_room(self._library, call)
            self._stream_seen = stream
        call.space, call.arrivals = self._scratch.where
        self._launch("attend", call, stream)
        if new is None:
            self._spans = [None] * len(raws)  # a chunk is not this layer's to keep

    def _take_form(self, query, new, scale, softcap):
        """What decoding steps have in common: shapes, strides, scales."""
        call, out = self._attend, self._out
        _, call.heads, call.queries, _ = query.shape
        call.scale, call.softcap = scale, softcap
        describe(self._q, query)
        out.head_stride, out.token_stride = self.dims[1], call.heads * self.dims[1]
        out.batch_stride = call.queries * out.token_stride
        if new is not None:
            describe(self._new_k, new[0])
            describe(self._new_v, new[1])
        self._form = self._stream_seen = None


class Scratch:
    """Memory for attention's partial results. One for all layers that work on a stream, which take turns there."""

    _of = {}  # noqa: RUF012 - {(device index, stream): Scratch}

    def __init__(self, device):
        self.device = device
        self._space = torch.empty(0, dtype=torch.uint8, device=device)
        self._arrivals = torch.zeros(0, dtype=torch.int32, device=device)

    @classmethod
    def of(cls, device, stream):
        key = device.index, stream
        if key not in cls._of:
            cls._of[key] = cls(device)
        return cls._of[key]

    def make_room(self, library, call):
        """Has `where` name enough space, and zeroed counters, for calls of this batch, heads and queries."""
        size = library.halfbyte_cuda_attend_space(call)
        rows = -(-call.heads // call.layer.kv_heads * call.queries // ROW_TILE)
        counters = call.batch * call.layer.kv_heads * rows
        if self._space.numel() < size:
            self._space = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self._arrivals.numel() < counters:
            self._arrivals = torch.zeros(counters, dtype=torch.int32, device=self.device)
        self.where = self._space.data_ptr(), self._arrivals.data_ptr()


@functools.lru_cache(maxsize=1024)
def _shared_tables(description, device):
    """Tables of a rotation that is not dense, which all layers of a kind share, of any cache."""
    library, description = _cuda.load(), _cuda.LayerDescription.from_buffer_copy(description)
    made = []
    for side in (0, 1):
        dim = description.head_dim_v if side else description.head_dim_k
        matrix = torch.empty(dim, dim, dtype=torch.float32, device="cpu")
        library.halfbyte_cuda_rotation(description, side, matrix.data_ptr())
        made.append(_tables(library, description, device, side, matrix))
    return tuple(made)


def _tables(library, description, device, side, matrix):
    """(R, its transpose, R as encoding and as attention read it, its fast transform) on the device; None for none."""
    matrix = matrix.contiguous()
    fragments = []
    for kind, size in (
        ("fragments", library.halfbyte_cuda_fragment_bytes(description, side)),
        ("attend_fragments", library.halfbyte_cuda_attend_fragment_bytes(description, side)),
    ):
        made = torch.empty(size, dtype=torch.uint8, device="cpu")
        if size:
            getattr(library, f"halfbyte_cuda_{kind}")(description, side, matrix.data_ptr(), made.data_ptr())
        fragments.append(made.to(device) if size else None)
    if description.rotation == 0:
        return None, None, *fragments, None
    count = library.halfbyte_cuda_fast_bytes(description, side) // 4
    fast = torch.empty(count, dtype=torch.float32, device="cpu")
    if fast.numel():
        library.halfbyte_cuda_fast(description, side, fast.data_ptr())
    fast = fast.to(device) if fast.numel() else None
    return matrix.to(device), matrix.T.contiguous().to(device), *fragments, fast
