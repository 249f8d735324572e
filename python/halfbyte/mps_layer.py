"""MpsLayer: one layer's cache on an Apple GPU, by the rules of the C++ Layer: the same blocks, the same bytes.

Packing, attention and unpacking are Metal kernels; the rest is bookkeeping on the host and copies by PyTorch. Not yet
run on Apple hardware: see docs/metal.md for what was checked, and how.
"""

import ctypes

import torch

from . import _native
from .mps_kernels import Kernels, why_not
from .mps_pages import PagePool

BLOCK, PAGE = 16, 64  # tokens
UNDO_TOKENS = 64  # of a step of several tokens, that a crop may come back for
SIDES = (0, 1)  # K, V


class MpsLayer:
    """What Int4Layer asks of `_native.Layer`, on tensors of one Apple GPU; K and V come and go as tensors.

    K and V are [batch, kv_heads, tokens, head_dim] with channels in one piece. A step of several tokens, and one that
    completes a block, waits for the device to say that its values can be coded; a single token in between is only kept,
    and refused when its block is packed.
    """

    def __init__(self, device, kv_heads, head_dim_k, head_dim_v, dtype, recipe, layer_index=0, sliding_window=0):
        self.config = {"kv_heads": kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v, "dtype": dtype}
        self.config |= {"recipe": recipe, "layer_index": layer_index, "sliding_window": sliding_window}
        self._rules = _native.Layer(**self.config)  # refuses what the CPU refuses
        if reason := why_not(self.config):
            raise NotImplementedError(f"device mps: {reason}")
        self.device, self.recipe, self.kv_heads, self.sliding_window = device, recipe, kv_heads, sliding_window
        self.dims, self.dtype = (head_dim_k, head_dim_v), getattr(torch, dtype)
        self.sink = recipe.sink_tokens
        self.given_offset, self.lambdas, self.rotations = [None, None], [None, None], [None, None]
        self._record_past = False
        self.kernels = Kernels(self.config, device)
        self.pool = PagePool(kv_heads * self.kernels.page_head_bytes, device)
        self._start()

    def _start(self):
        self.batch = self.length = self.first = self.pages_dropped = 0
        self.packed_end = self.sink
        self.pages = []  # [batch]: numbers of pages in the pool; page i starts at token (pages_dropped + i) · 64
        self.table = None  # the same for kernels, made when asked for
        self.sinks = self.tail = self.before = self.undo = None  # pairs of tensors
        self.before_start = self.chunk_start = self.undo_start = 0
        self.offset = None  # pair of float32 [batch, kv_heads, head_dim], once ready
        self.counted = None  # float32 [batch, tokens seen] while the offset waits: 0 for padding

    def reset(self):
        for pages in self.pages:
            self.pool.release(pages)
        self._start()

    # ---- what the owner sets: float32 arrays in CPU memory by address, 0 for none

    def _given(self, kind, addresses, shapes, kept):
        if self.packed_end > self.sink:
            raise ValueError(f"set_{kind} after tokens were packed; set it before")
        getattr(self._rules, f"set_{kind}")(*addresses)
        return [
            _copy_of(address, shape).to(self.device) if address else old
            for address, shape, old in zip(addresses, shapes, kept, strict=True)
        ]

    def set_offset(self, k, v):
        """[kv_heads, head_dim] each."""
        self.given_offset = self._given("offset", (k, v), [(self.kv_heads, d) for d in self.dims], self.given_offset)

    def set_lambda(self, k, v):
        """[kv_heads, head_dim] each."""
        self.lambdas = self._given("lambda", (k, v), [(self.kv_heads, d) for d in self.dims], self.lambdas)

    def set_rotation(self, k, v):
        """[head_dim, head_dim] each."""
        self.rotations = self._given("rotation", (k, v), [(d, d) for d in self.dims], self.rotations)
        self.kernels.set_rotations(self.rotations)

    def record_past(self, on):
        self._record_past = on

    # ---- append

    @property
    def warm_up(self):
        """Tokens that stay raw until their mean is the offset."""
        wanted = self.recipe.offset and any(given is None for given in self.given_offset)
        return self.recipe.offset_tokens if wanted else 0

    def raw_start(self, position):
        """First token, behind the sinks, that a query at `position` sees raw when raw values still exist."""
        if position < self.warm_up:
            return self.sink
        return max(position // BLOCK * BLOCK - self.recipe.raw_window, self.sink)

    def append(self, k, v, counted=None, answered=False):
        """Adds tokens. counted: [batch, tokens], 0 for padding, which the offset leaves out.

        answered: their queries have attended already, so that a window may drop what only these would see; of a first
        chunk that is never packed.
        """
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        tokens = k.shape[2]
        self._check_ready(k)
        length = self.length + tokens
        filled = -(-self.packed_end // BLOCK) * BLOCK
        packed_from = self.packed_end
        packed_end = max(min(filled, max(length, self.sink)), self.raw_start(length - 1))
        raw = self._raw_with((k, v)) if packed_end > packed_from else None
        if raw is not None or tokens > 1:
            self._check_values(raw or (k, v))
        self.batch = self.batch or k.shape[0]
        self.pages = self.pages or [[] for _ in range(self.batch)]
        if not self._offset_ready:
            self._count(k, counted)
            if raw is not None:
                self._fix_offset((k, v))
        if raw is not None:
            self._keep_undo(raw, filled, packed_end, tokens)
            if answered and not self.length:
                self.pages_dropped = min(self._first_seen(length), packed_end) // PAGE
            self._pack(raw, max(packed_from, self.pages_dropped * PAGE), packed_end)
        self._keep_raw((k, v), raw, packed_from, packed_end, filled)
        self._drop_behind_window(length if answered else self.length)
        self.length = length

    def _check_ready(self, k):
        if self.batch and k.shape[0] != self.batch:
            raise ValueError(f"batch is {k.shape[0]}, but the cache holds {self.batch} sequences")
        if self.recipe.lambda_ and any(x is None for x in self.lambdas):
            raise ValueError("the recipe uses lambda, and set_lambda was not called")
        if self.recipe.rotation == "dense" and any(x is None for x in self.rotations):
            raise ValueError("the recipe's rotation is dense, and set_rotation was not called for K and V")

    @property
    def limit(self):
        """Largest magnitude that can be coded, as in src/append.cpp."""
        if self.recipe.k_bits == 32:
            return 3.4028235e38
        return 1e4 if self.recipe.scale_bits == 16 else 1e15

    def _check_values(self, pair):
        largest = torch.stack([x.abs().amax().float() for x in pair]).tolist()
        for name, value in zip("KV", largest, strict=True):
            if not value <= self.limit:
                raise ValueError(
                    f"{name} holds {value} among the tokens up to {self.length + pair[0].shape[2]}: it takes finite "
                    f"values up to {self.limit:g}; the cache is as before"
                )

    def _raw_with(self, chunk):
        """K and V from token min(packed_end, length) on: the tail, then the chunk."""
        if self.length <= self.packed_end or self.tail is None:
            return chunk
        held = self.length - self.packed_end
        return tuple(torch.cat([tail[:, :, :held], new], dim=2) for tail, new in zip(self.tail, chunk, strict=True))

    @property
    def _offset_ready(self):
        return self.offset is not None or not self.recipe.offset

    @property
    def has_offset(self):
        return self.offset is not None

    def _count(self, k, counted):
        if counted is None:
            counted = torch.ones(k.shape[0], k.shape[2], device=self.device)
        counted = counted.to(self.device, torch.float32)
        self.counted = counted if self.counted is None else torch.cat([self.counted[:, : self.length], counted], dim=1)

    def _fix_offset(self, chunk):
        """The mean of the tokens held now, or of the first offset_tokens of them."""
        total = self.length + chunk[0].shape[2]
        total = min(total, self.warm_up) if self.warm_up else total
        weights = self.counted[:, :total]
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
        share = (weights / weights.sum(1, keepdim=True))[:, None, :, None]
        self.offset = []
        for side in SIDES:
            if self.given_offset[side] is not None:
                self.offset.append(self.given_offset[side].expand(self.batch, -1, -1).contiguous())
                continue
            sinks = [] if self.sinks is None else [self.sinks[side][:, :, : min(self.sink, self.length)]]
            tail = [] if self.tail is None else [self.tail[side][:, :, : max(self.length - self.packed_end, 0)]]
            held = torch.cat([*sinks, *tail, chunk[side]], dim=2)[:, :, :total].float()
            self.offset.append((held * share).sum(2).contiguous())

    def _pack(self, raw, begin, end):
        own = self.pool.writable(self.pages, begin // PAGE - self.pages_dropped, -(-end // PAGE) - self.pages_dropped)
        if own:
            self.table = None
        self.kernels.encode(self, raw, min(begin, self.length), begin, end)

    def _keep_undo(self, raw, filled, packed_end, tokens):
        length = self.length + tokens
        self.undo, self.undo_start = None, max(filled, self.raw_start(max(length - UNDO_TOKENS - 1, 0)))
        if self._record_past and tokens > 1 and self.undo_start < packed_end:
            first = min(self.packed_end, self.length)
            self.undo = tuple(x[:, :, self.undo_start - first : packed_end - first].clone() for x in raw)

    def _keep_raw(self, chunk, raw, packed_from, packed_end, filled):
        """Sinks and tail with the chunk's tokens; `before` as queries of several tokens need it."""
        tokens = chunk[0].shape[2]
        length, held = self.length + tokens, max(self.length - packed_from, 0)
        if self.length < self.sink:
            self.sinks = self.sinks or self._make_raw(self.sink)
            for store, new in zip(self.sinks, chunk, strict=True):
                end = min(self.sink, length)
                store[:, :, self.length : end] = new[:, :, : end - self.length]
        before = self.tail if tokens > 1 and held else None
        if raw is not None or self.tail is None or before is not None:
            tail = self._make_raw(self.tail_capacity)
            if before is not None and raw is None:
                for new, old in zip(tail, before, strict=True):
                    new[:, :, :held] = old[:, :, :held]
        else:
            tail = self.tail
        source, first = (chunk, self.length) if raw is None else (raw, min(packed_from, self.length))
        begin = max(packed_end, first)
        if begin < length:
            for store, new in zip(tail, source, strict=True):
                store[:, :, begin - packed_end : length - packed_end] = new[:, :, begin - first : length - first]
        self.before, self.tail = before, tail
        if tokens == 1 or raw is None:
            self.undo = None
        self.before_start = min(filled, length) if packed_from % BLOCK else min(packed_from, self.length)
        self.chunk_start, self.packed_end = self.length, packed_end

    @property
    def tail_capacity(self):
        return BLOCK + max(self.recipe.raw_window, self.recipe.offset_tokens if self.recipe.offset else 0)

    def _make_raw(self, capacity):
        sizes = ((self.batch, self.kv_heads, capacity, dim) for dim in self.dims)
        return tuple(torch.zeros(size, dtype=self.dtype, device=self.device) for size in sizes)

    def _first_seen(self, position):
        """The first token that a query at `position` sees, as far as it is still held."""
        if not self.sliding_window or self._record_past:
            return self.first
        return max(self.first, position - self.sliding_window + 1)

    def _drop_behind_window(self, position):
        """Lets go of what no query at `position` or later sees."""
        if not self.sliding_window or self._record_past:
            return
        self.first = self._first_seen(position)
        if self._offset_ready and self.first >= self.sink:
            self.sinks = None
        gone = min(self.first, self.packed_end) // PAGE
        if gone > self.pages_dropped:
            for pages in self.pages:
                self.pool.release(pages[: gone - self.pages_dropped])
                del pages[: gone - self.pages_dropped]
            self.pages_dropped, self.table = gone, None

    # ---- attend, dequantize

    def page_table(self):
        """int64 [batch, pages]: where each page starts in the pool, in bytes; of at least one page a sequence."""
        if self.table is None:
            rows = [[page * self.pool.page_bytes for page in pages] or [0] for pages in self.pages]
            self.table = torch.tensor(rows, dtype=torch.int64).to(self.device)
        return self.table

    def raw_parts(self, chunk):
        """[(K and V, position of their first token, begin, end, whether sinks)] for the newest tokens' queries."""
        parts, sink = [], min(self.sink, self.length)
        if self.sinks is not None:
            parts.append((self.sinks, 0, 0, sink, True))
        if chunk is None:
            parts.append((self.tail, self.packed_end, self.packed_end, self.length, False))
        else:
            if self.before is not None:
                parts.append((self.before, self.before_start, self.before_start, self.chunk_start, False))
            parts.append((chunk, self.chunk_start, max(self.chunk_start, sink), self.length, False))
        return [part for part in parts if part[2] < part[3]]

    def attend(self, query, out, scale, chunk, mask, softcap, sinks, exact=True):
        """query [batch, heads, queries, head_dim] of the newest tokens to out [batch, queries, heads, head_dim_v].

        chunk: (K, V) as the last append got them, where queries are several. mask: bool [batch, 1, queries, tokens] of
        the newest tokens, or None; softcap: 0 for none; sinks: float32 [heads] or None. exact: float32 throughout, as
        these kernels compute in any case.
        """
        queries = query.shape[2]
        if queries > 1 and self.chunk_start + queries != self.length:
            raise ValueError(f"queries is {queries}, but the last append held {self.length - self.chunk_start} tokens")
        kept, chunk = (self.packed_end, None) if queries == 1 else (self.before_start, chunk)
        self.kernels.attend(self, query, out, scale, self.raw_parts(chunk), kept, mask, softcap, sinks)

    def unpack(self, tokens, dtype):
        """The newest `tokens` tokens as K, V [batch, kv_heads, tokens, head_dim] of a dtype."""
        begin = max(self.length - tokens, self.first)
        shape = self.batch, self.kv_heads, self.length - begin
        packed = [torch.empty(*shape, dim, device=self.device) for dim in self.dims]
        first = max(begin, self.sink)
        if first < self.packed_end:
            self.kernels.decode(self, packed, begin, first, self.packed_end)
        out = [x.to(dtype) for x in packed]
        for pair, start, end in (
            (self.sinks, 0, min(self.sink, self.length)),
            (self.tail, self.packed_end, self.length),
        ):
            lo = max(start, begin)
            if pair is not None and lo < end:
                for to, raw in zip(out, pair, strict=True):
                    to[:, :, lo - begin : end - begin] = raw[:, :, lo - start : end - start]
        return out

    # ---- crop, select, copy

    def crop(self, length):
        if length >= self.length:
            return
        if length == 0:
            self.reset()
            return
        if self.first > 0 and length < self.first + self.sliding_window - 1:
            raise ValueError(
                f"crop to {length} tokens, but a sliding layer has dropped the tokens before {self.first}, which the "
                "next query would see; call record_past first"
            )
        self._restore_raw(length)
        self.length = length
        self.packed_end = max(min(self.packed_end, length), self.sink)
        self.chunk_start, self.before, self.undo = length, None, None
        if self.packed_end == self.sink and self.recipe.offset:
            self.offset = None
            if self.counted is not None:
                self.counted = self.counted[:, :length]
        kept = max(-(-self.packed_end // PAGE) if self.packed_end > self.sink else 0, self.pages_dropped)
        for pages in self.pages:
            self.pool.release(pages[kept - self.pages_dropped :])
            del pages[kept - self.pages_dropped :]
        self.table = None

    def _restore_raw(self, length):
        """Makes raw again what the newest step packed and the tokens up to `length` would have raw."""
        begin = self.raw_start(length - 1)
        if self.undo is None or not self.undo_start <= begin < self.packed_end or length <= begin:
            return
        tail = self._make_raw(self.tail_capacity)
        middle = min(length, self.packed_end)
        for new, undo, old in zip(tail, self.undo, self.tail, strict=True):
            new[:, :, : middle - begin] = undo[:, :, begin - self.undo_start : middle - self.undo_start]
            if length > middle:
                new[:, :, middle - begin : length - begin] = old[:, :, : length - middle]
        self.tail, self.packed_end = tail, begin

    def select(self, rows):
        if not rows or not all(0 <= row < self.batch for row in rows):
            raise ValueError(f"select: got {rows}; takes one or more of the {self.batch} sequences")
        index = torch.tensor(rows, device=self.device)
        new = [list(self.pages[row]) for row in rows]
        for pages in new:
            self.pool.hold(pages)
        for pages in self.pages:
            self.pool.release(pages)
        self.pages, self.table, self.batch = new, None, len(rows)
        self.before, self.undo, self.chunk_start = None, None, self.length
        for name in ("sinks", "tail", "offset"):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(x.index_select(0, index) for x in getattr(self, name)))
        if self.counted is not None:
            self.counted = self.counted.index_select(0, index)

    def copy(self):
        """A layer of its own; pages are shared until either writes to them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.pages = [list(pages) for pages in self.pages]
        for pages in other.pages:
            self.pool.hold(pages)
        for name in ("sinks", "tail"):  # written to in place
            if getattr(self, name) is not None:
                setattr(other, name, tuple(x.clone() for x in getattr(self, name)))
        return other

    # ---- save and load: the parts of _native.Layer

    def save(self):
        """As _native.Layer.save; that layer also clears what cropped tokens have left behind."""
        numbers = {}
        table = [numbers.setdefault(page, len(numbers)) for pages in self.pages for page in pages]
        raw = [self._raw_bytes(side) for side in SIDES]
        parts = {"batch": self.batch, "length": self.length, "first": self.first, "packed_end": self.packed_end}
        parts |= {"pages_dropped": self.pages_dropped, "offset_ready": self._offset_ready}
        parts["page_table"] = torch.tensor(table, dtype=torch.int32).numpy()
        parts["pages"] = self.pool.bytes_of(list(numbers)).numpy()
        for side, name in enumerate("kv"):
            parts[f"raw_{name}"] = raw[side]
            for part, pair in (
                ("offset", self.offset),
                ("given_offset", self.given_offset),
                ("lambda", self.lambdas),
                ("rotation", self.rotations),
            ):
                x = None if pair is None else pair[side]
                parts[f"{part}_{name}"] = (torch.empty(0) if x is None else x.float().cpu().reshape(-1)).numpy()
        parts["counted"] = self._counted_bytes()
        return _native.Layer.load(**self.config, parts=parts).save()

    def _raw_bytes(self, side):
        """Sinks, or zeros when a window has passed them, and the tail."""
        parts, sinks = [], self.sinks or (self._make_raw(self.sink) if self.sink else None)
        for pair, count in ((sinks, min(self.sink, self.length)), (self.tail, self.length - self.packed_end)):
            if pair is not None and count > 0:
                parts.append(pair[side][:, :, :count])
        if not parts:
            return torch.empty(0, dtype=torch.uint8).numpy()
        return torch.cat(parts, dim=2).cpu().contiguous().view(torch.uint8).reshape(-1).numpy()

    def _counted_bytes(self):
        tokens = self.tail_capacity + self.sink
        kept = torch.ones(self.batch, tokens, dtype=torch.uint8)
        if self.counted is not None:
            n = min(tokens, self.counted.shape[1], self.warm_up or tokens)
            kept[:, :n] = self.counted[:, :n].cpu().to(torch.uint8)
        return kept.reshape(-1).numpy() if self.recipe.offset else kept[:, :0].reshape(-1).numpy()

    @classmethod
    def load(cls, device, parts, **config):
        """The layer that `parts` were saved from, on `device`. ValueError if they are damaged."""
        parts = _native.Layer.load(**config, parts=parts).save()
        layer = cls(device, **config)
        tensors = {name: torch.from_numpy(x) for name, x in parts.items() if hasattr(x, "dtype")}

        def pair_of(kind, *shape):
            pair = [tensors[f"{kind}_{name}"] for name in "kv"]
            return [x.view(*shape, d).to(device) if x.numel() else None for x, d in zip(pair, layer.dims, strict=True)]

        layer.given_offset, layer.lambdas = pair_of("given_offset", -1), pair_of("lambda", -1)
        if config["recipe"].rotation == "dense":
            layer.rotations = pair_of("rotation", -1)
            layer.kernels.set_rotations(layer.rotations)
        for name in ("batch", "length", "first", "packed_end", "pages_dropped"):
            setattr(layer, name, parts[name])
        if config["recipe"].offset and parts["offset_ready"]:
            layer.offset = pair_of("offset", layer.batch, layer.kv_heads)
        layer._fill(tensors)
        return layer

    def _fill(self, tensors):
        """Pages and raw tokens from what save gave."""
        pages = self.pool.add(tensors["pages"])
        table = tensors["page_table"].view(self.batch, -1).tolist()
        self.pages = [[pages[number] for number in row] for row in table]
        for row in self.pages:
            self.pool.hold(row)
        if tensors["counted"].numel():
            self.counted = tensors["counted"].view(self.batch, -1)[:, : self.length].to(self.device, torch.float32)
        self.chunk_start = self.length
        sink, tail = min(self.sink, self.length), max(self.length - self.packed_end, 0)
        self.tail = self._make_raw(self.tail_capacity)
        self.sinks = self._make_raw(self.sink) if self.sink else None
        for side, name in enumerate("kv"):
            raw = tensors[f"raw_{name}"].view(self.dtype)
            raw = raw.view(self.batch, self.kv_heads, sink + tail, self.dims[side]).to(self.device)
            if sink:
                self.sinks[side][:, :, :sink] = raw[:, :, :sink]
            self.tail[side][:, :, :tail] = raw[:, :, sink:]

    @property
    def visible(self):
        return self.length - self.first

    @property
    def packed_tokens(self):
        return max(self.packed_end - max(self.sink, self.pages_dropped * PAGE), 0)

    @property
    def nbytes(self):
        """Bytes held: pages with spare ones, raw tokens, offsets, the tables of the rotations."""
        pairs = (self.sinks, self.tail, self.before, self.undo, self.offset, self.given_offset, self.lambdas)
        tensors = [x for pair in pairs if pair is not None for x in pair if x is not None]
        tensors += [x for x in (self.table, self.counted) if x is not None]
        held = self.pool.bytes_held(self.pages)
        return held + self.kernels.nbytes + sum(x.numel() * x.element_size() for x in tensors)


def _copy_of(address, shape):
    """A copy of a float32 array in CPU memory."""
    array = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.frombuffer(array, dtype=torch.float32).view(shape).clone()
