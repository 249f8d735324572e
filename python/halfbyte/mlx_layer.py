"""MetalLayer: one layer's cache as MLX arrays, packed and attended to by the Metal kernels.

Not yet run on Apple hardware. The rules are those of the C++ Layer: the same blocks, the same bytes. MLX arrays do not
change, so that what a kernel writes is an output: the pages that a call touches come out of it alone, as zeros but for
the new codes, and are merged into the layer's pages by an update of a slice, which MLX does in place as long as nothing
else holds the array.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import numpy as np

from . import _native, metal, mlx_metal
from .gpu_kernels import BLOCK_TOKENS, DTYPES, LARGEST, ONE_OFFSET, PAGE_TOKENS, ROTATIONS

CORES = 8  # of the GPU, which MLX does not tell
LEAST = 8  # elements of an array that MLX puts in device memory, where kernels look
SMALLEST = 4  # pages of a new layer
SIDES = (0, 1)  # K, V


def has_metal() -> bool:
    """Whether MLX computes on a GPU with Metal unless told otherwise."""
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def why_not(head_dim_k, head_dim_v, recipe) -> str | None:
    """Why MLX's default device has no kernels for such a layer, or None."""
    if not has_metal():
        return "MLX's default device is not a GPU with Metal"
    return metal.why_not(head_dim_k, head_dim_v, recipe)


@functools.cache
def _kernel(name):
    return mx.fast.metal_kernel(**mlx_metal.kernels()[f"halfbyte_{name}"]._asdict())


def _run(name, threads, group, inputs, outputs, init_value=None):
    """A kernel's outputs, in its order. inputs: {name: array, numbers or None}; outputs: {name: (shape, dtype)}."""
    kernel = mlx_metal.kernels()[f"halfbyte_{name}"]
    return _kernel(name)(
        inputs=[_in_device_memory(inputs[key]) for key in kernel.input_names],
        output_shapes=[outputs[key][0] for key in kernel.output_names],
        output_dtypes=[outputs[key][1] for key in kernel.output_names],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        init_value=init_value,
    )


def _in_device_memory(x):
    """An array of LEAST elements or more; None: something to bind where nothing is read."""
    if x is None:
        return _nothing()
    if isinstance(x, list):
        x = mx.array(np.array(x + [0] * (LEAST - len(x)), np.int64 if type(x[0]) is int else np.float32))
    return x if x.size >= LEAST else mx.concatenate([x.reshape(-1), mx.zeros(LEAST - x.size, x.dtype)])


@functools.cache
def _nothing():
    return mx.zeros(LEAST)


def _strides(x):
    """Of a contiguous [batch, heads, tokens, channels]."""
    _, heads, tokens, channels = x.shape
    return [heads * tokens * channels, tokens * channels, channels]


