"""GpuLayer: one layer's cache on a GPU, by the rules of the C++ Layer: the same blocks, the same bytes."""

import torch

from . import _native
from .gpu_kernels import BLOCK_TOKENS, NOTHING, PAGE_TOKENS, between, host_floats
from .gpu_turn import Turn

UNDO_TOKENS = 64  # how far behind its newest token a crop may find raw what an append of several has packed


class GpuLayer:
    """What Int4Layer asks of `_native.Layer`, on tensors of one GPU; K and V come and go as tensors.

    It keeps the books (counts in ints, raw tokens and offsets in tensors); `kernels`, the class of a kind of device,
    does what touches codes and has its own storage of pages. Copies of a layer share pages until either writes to them.
    """

    def __init__(self, kernels, device, **config):
        """config: as _native.Layer takes it. NotImplementedError where the device has no kernels for it."""
        self.config = {"layer_index": 0, "sliding_window": 0} | config
        self._rules = _native.Layer(**self.config)  # refuses what the CPU refuses
        if reason := kernels.why_not(device, self.config):
            raise NotImplementedError(f"device {device.type}: {reason}")
        self.device, self.recipe, self.kv_heads = device, config["recipe"], config["kv_heads"]
        self.dims, self.dtype = (config["head_dim_k"], config["head_dim_v"]), getattr(torch, config["dtype"])
        self.window, self.sink = self.config["sliding_window"], self.recipe.sink_tokens
        self.kernels = kernels(device, **self.config)
        self.takes_new = self.kernels.takes_new
        self._past_recorded = False
        self._take_given([None, None])
        self._factors = [(None, None)] * 2  # (lambda, 1 / lambda) of K and V [kv_heads, head_dim], if there are any
        self._dense = [None, None]  # a dense recipe's rotations, on the CPU
        self._turn = None  # how the offset of K follows RoPE
        self._clear()

    # ------------------------------------------------------------------------------------------------ state

    def _clear(self):
        self.batch = self.length = self.first = 0
        self.packed_end = self.sink  # [sinks, packed_end) is packed, [packed_end, length) raw in the tail
        self._pages, self._pages_dropped = self.kernels.pages(0), 0
        self._sinks = self._tail = None  # (K, V) [batch, kv_heads, capacity, head_dim]
        self._before = self._undo = None  # (first position, (K, V))
        self._before_start = self._chunk_start = 0
        self._offset = None  # of K and V, as kernels.offset_tables: mu, float32 [batch, kv_heads, head_dim], and more
        self._counted = None  # uint8 [batch, tokens that can be raw with nothing packed]: 0 for padding

    def reset(self):
        self.kernels.forgive()
        self._clear()

    def _start(self, batch):
        if self.recipe.lambda_ and (None, None) in self._factors:
            raise ValueError("the recipe uses lambda, and set_lambda was not called")
        if self.recipe.rotation == "dense" and any(x is None for x in self._dense):
            raise ValueError("the recipe's rotation is dense, and set_rotation was not called for K and V")
        self.batch, self._pages = batch, self.kernels.pages(batch)
        capacity = BLOCK_TOKENS + max(self.recipe.raw_window, self.recipe.offset_tokens if self.recipe.offset else 0)
        self._tail = self._raw_room(capacity)
        if self.sink:
            self._sinks = self._raw_room(self.sink)
        if self.recipe.offset:
            self._counted = torch.ones(batch, capacity + self.sink, dtype=torch.uint8, device=self.device)
        self._bind()

    def _raw_room(self, tokens):
        shape = self.batch, self.kv_heads, tokens
        return tuple(torch.empty(*shape, dim, dtype=self.dtype, device=self.device) for dim in self.dims)

    def _bind(self):
        """Tells the kernels of new pages, offsets or another batch."""
        self.kernels.bind(self.batch, self._pages, self._offset, self._factors, self._turn, self._warm_up)

    def _raw_start(self, position):
        """As Layer::State::raw_start."""
        if position < self._warm_up:
            return self.sink
        return max(position // BLOCK_TOKENS * BLOCK_TOKENS - self.recipe.raw_window, self.sink)

    def _check(self):
        """ValueError once the kernels have met a value that they can not code."""
        if self.kernels.failed:
            takes = "up to 10000, use scale_bits=32" if self.recipe.scale_bits == 16 else "up to 1e15"
            raise ValueError(
                "K or V of an earlier step hold a value that is not finite or too large to code (scale_bits="
                f"{self.recipe.scale_bits} codes values {takes}); the cache can not be used before reset()"
            )

    # ------------------------------------------------------------------------------------------------ append

    def append(self, k, v, counted=None, answered=False):
        """Adds K, V [batch, kv_heads, tokens, head_dim].

        counted: [batch, tokens], 0 for padding, which the offset leaves out. answered: no query of these tokens will
        attend here, so that a window may drop what only they see. Raises ValueError for values that can not be coded,
        before anything changes or in a later call: see the kernels' `refuse` and `failed`.
        """
        self._check()
        if self.batch and k.shape[0] != self.batch:
            raise ValueError(f"batch is {k.shape[0]}, but the cache holds {self.batch} sequences")
        k = k if k.stride(3) == 1 else k.contiguous()
        v = v if v.stride(3) == 1 else v.contiguous()
        old, packed_from, sink = self.length, self.packed_end, self.sink
        length, several = old + k.shape[2], k.shape[2] > 1
        filled = -(-packed_from // BLOCK_TOKENS) * BLOCK_TOKENS
        packed_end = max(min(filled, max(length, sink)), self._raw_start(length - 1))
        spans = [(old, length, (k, v))]
        if packed_end > packed_from:
            spans = [*self._raw_spans(), *spans]
            self.kernels.refuse([span for span in spans if span[1] > packed_from])
        elif several:
            self.kernels.refuse(spans)
        if not self.batch:
            self._start(k.shape[0])
        if counted is not None:
            self._note_padding(counted, length)
        self._before = self._undo = None
        self._chunk_start, self._before_start = old, min(packed_from, old)
        if packed_from % BLOCK_TOKENS:
            self._before_start = min(filled, length)  # those tokens exist packed only
        if several and old > packed_from:
            self._before = packed_from, self._tail
        if packed_end == packed_from and old >= sink:
            if self.window:
                self._drop_behind_window(old)
            self.kernels.copy_raw((k, v), self._tail, old - packed_from)
        else:
            self._pack_and_move(spans, packed_end, length, counted, answered)
        self.length, self.packed_end = length, packed_end
        if answered:
            self._drop_behind_window(length)

    def _raw_spans(self):
        """[(first, end, (K, V))] of the tokens held raw."""
        spans, sink = [], min(self.sink, self.length)
        if sink and self._sinks is not None:
            spans.append((0, sink, self._sinks))
        if self.length > self.packed_end:
            spans.append((self.packed_end, self.length, self._tail))
        return spans

    def _note_padding(self, counted, length):
        """Remembers which of the tokens that can be raw with nothing packed are padding, until there is an offset."""
        if self._counted is not None and self._offset is None:
            end = min(length, self._warm_up or self._counted.shape[1])
            if end > self.length:
                self._counted[:, self.length : end] = counted[:, : end - self.length]

    def _pack_and_move(self, spans, packed_end, length, counted, answered):
        """The append that packs blocks or fills sinks. spans: the raw tokens there are, or the new ones alone."""
        old, sink, packed_from = self.length, self.sink, self.packed_end
        if packed_end > packed_from:
            if self.recipe.offset and self._offset is None:
                self._fix_offset(spans, length, counted)
            first = packed_from
            if answered and not old and self.window and not self._past_recorded:
                # What no query will see is never packed.
                skipped = min(max(length - self.window + 1, 0), packed_end) // PAGE_TOKENS
                self._pages_dropped = self._pages.first = skipped
                first = max(first, skipped * PAGE_TOKENS)
            self._drop_behind_window(old)
            if self._pages.make_room(first, packed_end):
                self._bind()
            for begin, end, pair in spans:
                if max(begin, first) < min(end, packed_end):
                    self.kernels.encode(pair, begin, max(begin, first), min(end, packed_end))
        if self._past_recorded and length > old + 1:
            self._keep_undo(spans, packed_end, length)
        if sink and old < sink:
            self.kernels.copy_raw(between(spans, old, min(sink, length)), self._sinks, old)
        if self._before is not None or packed_end < old:  # the old tail is still read
            self._tail = self._raw_room(self._tail[0].shape[2])
        if length > packed_end:
            self.kernels.copy_raw(between(spans, packed_end, length), self._tail, 0)

    def _keep_undo(self, spans, packed_end, length):
        filled = -(-self.packed_end // BLOCK_TOKENS) * BLOCK_TOKENS
        start = max(filled, self._raw_start(max(length - UNDO_TOKENS - 1, 0)))
        if start < packed_end:
            self._undo = start, tuple(x.clone() for x in between(spans, start, packed_end))

    # ------------------------------------------------------------------------------------------------ offset

    def _fix_offset(self, spans, length, counted):
        total = min(length, self._warm_up) if self._warm_up else length
        weights = None
        if counted is not None or bool(self.length):
            new = torch.ones_like(self._counted[:, :1]).expand(-1, length - self.length) if counted is None else counted
            weights = torch.cat([self._counted[:, : self.length], new], 1)[:, :total].float()
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        means = self.kernels.means(spans, total, weights, self._turn, [given is None for given in self._given])
        for side, given in enumerate(self._given):
            if given is not None:
                mu = given.to(self.device).expand(self.batch, -1, -1).contiguous()
                means[side] = self.kernels.offset_tables(side, mu)
        self._offset = means
        self._bind()

    def _set_offsets(self, offsets):
        self._offset = [self.kernels.offset_tables(side, mu) for side, mu in enumerate(offsets)]
        self._bind()

    # ------------------------------------------------------------------------------------------------ pages

    @property
    def _pages_end(self):
        return -(-self.packed_end // PAGE_TOKENS) if self.packed_end > self.sink else 0

    def _drop_behind_window(self, position):
        """Lets go of pages that no query at `position` or later sees."""
        if not self.window or self._past_recorded:
            return
        self.first = max(self.first, position - self.window + 1)
        if self.first >= self.sink and (self._offset is not None or not self.recipe.offset):
            self._sinks = None
        gone = min(self.first, self.packed_end) // PAGE_TOKENS
        self._pages_dropped = max(self._pages_dropped, gone)
        if self._pages.drop(gone):
            self._bind()

    def reserve(self, batch, tokens):
        """Pages for `tokens` more tokens of `batch` sequences, at once."""
        if not self.batch:
            self._start(batch)
        if not self.window:
            self._pages.make_room(self.packed_end, self.packed_end + tokens)
            self._bind()

    # ------------------------------------------------------------------------------------------------ attend

    def attend(self, query, out, scale, chunk, mask, softcap, sinks, exact=False):
        """query [batch, heads, queries, head_dim] to out [batch, queries, heads, head_dim_v].

        chunk: (K, V) as the last append got them, where queries are several. mask: bool [batch, 1, queries, tokens] of
        the newest tokens, or None; softcap: 0 for none; sinks: float32 [heads] or None. exact: for kernels whose
        why_not takes it, which compute in float32 in any case.
        """
        query = query if query.stride(3) == 1 else query.contiguous()
        length, kept = self.length, self.packed_end
        sink, spans = min(self.sink, length), []
        if sink and self._sinks is not None:
            spans.append((self._sinks, 0, 0, sink, 1))
        if query.shape[2] == 1:
            if kept < length:
                spans.append((self._tail, kept, kept, length, 0))
        else:
            kept, chunk_start = self._before_start, self._chunk_start
            if (queries := query.shape[2]) != (added := length - chunk_start):
                raise ValueError(f"queries is {queries}, but the last append held {added} tokens")
            if self._before is not None and kept < chunk_start:
                first, pair = self._before
                spans.append((pair, first, kept, chunk_start, 0))
            begin = max(chunk_start, sink)
            if begin < length:
                spans.append((chunk, chunk_start, begin, length, 0))
        counts = length, self.first, self.packed_end, kept
        self.kernels.attend(query, out, scale, softcap, sinks, mask, counts, spans)

    def step(self, k, v, query, out, scale, chunk, mask, softcap, sinks):
        """`append` of a token and `attend` to it: one call of kernels that take it, where no token is packed."""
        old, packed = self.length, self.packed_end
        strides = q_strides, k_strides, v_strides = query.stride(), k.stride(), v.stride()
        packs = packed % BLOCK_TOKENS or self._raw_start(old) > packed
        if packs or old < self.sink or not q_strides[3] == k_strides[3] == v_strides[3] == 1:
            self.append(k, v)
            self.attend(query, out, scale, chunk, mask, softcap, sinks)
            return
        self._check()
        if self.window:
            self._drop_behind_window(old)
        self._before = self._undo = None
        self._chunk_start, self._before_start, self.length = old, packed, old + 1
        spans = [] if self._sinks is None else [(self._sinks, 0, 0, self.sink, 1)]
        spans.append((self._tail, packed, packed, old + 1, 0))
        counts = old + 1, self.first, packed, packed
        self.kernels.attend(query, out, scale, softcap, sinks, mask, counts, spans, (k, v), strides)

    def unpack(self, tokens, dtype):
        """The newest `tokens` tokens as K, V [batch, kv_heads, tokens, head_dim] of `dtype`."""
        self._check()
        begin = max(self.length - tokens, self.first)
        shape = self.batch, self.kv_heads, self.length - begin
        parts = [torch.empty(*shape, dim, dtype=torch.float32, device=self.device) for dim in self.dims]
        packed = max(begin, self.sink)
        if packed < self.packed_end:
            self.kernels.decode(packed, self.packed_end - packed, begin, parts)
        parts = [part.to(dtype) for part in parts]
        for first, end, pair in self._raw_spans():
            lo = max(first, begin)
            for part, x in zip(parts, pair, strict=True):
                if lo < end:
                    part[:, :, lo - begin : end - begin] = x[:, :, lo - first : end - first]
        return parts

    # ------------------------------------------------------------------------------------------------ shrink, reorder

    def crop(self, length):
        if length >= self.length:
            return
        if length == 0:
            self.reset()
            return
        if self.first and length < self.first + self.window - 1:
            raise ValueError(
                f"crop to {length} tokens, but a sliding layer has dropped the tokens before {self.first}, which the "
                "next query would see; call record_past first"
            )
        self._restore_raw(length)
        self.length, self.packed_end = length, max(min(self.packed_end, length), self.sink)
        self._chunk_start = self._before_start = length
        self._before = self._undo = None
        if self.packed_end == self.sink and self._counted is not None:  # with nothing packed, the offset waits again
            self._offset = None
            self._counted[:, length:] = 1
        self._pages.crop(self._pages_end)
        self._bind()

    def _restore_raw(self, length):
        raw_from = self._raw_start(length - 1)
        if self._undo is None or not self._undo[0] <= raw_from < min(self.packed_end, length):
            return
        first, pair = self._undo
        spans = [(first, self.packed_end, pair), (self.packed_end, self.length, self._tail)]
        tail = self._raw_room(self._tail[0].shape[2])
        self.kernels.copy_raw(between(spans, raw_from, length), tail, 0)
        self._tail, self.packed_end = tail, raw_from

    def select(self, rows):
        if not rows or not 0 <= min(rows) <= max(rows) < self.batch:
            raise ValueError(f"select: got {rows}; takes one or more of the {self.batch} sequences")
        index = torch.tensor(rows, device=self.device)

        def pick(tensors):
            return None if tensors is None else tuple(x.index_select(0, index) for x in tensors)

        self._sinks, self._tail = pick(self._sinks), pick(self._tail)
        if self._offset is not None:
            self._offset = [pick(tables) for tables in self._offset]
        if self._counted is not None:
            self._counted = self._counted.index_select(0, index)
        self._pages.select(rows, index)
        self._before = self._undo = None
        self._chunk_start = self._before_start = self.length
        self.batch = len(rows)
        self._bind()

    def copy(self):
        """A layer of its own; pages are shared until either writes to them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._factors, other._dense = list(self._factors), list(self._dense)
        other.kernels, other._pages = self.kernels.copy(), self._pages.copy()
        for name in ("_sinks", "_tail"):
            pair = getattr(self, name)
            setattr(other, name, pair if pair is None else tuple(x.clone() for x in pair))
        if self._before is not None:
            other._before = self._before[0], other._tail if self._before[1] is self._tail else self._before[1]
        if self._counted is not None:
            other._counted = self._counted.clone()
        if self.batch:
            other._bind()
        return other

    def record_past(self, on):
        self._past_recorded = on

    # ------------------------------------------------------------------------------------------------ calibration

    def _accepted(self, kind, addresses, shapes, kept):
        """Copies of float32 arrays in CPU memory, by address, 0 for as before, once the C++ Layer has accepted them."""
        if self.packed_end > self.sink:
            raise ValueError(f"set_{kind} after tokens were packed; set it before")
        getattr(self._rules, f"set_{kind}")(*addresses)
        return [
            host_floats(address, shape) if address else old
            for address, shape, old in zip(addresses, shapes, kept, strict=True)
        ]

    def set_offset(self, k, v):
        """[kv_heads, head_dim] each."""
        self._take_given(self._accepted("offset", (k, v), [(self.kv_heads, dim) for dim in self.dims], self._given))

    def _take_given(self, pair):
        """Offsets of K and V, on the CPU, None for one that the tokens give."""
        self._given, wanted = pair, self.recipe.offset and any(mu is None for mu in pair)
        self._warm_up = self.recipe.offset_tokens if wanted else 0  # tokens that stay raw until their mean is there

    def set_frequencies(self, frequencies, pairs, interleaved=False):
        """[pairs]: how the offset of K turns, as of a Rope."""
        self._rules.set_frequencies(frequencies, pairs, interleaved)
        if self.packed_end > self.sink:
            raise ValueError("set_frequencies after tokens were packed; set it before")
        self._turn = None
        if pairs:
            given = host_floats(frequencies, (pairs,))
            self._turn = Turn(given, interleaved, self.recipe.offset_span, self.device, self.kernels.doubles)

    def set_lambda(self, k, v):
        """[kv_heads, head_dim] each."""
        old = [factor for factor, _ in self._factors]
        given = self._accepted("lambda", (k, v), [(self.kv_heads, dim) for dim in self.dims], old)
        there = [None if x is None else x.to(self.device) for x in given]
        self._factors = [(x, None if x is None else 1.0 / x) for x in there]

    def set_rotation(self, k, v):
        """[head_dim, head_dim] each."""
        self._dense = self._accepted("rotation", (k, v), [(dim, dim) for dim in self.dims], self._dense)
        if all(x is not None for x in self._dense):
            self.kernels.set_rotations(self._dense)

    # ------------------------------------------------------------------------------------------------ save, count

    def save(self):
        """The content as `_native.Layer.save` gives it, byte for byte; which sequences share pages may differ."""
        self._check()
        parts = {name: getattr(self, name) for name in ("batch", "length", "first", "packed_end")}
        parts["pages_dropped"] = self._pages_dropped
        parts["offset_ready"] = self._offset is not None or not self.recipe.offset
        begin, end = self._pages_dropped, self._pages_end
        table, pages = self._pages.save(begin, end) if begin < end else (NOTHING, NOTHING)
        parts |= {"page_table": table.int(), "pages": pages.byte()}
        spans = self._raw_spans()
        if self.sink and self._sinks is None:  # a window has passed them
            spans.insert(0, (0, self.sink, [torch.zeros_like(x) for x in self._raw_room(self.sink)]))
        for side, name in enumerate("kv"):
            held = [x[side][:, :, : end - first] for first, end, x in spans]
            raw = torch.cat(held, 2) if held else NOTHING
            parts[f"raw_{name}"] = raw.contiguous().view(-1).view(torch.uint8)
            floats = {"offset": self._offset[side][0] if self._offset is not None else None}
            floats |= {"given_offset": self._given[side], "lambda": self._factors[side][0]}
            floats["rotation"] = self._dense[side]
            parts |= {f"{kind}_{name}": NOTHING if x is None else x for kind, x in floats.items()}
        parts["counted"] = torch.empty(0, dtype=torch.uint8) if self._counted is None else self._counted
        parts["frequencies"] = NOTHING if self._turn is None else self._turn.frequencies
        parts["interleaved"] = self._turn is not None and self._turn.interleaved
        for name, value in parts.items():
            if isinstance(value, torch.Tensor):
                parts[name] = value.cpu().contiguous().view(-1).numpy()
        self._check()
        return _native.Layer.load(**self.config, parts=parts).save()

    @classmethod
    def load(cls, kernels, device, parts, **config):
        """The layer that `parts` were saved from, on `device`. ValueError if they are damaged."""
        parts = _native.Layer.load(**config, parts=parts).save()
        layer = cls(kernels, device, **config)
        tensors = {name: torch.from_numpy(x) for name, x in parts.items() if hasattr(x, "dtype")}
        setters = {"given_offset": layer.set_offset, "lambda": layer.set_lambda, "rotation": layer.set_rotation}
        for kind, setter in setters.items():
            pair = [tensors[f"{kind}_{name}"] for name in "kv"]
            if any(x.numel() for x in pair):
                setter(*(x.data_ptr() if x.numel() else 0 for x in pair))
        if pairs := len(parts["frequencies"]):
            layer.set_frequencies(tensors["frequencies"].data_ptr(), pairs, parts["interleaved"])
        layer._start(parts["batch"])
        layer._fill(parts, tensors)
        return layer

    def _fill(self, parts, tensors):
        """Counts, pages and raw tokens from what save gave."""
        for name in ("length", "first", "packed_end"):
            setattr(self, name, parts[name])
        self._chunk_start = self._before_start = self.length
        self._pages_dropped = self._pages.first = parts["pages_dropped"]
        if (table := tensors["page_table"]).numel():
            self._pages.load(table.view(self.batch, -1).long(), tensors["pages"])
        for side, name in enumerate("kv"):
            raw, at = tensors[f"raw_{name}"], 0
            if raw.numel():
                raw = raw.view(self.dtype).view(self.batch, self.kv_heads, -1, self.dims[side])
            for first, end, pair in self._raw_spans():
                pair[side][:, :, : end - first] = raw[:, :, at : at + end - first].to(self.device)
                at += end - first
        if tensors["counted"].numel():
            self._counted = tensors["counted"].view(self.batch, -1).to(self.device)
        self._bind()
        if self.recipe.offset and parts["offset_ready"]:
            shape = self.batch, self.kv_heads, -1
            self._set_offsets([tensors[f"offset_{name}"].view(shape).to(self.device) for name in "kv"])

    @property
    def visible(self):
        return self.length - self.first

    @property
    def packed_tokens(self):
        return max(self.packed_end - max(self.sink, self._pages_dropped * PAGE_TOKENS), 0)

    @property
    def has_offset(self):
        return self._offset is not None

    @property
    def nbytes(self):
        """Bytes held; those of the rotations, which layers of a kind share, are not among them."""
        tensors, undo = [self._counted], self._undo and self._undo[1]
        for pair in (self._sinks, self._tail, undo, *(self._offset or ()), *self._factors):
            tensors += pair or ()
        return self._pages.nbytes + sum(x.numel() * x.element_size() for x in tensors if x is not None)
