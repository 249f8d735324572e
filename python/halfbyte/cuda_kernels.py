"""The kernels of libhalfbyte_cuda for one layer: what they are told, their scratch memory, the tables of rotations."""

import ctypes
import functools

import torch

from . import _cuda

ROW_TILE = 8  # rows (query heads x queries) that one part of an attention kernel takes
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
ROTATIONS = ("identity", "srft", "srht", "dense")
LARGEST = {16: 1e4, 32: 1e15}  # codable magnitudes by scale_bits, as in the C++ Layer


def view(tensor):
    """A [batch, heads, tokens, channels] tensor for the library; channels lie in one piece."""
    return _cuda.View(tensor.data_ptr(), *tensor.stride()[:3])


class Kernels:
    """Launches on the current stream of a device. Nothing waits for it, so `failed` comes true some steps later."""

    def __init__(self, device, recipe, kv_heads, head_dim_k, head_dim_v, dtype, layer_index):
        self.device, self.recipe = device, recipe
        self._library = _cuda.load()
        self._description = _cuda.LayerDescription(
            kv_heads, head_dim_k, head_dim_v, DTYPES[dtype],
            recipe.k_bits, recipe.v_bits, recipe.k_group, recipe.v_group, recipe.scale_bits, recipe.search,
            recipe.signed_scale, ROTATIONS.index(recipe.rotation), recipe.seed, layer_index,
        )  # fmt: skip
        self.page_bytes = kv_heads * self._library.halfbyte_cuda_page_bytes(self._description)
        self._own_flag()

    def _own_flag(self):
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)  # which the device can write to
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
        """For a layer of its own; `bind` must follow."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._own_flag()
        other._failed.value = self._failed.value
        return other

    def rotations(self, dense):
        """Those of K and V as (R, its transpose, R in fragments); None for what there is not."""
        return rotation_tables(self._library, self._description, self.device, dense)

    def bind(self, batch, pages, rotations, offset, factors, **constants):
        """Describes what changes with pages, offset or batch alone; constants: fields of an attention call."""
        tables = []
        for side in (0, 1):
            held = *rotations[side], *offset[side], *factors[side]
            tables.append(_cuda.Tables(*(None if x is None else x.data_ptr() for x in held)))
        common = self._description, *tables, pages.described()
        self._encode, self._attend, self._decode = (
            kind(*common) for kind in (_cuda.Encode, _cuda.Attend, _cuda.Decode)
        )
        self._copy = _cuda.Copy(self._description)
        for call in (self._encode, self._attend, self._decode, self._copy):
            call.batch, call.device = batch, self.device.index
        self._encode.limit, self._encode.bad = LARGEST[self.recipe.scale_bits], self._flag.data_ptr()
        self._attend.causal = 1
        for name, value in constants.items():
            setattr(self._attend, name, value)
        self._q, self._out = self._attend.q, self._attend.out  # the structures inside, for writing to

    def _stream(self):
        return torch._C._cuda_getCurrentRawStream(
            self.device.index
        )  # current_stream() asks this, at ten times the cost

    def _launch(self, name, call):
        call.stream = self._stream()
        error = getattr(self._library, f"halfbyte_cuda_{name}")(call)
        if error:
            raise RuntimeError(f"CUDA: {self._library.halfbyte_cuda_error(error).decode()}")

    def encode(self, pair, data_first, begin, end):
        """Packs tokens [begin, end) of (K, V), which start at position data_first."""
        call = self._encode
        call.k, call.v = view(pair[0]), view(pair[1])
        call.data_first, call.first_token, call.tokens = data_first, begin, end - begin
        self._launch("encode", call)

    def copy_raw(self, pair, room, slot):
        """Copies (K, V) to where raw tokens are kept, from `slot` on."""
        call = self._copy
        call.k, call.v, call.tokens = view(pair[0]), view(pair[1]), pair[0].shape[2]
        call.k_to, call.v_to = (view(x[:, :, slot:]) for x in room)
        self._launch("copy", call)

    def decode(self, first_token, tokens, out_first, parts):
        """Unpacks tokens to float32 (K, V) [batch, kv_heads, tokens, head_dim] that start at position out_first."""
        call = self._decode
        call.first_token, call.tokens, call.out_first = first_token, tokens, out_first
        call.out_tokens, call.k, call.v = parts[0].shape[2], parts[0].data_ptr(), parts[1].data_ptr()
        self._launch("decode", call)

    def attend(self, query, out, scale, softcap, sinks, mask, counts, spans):
        """As CudaLayer.attend. counts: length, first, packed_end, kept; spans: (K, V, first, begin, end, are sinks)."""
        call, q, result = self._attend, self._q, self._out
        _, call.heads, call.queries, _ = query.shape
        call.scale, call.softcap = scale, softcap
        call.length, call.first, call.packed_end, call.kept = counts
        q.data, result.data = query.data_ptr(), out.data_ptr()
        q.batch_stride, q.head_stride, q.token_stride, _ = query.stride()
        result.batch_stride, result.token_stride, result.head_stride, _ = out.stride()
        call.sinks = None if sinks is None else sinks.data_ptr()
        call.mask = None
        if mask is not None:
            call.mask, call.mask_tokens = mask.data_ptr(), mask.shape[3]
            call.mask_batch_stride, call.mask_query_stride = mask.stride(0), mask.stride(2)
        for i, (k, v, *positions) in enumerate(spans):
            call.raw[i] = _cuda.Raw(view(k), view(v), *positions)
        call.n_raw = len(spans)
        call.space, call.arrivals = Scratch.of(self.device, self._stream()).addresses(self._library, call)
        self._launch("attend", call)


class Scratch:
    """Memory for attention's partial results. One for all layers that work on a stream, which take turns there."""

    _of = {}  # noqa: RUF012 - {(device index, stream): Scratch}

    def __init__(self, device):
        self.device = device
        self._sizes = {}  # of calls seen: (bytes, counters)
        self._space = self._arrivals = None

    @classmethod
    def of(cls, device, stream):
        key = device.index, stream
        if key not in cls._of:
            cls._of[key] = cls(device)
        return cls._of[key]

    def addresses(self, library, call):
        """(space, counters) for an attention call."""
        shape = call.batch, call.heads, call.queries, call.layer.kv_heads, call.layer.head_dim_v
        if shape not in self._sizes:
            batch, heads, queries, kv_heads, _ = shape
            counters = batch * kv_heads * -(-heads // kv_heads * queries // ROW_TILE)
            self._sizes[shape] = size = library.halfbyte_cuda_attend_space(call), counters
            if self._space is None or self._space.numel() < size[0]:
                self._space = torch.empty(size[0], dtype=torch.uint8, device=self.device)
            if self._arrivals is None or self._arrivals.numel() < size[1]:
                self._arrivals = torch.zeros(size[1], dtype=torch.int32, device=self.device)
            self._where = self._space.data_ptr(), self._arrivals.data_ptr()
        return self._where


def rotation_tables(library, description, device, dense):
    """For K and V (R, its transpose, R as the encoding kernel reads it), on the device; None for what there is not.

    dense: the matrices of a recipe that brings its own, or None for each side. Other tables are shared by all layers of
    a kind, of any cache.
    """
    if dense[0] is not None:
        return tuple(_tables(library, description, device, side, dense[side]) for side in (0, 1))
    return _shared_tables(bytes(description), device)


@functools.lru_cache(maxsize=1024)
def _shared_tables(description, device):
    library, description = _cuda.load(), _cuda.LayerDescription.from_buffer_copy(description)
    made = []
    for side in (0, 1):
        dim = description.head_dim_v if side else description.head_dim_k
        matrix = torch.empty(dim, dim)
        library.halfbyte_cuda_rotation(description, side, matrix.data_ptr())
        made.append(_tables(library, description, device, side, matrix))
    return tuple(made)


def _tables(library, description, device, side, matrix):
    fragments = torch.empty(library.halfbyte_cuda_fragment_bytes(description, side), dtype=torch.uint8)
    if fragments.numel():
        matrix = matrix.contiguous()
        library.halfbyte_cuda_fragments(description, side, matrix.data_ptr(), fragments.data_ptr())
    fragments = fragments.to(device) if fragments.numel() else None
    if description.rotation == 0:
        return None, None, fragments
    return matrix.to(device), matrix.T.contiguous().to(device), fragments