class Pages:
    """The pages of some sequences, uint8 [batch, pages, bytes of a page]; they grow by a quarter, which copies them."""

    def __init__(self, batch, kv_heads, recipe, dim):
        self.head_bytes = metal.page_head_bytes(recipe, dim)
        self.tokens = np.tile(_token_of_byte(recipe, dim, self.head_bytes), kv_heads)  # of each byte of a page
        self.bytes = mx.zeros((batch, 0, len(self.tokens)), mx.uint8)
        self.first = 0  # number of the page that lies first
        self.dropped = 0  # pages before this one are not needed
        self.table = None

    def make_room(self, end):
        """For pages up to `end`. Zeros: kernels read whole blocks, and what they mask must be numbers."""
        batch, held, page_bytes = self.bytes.shape
        if end <= self.first + held:
            return
        kept = self.bytes[:, self.dropped - self.first :]
        more = max(end - self.dropped - kept.shape[1], SMALLEST, kept.shape[1] // 4)
        self.bytes = mx.concatenate([kept, mx.zeros((batch, more, page_bytes), mx.uint8)], axis=1)
        self.first = self.dropped
        self.table = _table(*self.bytes.shape)

    def merge(self, first, *parts):
        """Adds bytes [batch, pages, page bytes] from page `first` on to places that are zero."""
        here = slice(first - self.first, first - self.first + parts[0].shape[1])
        self.bytes[:, here] = functools.reduce(mx.bitwise_or, parts, self.bytes[:, here])

    def crop(self, token):
        """Makes zero what tokens from `token` on have left."""
        page = max(token // PAGE_TOKENS - self.first, 0)
        tail = self.bytes[:, page:]
        if tail.shape[1]:
            numbers = (self.first + page + np.arange(tail.shape[1]))[:, None] * PAGE_TOKENS + self.tokens
            self.bytes[:, page:] = mx.where(mx.array(numbers < token), tail, mx.array(0, mx.uint8))

    def between(self, begin, end):
        return self.bytes[:, begin - self.first : end - self.first]


def _table(batch, pages, page_bytes):
    """Where each page starts, in bytes: int64 [batch, pages]."""
    return mx.array(np.arange(batch * pages, dtype=np.int64).reshape(batch, pages) * page_bytes)


def _token_of_byte(recipe, dim, head_bytes):
    """The token in its page that each byte of a KV head's part belongs to: docs/format.md. Of padding: any."""
    codes, scales, dim = [], [], metal.padded(dim)
    for is_k, bits, group in ((True, recipe.k_bits, recipe.k_group), (False, recipe.v_bits, recipe.v_group)):
        at = np.arange(BLOCK_TOKENS * dim * bits // 8)
        codes.append(at % 64 // 4 if is_k else at // 64 % 4 * 4 + at % 4)
        groups = 1 if group == 0 else -(-dim // min(group, dim))
        scales.append(np.tile(np.repeat(np.arange(BLOCK_TOKENS), recipe.scale_bits // 8), groups))
    blocks = [np.concatenate(part) + BLOCK_TOKENS * i for part in (codes, scales) for i in range(4)]
    tokens = np.concatenate(blocks)
    return np.concatenate([tokens, np.zeros(head_bytes - len(tokens), tokens.dtype)])


class MetalLayer:
    """What Int4KVCache asks of a layer, for recipes without lambda and dense rotations and those without why_not.

    K, V and queries are [batch, heads, tokens, head_dim]. Nothing here waits for the device but `save` and `failed`.
    """

    def __init__(self, batch, kv_heads, head_dim_k, head_dim_v, dtype, recipe, layer_index=0, sliding_window=0):
        self.config = {"kv_heads": kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v, "dtype": dtype}
        self.config |= {"recipe": recipe, "layer_index": layer_index, "sliding_window": sliding_window}
        _native.Layer(**self.config)  # refuses what the CPU refuses
        self.batch, self.kv_heads, self.dim, self.recipe, self.window = (
            batch,
            kv_heads,
            head_dim_k,
            recipe,
            sliding_window,
        )
        self.dtype, self.sink = getattr(mx, dtype), recipe.sink_tokens
        self.rotation = mx.array(metal.rotation_table(recipe, layer_index, self.dim))
        self.pages = Pages(batch, kv_heads, recipe, self.dim)
        self.length = self.first = self.chunk_start = self.before_start = 0
        self.packed_end = self.sink
        self.offset = None  # (K, V) float32 [batch, kv_heads, head_dim], once there is one
        self.sinks = self.tail = self.before = None  # raw (K, V): of the first tokens, and from packed_end on
        self.flags = ()  # of the newest packing, int32 [1]: not 0 where a value can not be coded

    # ---- append

    @property
    def warm_up(self):
        return self.recipe.offset_tokens if self.recipe.offset else 0

    def raw_start(self, position):
        """First token, behind the sinks, that a query at `position` sees raw when raw values still exist."""
        if position < self.warm_up:
            return self.sink
        return max(position // BLOCK_TOKENS * BLOCK_TOKENS - self.recipe.raw_window, self.sink)

    def append(self, k, v):
        """Adds tokens. ValueError for a value that can not be coded, once the next block is packed after it."""
        new, old, packed_from = (k, v), self.length, self.packed_end
        length = old + k.shape[2]
        filled = -(-packed_from // BLOCK_TOKENS) * BLOCK_TOKENS
        packed_end = max(min(filled, max(length, self.sink)), self.raw_start(length - 1))
        self.chunk_start, self.before_start = old, min(packed_from, old)
        if packed_from % BLOCK_TOKENS:
            self.before_start = min(filled, length)  # those tokens exist packed only
        self.before = (packed_from, self.tail) if length > old + 1 and old > packed_from else None
        if old < self.sink:
            self.sinks = [mx.contiguous(x) for x in _joined(self.sinks, [x[:, :, : self.sink - old] for x in new])]
        raw_from = min(packed_from, old)
        raw = _joined(self.tail if old > packed_from else None, new)  # from raw_from on
        if packed_end > packed_from:
            if self.recipe.offset and self.offset is None:
                self._fix_offset(raw_from, raw, length)
            self._drop_behind_window(old)
            self._pack(raw, raw_from, max(packed_from, self.pages.dropped * PAGE_TOKENS), packed_end)
        elif self.window:
            self._drop_behind_window(old)
        self.tail = [mx.contiguous(x[:, :, packed_end - raw_from :]) for x in raw] if length > packed_end else None
        self.length, self.packed_end = length, packed_end

    def _fix_offset(self, raw_from, raw, length):
        """The mean of all tokens, or of the first offset_tokens of them."""
        total = min(length, self.warm_up) if self.warm_up else length
        held = _joined([x[:, :, :raw_from] for x in self.sinks], raw) if raw_from else raw
        self.offset = [x[:, :, :total].astype(mx.float32).mean(axis=2) for x in held]

    def _pack(self, raw, raw_from, begin, end):
        if begin >= end:
            return
        self._check()
        first, last = begin // PAGE_TOKENS, -(-end // PAGE_TOKENS)
        shape = self.batch, last - first, self.pages.bytes.shape[2]
        parts = [self._encode(side, raw[side], raw_from, begin, end, first, shape) for side in SIDES]
        self.pages.make_room(last)
        self.pages.merge(first, *(part[0] for part in parts))
        self.flags = tuple(part[1] for part in parts)

    def _encode(self, side, x, data_first, begin, end, first_page, shape):
        """(bytes [batch, pages, page bytes] with the codes and scales of one side, whether a value was bad)."""
        x = mx.contiguous(x)
        numbers = [*self._numbers(shape[1], first_page), int(side == 0), begin, end - begin, data_first, *_strides(x)]
        numbers += [int(self.offset is not None), 0, *ONE_OFFSET]
        given = {"numbers": numbers, "limit": [LARGEST[self.recipe.scale_bits]], "data": x, "rotation": self.rotation}
        given |= {"offset": self.offset and self.offset[side], "lambda": None, "table": _table(*shape)}
        name = f"encode_d{self.dim}_int{self._bits(side)}"
        threads = metal.code_threads(self.dim, self.batch * self.kv_heads * (end - begin))
        outputs = {"pool": (shape, mx.uint8), "bad": ((1,), mx.int32)}
        return _run(name, threads, metal.CODE_THREADS, given, outputs, init_value=0)

    def _bits(self, side):
        return self.recipe.v_bits if side else self.recipe.k_bits

    def _numbers(self, table_stride, first_page):
        """LayerNumbers of src/gpu/arguments.h."""
        recipe = self.recipe
        numbers = [self.batch, self.kv_heads, DTYPES[self.config["dtype"]], ROTATIONS[recipe.rotation]]
        numbers += [recipe.k_bits, recipe.k_group, recipe.v_bits, recipe.v_group, recipe.scale_bits]
        return [*numbers, int(recipe.search), int(recipe.signed_scale), table_stride, first_page]

    @property
    def failed(self):
        """Whether a value could not be coded when blocks were packed last; waits until they are."""
        return any(flag.item() for flag in self.flags)

    def _check(self):
        if self.failed:
            raise ValueError(
                f"K or V held a value among the tokens up to {self.length} that can not be coded: takes finite ones up "
                f"to {LARGEST[self.recipe.scale_bits]:g}; start again with a new cache"
            )

    def _drop_behind_window(self, position):
        """Lets go of what no query at `position` or later sees; pages when there has to be room for others."""
        if not self.window:
            return
        self.first = max(self.first, position - self.window + 1)
        if self.first >= self.sink and (self.offset is not None or not self.recipe.offset):
            self.sinks = None
        self.pages.dropped = max(self.pages.dropped, min(self.first, self.packed_end) // PAGE_TOKENS)

    # ---- attend, unpack

    def _raw_spans(self):
        """[((K, V), position at their start, begin, end, are sinks)] of the tokens held raw."""
        spans = [] if self.sinks is None else [(self.sinks, 0, 0, min(self.sink, self.length), 1)]
        if self.length > self.packed_end:
            spans.append((self.tail, self.packed_end, self.packed_end, self.length, 0))
        return spans

    def _spans_of_chunk(self, chunk):
        """The same for the queries of the newest tokens, whose K and V are `chunk`."""
        spans = [] if self.sinks is None else [(self.sinks, 0, 0, min(self.sink, self.length), 1)]
        if self.before is not None and self.before_start < self.chunk_start:
            first, pair = self.before
            spans.append((pair, first, self.before_start, self.chunk_start, 0))
        begin = max(self.chunk_start, min(self.sink, self.length))
        if begin < self.length:
            spans.append((chunk, self.chunk_start, begin, self.length, 0))
        return spans

    def attend(self, queries, chunk, scale, mask=None, sinks=None):
        """Of the newest tokens, whose (K, V) are `chunk`. mask: uint8 [batch, queries, tokens] of the newest tokens."""
        batch, heads, count, dim = queries.shape
        queries = mx.contiguous(queries)
        one = count == 1
        spans = self._raw_spans() if one else self._spans_of_chunk([mx.contiguous(x) for x in chunk])
        begin, end = self._packed_range(count, mask)
        segments = batch * self.kv_heads * -(-heads // self.kv_heads * count // metal.TILE_ROWS)
        splits = metal.splits_of(segments, begin, end, CORES)
        has_offset = int(self.offset is not None)
        numbers = [*self._numbers(self.pages.bytes.shape[1], self.pages.first), heads, count, 1]
        numbers += [self.length, self.first, self.window, self.sink, self.packed_end, self.recipe.raw_window]
        numbers += [self.warm_up, self.packed_end if one else self.before_start, begin, end, splits]
        numbers += _strides(queries) * 2
        numbers += [0, 0, 0, 0] if mask is None else [1, mask.shape[2], mask.shape[1] * mask.shape[2], mask.shape[2]]
        numbers += [int(sinks is not None), has_offset, has_offset, 0, 0, len(spans)]
        raw = {}
        for i in range(metal.MAX_RAW):
            pair, *where = spans[i] if i < len(spans) else ((None, None),)
            raw |= {f"k{i}": pair[0], f"v{i}": pair[1]}
            numbers += [*_strides(pair[0]), *_strides(pair[1]), *where] if where else metal.NO_RAW
        given = {"numbers": [*numbers, *metal.NO_TURN], "reals": [float(scale), 0.0], "q": queries, "mask": mask} | raw
        given |= {"rotation_k": self.rotation, "rotation_v": self.rotation, "sinks": sinks, "waves": None}
        given |= {f"offset_{name}": self.offset and self.offset[side] for side, name in enumerate("kv")}
        given |= {"inverse_lambda_k": None, "inverse_lambda_v": None, "partials": None}
        if splits:
            given |= {"table": self.pages.table, "pool": self.pages.bytes}
            size = segments * splits, metal.TILE_ROWS * (metal.padded(dim) + 2)
            (given["partials"],) = _run(
                f"attend_d{dim}", segments * splits * metal.ATTEND_THREADS, metal.ATTEND_THREADS, given,
                {"partials": (size, mx.float32)},
            )  # fmt: skip
        outputs = {"out": (queries.shape, queries.dtype)}
        return _run(f"finish_d{dim}", segments * metal.FINISH_THREADS, metal.FINISH_THREADS, given, outputs)[0]

    def _packed_range(self, queries, mask):
        """[begin, end) of the packed tokens that any of the newest `queries` tokens sees."""
        begin = self.first
        if mask is not None:
            begin = max(begin, self.length - mask.shape[2])
        elif self.window:
            begin = max(begin, self.length - queries + 1 - self.window)
        return max(begin, self.sink), min(self.length, self.packed_end)

    def unpack(self, tokens):
        """The newest `tokens` tokens as (K, V) of the layer's dtype."""
        begin = max(self.length - tokens, self.first)
        packed_from = max(begin, self.sink)
        out = []
        for side in SIDES:
            parts = [] if self.sinks is None else [self.sinks[side][:, :, begin:]]
            if packed_from < self.packed_end:
                parts.append(self._decode(side, packed_from, self.packed_end).astype(self.dtype))
            if self.length > self.packed_end:
                parts.append(self.tail[side][:, :, max(begin - self.packed_end, 0) :])
            out.append(mx.concatenate(parts, axis=2))
        return out

    def _decode(self, side, begin, end):
        numbers = [*self._numbers(self.pages.bytes.shape[1], self.pages.first), int(side == 0), begin, end - begin]
        numbers += [begin, end - begin, int(self.offset is not None), 0, *ONE_OFFSET]
        given = {"numbers": numbers, "rotation": self.rotation, "offset": self.offset and self.offset[side]}
        given |= {"inverse_lambda": None, "table": self.pages.table, "pool": self.pages.bytes}
        threads = metal.code_threads(self.dim, self.batch * self.kv_heads * (end - begin))
        outputs = {"out": ((self.batch, self.kv_heads, end - begin, self.dim), mx.float32)}
        return _run(f"decode_d{self.dim}_int{self._bits(side)}", threads, metal.CODE_THREADS, given, outputs)[0]

    # ---- crop, copy, save

    def crop(self, length):
        """Forgets the tokens from `length` on, which is not 0. What was packed stays packed."""
        if self.first and length < self.first + self.window - 1:
            raise ValueError(f"crop to {length} tokens, but the window has dropped those before {self.first}")
        packed_end = max(min(self.packed_end, length), self.sink)
        if self.sinks is not None:
            self.sinks = [x[:, :, :length] for x in self.sinks]
        if length <= self.packed_end:
            self.tail = None
        else:
            self.tail = [mx.contiguous(x[:, :, : length - self.packed_end]) for x in self.tail]
        self.length, self.packed_end = length, packed_end
        self.chunk_start = self.before_start = length
        self.before = None
        self.pages.crop(packed_end if packed_end > self.sink else 0)
        if packed_end == self.sink:  # with nothing packed, the offset waits again
            self.offset = None

    def copy(self):
        """A layer of its own. The first of the two to pack a block copies the pages."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.pages = object.__new__(Pages)
        other.pages.__dict__.update(self.pages.__dict__)
        other.pages.bytes = mx.array(self.pages.bytes)  # another object: an update of a slice names it anew
        return other

    @property
    def visible(self):
        return self.length - self.first

    @property
    def nbytes(self):
        """Bytes held: pages with their slack, raw tokens, offsets."""
        pairs = [pair for pair in (self.sinks, self.tail, self.offset) if pair is not None]
        return self.pages.bytes.nbytes + sum(x.nbytes for pair in pairs for x in pair)

    def save(self):
        """As _native.Layer.save."""
        self._check()
        begin, end = self.pages.dropped, -(-self.packed_end // PAGE_TOKENS) if self.packed_end > self.sink else 0
        end = max(begin, end)
        parts = {"batch": self.batch, "length": self.length, "first": self.first, "packed_end": self.packed_end}
        parts |= {"pages_dropped": begin, "offset_ready": self.offset is not None or not self.recipe.offset}
        parts["page_table"] = np.arange(self.batch * (end - begin), dtype=np.int32)
        parts["pages"] = np.array(self.pages.between(begin, end)).reshape(-1)
        parts["frequencies"], parts["interleaved"] = np.zeros(0, np.float32), False
        for side, name in enumerate("kv"):
            parts[f"raw_{name}"] = self._raw_bytes(side)
            offset = [] if self.offset is None else self.offset[side]
            parts[f"offset_{name}"] = np.array(offset, np.float32).reshape(-1)
            parts |= {f"{kind}_{name}": np.zeros(0, np.float32) for kind in ("given_offset", "lambda", "rotation")}
        parts["counted"] = np.zeros(0, np.uint8)  # no padding
        return _native.Layer.load(**self.config, parts=parts).save()

    def _raw_bytes(self, side):
        parts = [pair[side] for pair, *_ in self._raw_spans()]
        if self.sinks is None and self.sink and self.length:  # a window has passed them
            parts.insert(0, mx.zeros((self.batch, self.kv_heads, self.sink, self.dim), self.dtype))
        raw = mx.concatenate(parts, axis=2) if parts else mx.zeros(0, self.dtype)
        return np.array(raw.reshape(-1).view(mx.uint8))

    @classmethod
    def load(cls, parts, **config):
        """The layer that `parts` were saved from. ValueError if they are damaged."""
        parts = _native.Layer.load(**config, parts=parts).save()
        layer = cls(parts["batch"], **config)
        layer.length, layer.first, layer.packed_end = (parts[name] for name in ("length", "first", "packed_end"))
        layer.chunk_start = layer.before_start = layer.length
        layer.pages.dropped = layer.pages.first = parts["pages_dropped"]
        if parts["page_table"].size:
            table = parts["page_table"].reshape(layer.batch, -1)
            pages = parts["pages"].reshape(-1, len(layer.pages.tokens))[table]
            layer.pages.make_room(layer.pages.first + table.shape[1])
            layer.pages.merge(layer.pages.first, mx.array(pages))
        for name in "kv":
            raw = mx.array(parts[f"raw_{name}"]).view(layer.dtype).reshape(layer.batch, layer.kv_heads, -1, layer.dim)
            sink = min(layer.sink, layer.length)
            if sink and (layer.first < layer.sink or not parts["offset_ready"]):
                layer.sinks = [*(layer.sinks or []), raw[:, :, :sink]]
            if layer.length > layer.packed_end:
                layer.tail = [*(layer.tail or []), mx.contiguous(raw[:, :, sink:])]
            if layer.recipe.offset and parts["offset_ready"]:
                offset = mx.array(parts[f"offset_{name}"]).reshape(layer.batch, layer.kv_heads, layer.dim)
                layer.offset = [*(layer.offset or []), offset]
        return layer


def _joined(old, new):
    """Pairs of tokens, one after the other."""
    return list(new) if old is None else [mx.concatenate(pair, axis=2) for pair in zip(old, new, strict=True)]
