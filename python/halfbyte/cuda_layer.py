"""CudaLayer: one layer's cache on an NVIDIA GPU, by the rules of the C++ Layer: the same blocks, the same bytes."""

import torch

from . import _native
from .cuda_kernels import Kernels, host_floats, rotate
from .cuda_pages import PAGE_TOKENS, Pages
from .cuda_turn import Turn, mean_of

BLOCK_TOKENS = 16
UNDO_TOKENS = 64  # how far behind its newest token a crop may find raw what an append of several has packed
NO_OFFSET = [(None, None)] * 2  # as CudaLayer._offset


class CudaLayer:
    """What Int4Layer asks of `_native.Layer`, on tensors of one CUDA device; K and V come and go as tensors.

    Nothing here waits for the device: a value that can not be coded is noticed when a later call finds the flag that
    the encoding kernel set. Sequences share no pages; copies of a layer do, until either writes to them.
    """

    def __init__(self, device, kv_heads, head_dim_k, head_dim_v, dtype, recipe, layer_index=0, sliding_window=0):
        self._config = {"kv_heads": kv_heads, "head_dim_k": head_dim_k, "head_dim_v": head_dim_v, "dtype": dtype}
        self._config |= {"recipe": recipe, "layer_index": layer_index, "sliding_window": sliding_window}
        self._rules = _native.Layer(**self._config)  # refuses what the CPU refuses
        self.device, self.recipe, self.kv_heads, self.window = device, recipe, kv_heads, sliding_window
        self.dims, self.dtype = (head_dim_k, head_dim_v), getattr(torch, dtype)
        self._kernels = Kernels(device, recipe, kv_heads, head_dim_k, head_dim_v, dtype, layer_index)
        self._past_recorded = False
        self._given = [None, None]  # offsets of K and V [kv_heads, head_dim] from a calibration
        self._factors = [(None, None)] * 2  # (lambda, 1 / lambda) of K and V [kv_heads, head_dim], if there are any
        self._dense = [None, None]  # a dense recipe's rotations, on the CPU
        self._turn = None  # how the offset of K follows RoPE
        self._rotations = None
        self._clear()

    # ------------------------------------------------------------------------------------------------ state

    def _clear(self):
        self.batch = self.length = self.first = 0
        self.packed_end = self.recipe.sink_tokens  # [sinks, packed_end) is packed, [packed_end, length) raw in the tail
        self._pages = Pages(0, self._kernels.page_bytes, self.device, one_by_one=bool(self.window))
        self._pages_dropped = 0
        self._sinks = self._tail = None  # (K, V) [batch, kv_heads, capacity, head_dim]
        self._before = self._undo = None  # (first position, (K, V))
        self._before_start = self._chunk_start = 0
        self._offset = None  # of K and V: (mu, R mu), float32 [batch, kv_heads, head_dim]
        self._counted = None  # uint8 [batch, tokens that can be raw with nothing packed]: 0 for padding

    def reset(self):
        self._kernels.forgive()
        self._clear()

    def _start(self, batch):
        self.batch = self._pages.batch = batch
        capacity = BLOCK_TOKENS + max(self.recipe.raw_window, self.recipe.offset_tokens if self.recipe.offset else 0)
        self._tail = self._raw_room(capacity)
        if self.recipe.sink_tokens:
            self._sinks = self._raw_room(self.recipe.sink_tokens)
        if self.recipe.offset:
            shape = batch, capacity + self.recipe.sink_tokens
            self._counted = torch.ones(shape, dtype=torch.uint8, device=self.device)
        self._bind()

    def _raw_room(self, tokens):
        return tuple(
            torch.empty(self.batch, self.kv_heads, tokens, dim, dtype=self.dtype, device=self.device)
            for dim in self.dims
        )

    def _bind(self):
        """Tells the kernels of new pages, offsets or another batch."""
        if self._rotations is None:
            self._rotations = self._kernels.rotations(self._dense)
        constants = {"sliding_window": self.window, "sink_tokens": self.recipe.sink_tokens}
        constants |= {"raw_window": self.recipe.raw_window, "warm_up": self._warm_up}
        offset = self._offset or NO_OFFSET
        self._kernels.bind(self.batch, self._pages, self._rotations, offset, self._factors, self._turn, **constants)

    @property
    def _warm_up(self):
        wanted = self.recipe.offset and any(mu is None for mu in self._given)
        return self.recipe.offset_tokens if wanted else 0

    def _raw_start(self, position):
        """As Layer::State::raw_start."""
        sinks = self.recipe.sink_tokens
        if position < self._warm_up:
            return sinks
        return max(position // BLOCK_TOKENS * BLOCK_TOKENS - self.recipe.raw_window, sinks)

    def _check(self):
        if self._kernels.failed:
            takes = "up to 10000, use scale_bits=32" if self.recipe.scale_bits == 16 else "up to 1e15"
            raise ValueError(
                "K or V of an earlier step hold a value that is not finite or too large to code (scale_bits="
                f"{self.recipe.scale_bits} codes values {takes}); the cache can not be used before reset()"
            )

    # ------------------------------------------------------------------------------------------------ append

    def append(self, k, v, counted=None, answered=False):
        """Adds K, V [batch, kv_heads, tokens, head_dim]; counted and answered as in the C++ Layer."""
        self._check()
        if self.recipe.lambda_ and (None, None) in self._factors:
            raise ValueError("the recipe uses lambda, and set_lambda was not called")
        if self.recipe.rotation == "dense" and any(x is None for x in self._dense):
            raise ValueError("the recipe's rotation is dense, and set_rotation was not called for K and V")
        if not self.batch:
            self._start(k.shape[0])
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        old, sink, packed_from = self.length, self.recipe.sink_tokens, self.packed_end
        length, several = old + k.shape[2], k.shape[2] > 1
        self._note_padding(counted, length)
        filled = -(-packed_from // BLOCK_TOKENS) * BLOCK_TOKENS
        packed_end = max(min(filled, max(length, sink)), self._raw_start(length - 1))
        self._before = self._undo = None
        self._chunk_start, self._before_start = old, min(packed_from, old)
        if packed_from % BLOCK_TOKENS:
            self._before_start = min(filled, length)  # those tokens exist packed only
        if several and old > packed_from:
            self._before = packed_from, self._tail
        if packed_end == packed_from and old >= sink:
            self._drop_behind_window(old)
            self._kernels.copy_raw((k, v), self._tail, old - packed_from)
        else:
            spans = [*self._raw_spans(), (old, length, (k, v))]
            self._pack_and_move(spans, packed_end, length, counted, answered)
        self.length, self.packed_end = length, packed_end
        if answered:
            self._drop_behind_window(length)

    def _raw_spans(self):
        """[(first, end, (K, V))] of the tokens held raw."""
        spans, sink = [], min(self.recipe.sink_tokens, self.length)
        if sink and self._sinks is not None:
            spans.append((0, sink, self._sinks))
        if self.length > self.packed_end:
            spans.append((self.packed_end, self.length, self._tail))
        return spans

    def _note_padding(self, counted, length):
        """Remembers which of the tokens that can be raw with nothing packed are padding, until there is an offset."""
        if counted is not None and self._counted is not None and self._offset is None:
            end = min(length, self._warm_up or self._counted.shape[1])
            if end > self.length:
                self._counted[:, self.length : end] = counted[:, : end - self.length]

    def _pack_and_move(self, spans, packed_end, length, counted, answered):
        """The append that packs blocks: spans are the raw tokens there are, [0, length) less what is packed."""
        old, sink, packed_from = self.length, self.recipe.sink_tokens, self.packed_end
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
                    self._kernels.encode(pair, begin, max(begin, first), min(end, packed_end))
        self._keep_undo(spans, packed_from, packed_end, length)
        if sink and old < sink:
            self._kernels.copy_raw(_between(spans, old, min(sink, length)), self._sinks, old)
        if self._before is not None or packed_end < old:  # the old tail is still read
            self._tail = self._raw_room(self._tail[0].shape[2])
        if length > packed_end:
            self._kernels.copy_raw(_between(spans, packed_end, length), self._tail, 0)

    def _keep_undo(self, spans, packed_from, packed_end, length):
        if not self._past_recorded or length == self.length + 1:
            return
        filled = -(-packed_from // BLOCK_TOKENS) * BLOCK_TOKENS
        start = max(filled, self._raw_start(max(length - UNDO_TOKENS - 1, 0)))
        if start < packed_end:
            self._undo = start, tuple(x.clone() for x in _between(spans, start, packed_end))

    # ------------------------------------------------------------------------------------------------ offset

    def _fix_offset(self, spans, length, counted):
        total = min(length, self._warm_up) if self._warm_up else length
        weights = None
        if counted is not None or bool(self.length):
            new = torch.ones_like(self._counted[:, :1]).expand(-1, length - self.length) if counted is None else counted
            weights = torch.cat([self._counted[:, : self.length], new], 1)[:, :total].float()
            weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0)
        offsets = tuple(
            (mean_of if side or self._turn is None else self._turn.mean_of)(spans, side, total, weights)
            if given is None
            else given.to(self.device).expand(self.batch, -1, -1).contiguous()
            for side, given in enumerate(self._given)
        )
        self._set_offsets(offsets)

    def _set_offsets(self, offsets):
        self._offset = [(mu, rotate(mu, tables[0])) for mu, tables in zip(offsets, self._rotations, strict=True)]
        self._bind()

    # ------------------------------------------------------------------------------------------------ pages

    def _drop_behind_window(self, position):
        """Lets go of pages that no query at `position` or later sees."""
        if not self.window or self._past_recorded:
            return
        self.first = max(self.first, position - self.window + 1)
        if self.first >= self.recipe.sink_tokens and (self._offset is not None or not self.recipe.offset):
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

    def attend(self, query, out, scale, chunk, mask, softcap, sinks):
        """query [batch, heads, queries, head_dim] to out [batch, queries, heads, head_dim_v].

        chunk: (K, V) as the last append got them, where queries are several. mask: bool [batch, 1, queries, tokens] of
        the newest tokens, or None; softcap: 0 for none; sinks: float32 [heads] or None.
        """
        sink, spans = min(self.recipe.sink_tokens, self.length), []
        if sink and self._sinks is not None:
            spans.append((self._sinks, 0, 0, sink, 1))
        if query.shape[2] == 1:
            kept = self.packed_end
            if kept < self.length:
                spans.append((self._tail, kept, kept, self.length, 0))
        else:
            kept, chunk_start = self._before_start, self._chunk_start
            if self._before is not None and kept < chunk_start:
                first, pair = self._before
                spans.append((pair, first, kept, chunk_start, 0))
            begin = max(chunk_start, sink)
            if begin < self.length:
                spans.append((chunk, chunk_start, begin, self.length, 0))
        counts = self.length, self.first, self.packed_end, kept
        self._kernels.attend(query, out, scale, softcap, sinks, mask, counts, spans)

    def unpack(self, tokens, dtype):
        """The newest `tokens` tokens as K, V [batch, kv_heads, tokens, head_dim] of `dtype`."""
        self._check()
        begin = max(self.length - tokens, self.first)
        parts = [
            torch.empty(self.batch, self.kv_heads, self.length - begin, dim, device=self.device) for dim in self.dims
        ]
        packed = max(begin, self.recipe.sink_tokens)
        if packed < self.packed_end:
            self._kernels.decode(packed, self.packed_end - packed, begin, parts)
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
        sink = self.recipe.sink_tokens
        self.length, self.packed_end = length, max(min(self.packed_end, length), sink)
        self._chunk_start = self._before_start = length
        self._before = self._undo = None
        if self.packed_end == sink and self._counted is not None:  # with nothing packed, the offset waits again
            self._offset = None
            self._counted[:, length:] = 1
        self._pages.crop(-(-self.packed_end // PAGE_TOKENS))
        self._bind()

    def _restore_raw(self, length):
        raw_from = self._raw_start(length - 1)
        if self._undo is None or not self._undo[0] <= raw_from < min(self.packed_end, length):
            return
        first, pair = self._undo
        spans = [(first, self.packed_end, pair)]
        if self.length > self.packed_end:
            spans.append((self.packed_end, self.length, self._tail))
        tail = self._raw_room(self._tail[0].shape[2])
        self._kernels.copy_raw(_between(spans, raw_from, length), tail, 0)
        self._tail, self.packed_end = tail, raw_from

    def select(self, rows):
        if not rows or not 0 <= min(rows) <= max(rows) < self.batch:
            raise ValueError(f"select asks for sequences {rows} of {self.batch}")
        index = torch.tensor(rows, device=self.device)

        def pick(pair):
            return None if pair is None else tuple(x.index_select(0, index) for x in pair)

        self._sinks, self._tail = pick(self._sinks), pick(self._tail)
        if self._offset is not None:
            self._offset = [pick(pair) for pair in self._offset]
        if self._counted is not None:
            self._counted = self._counted.index_select(0, index)
        self._pages.select(index)
        self._before = self._undo = None
        self._chunk_start = self._before_start = self.length
        self.batch = len(rows)
        self._bind()

    def copy(self):
        """A layer of its own; chunks of pages are shared until either writes to them."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._given, other._factors, other._dense = list(self._given), list(self._factors), list(self._dense)
        other._kernels = self._kernels.copy()
        for name in ("_sinks", "_tail"):
            pair = getattr(self, name)
            setattr(other, name, pair if pair is None else tuple(x.clone() for x in pair))
        if self._before is not None:
            other._before = self._before[0], other._tail if self._before[1] is self._tail else self._before[1]
        if self._counted is not None:
            other._counted = self._counted.clone()
        other._pages = self._pages.copy()
        if self.batch:
            other._bind()
        return other

    def record_past(self, on):
        self._past_recorded = on

    # ------------------------------------------------------------------------------------------------ calibration

    def _set_given(self, kind, addresses, shapes, setter):
        """Float32 arrays in CPU memory, by address, 0 for none, after the C++ Layer has accepted them."""
        if self.packed_end > self.recipe.sink_tokens:
            raise ValueError(f"set_{kind} after tokens were packed; set it before")
        setter(*addresses)
        return [host_floats(address, shape) for address, shape in zip(addresses, shapes, strict=True)]

    def set_offset(self, k, v):
        shapes = [(self.kv_heads, dim) for dim in self.dims]
        for side, mu in enumerate(self._set_given("offset", (k, v), shapes, self._rules.set_offset)):
            self._given[side] = self._given[side] if mu is None else mu

    def set_frequencies(self, frequencies, pairs, interleaved=False):
        self._rules.set_frequencies(frequencies, pairs, interleaved)
        if self.packed_end > self.recipe.sink_tokens:
            raise ValueError("set_frequencies after tokens were packed; set it before")
        given = host_floats(frequencies, (1, pairs)) if pairs else None
        self._turn = None if given is None else Turn(given[0], interleaved, self.recipe.offset_span, self.device)

    def set_lambda(self, k, v):
        shapes = [(self.kv_heads, dim) for dim in self.dims]
        for side, factor in enumerate(self._set_given("lambda", (k, v), shapes, self._rules.set_lambda)):
            if factor is not None:
                self._factors[side] = factor.to(self.device), (1.0 / factor).to(self.device)

    def set_rotation(self, k, v):
        shapes = [(dim, dim) for dim in self.dims]
        for side, matrix in enumerate(self._set_given("rotation", (k, v), shapes, self._rules.set_rotation)):
            self._dense[side] = self._dense[side] if matrix is None else matrix
        self._rotations = None

    # ------------------------------------------------------------------------------------------------ save, count

    def save(self):
        """The content as `_native.Layer.save` gives it, byte for byte."""
        self._check()
        each = 0
        if self.packed_end > self.recipe.sink_tokens:
            each = -(-self.packed_end // PAGE_TOKENS) - self._pages_dropped
        parts = {name: getattr(self, name) for name in ("batch", "length", "first", "packed_end")}
        parts |= {
            "pages_dropped": self._pages_dropped,
            "offset_ready": self._offset is not None or not self.recipe.offset,
        }
        parts["page_table"] = torch.arange(self.batch * each, dtype=torch.int32)
        parts["pages"] = torch.empty(0, dtype=torch.uint8)
        if each:
            parts["pages"] = self._pages.between(self._pages_dropped, self._pages_dropped + each)
        spans, sink = self._raw_spans(), self.recipe.sink_tokens
        if sink and self._sinks is None:  # a window has passed them
            spans.insert(0, (0, sink, [torch.zeros_like(x) for x in self._raw_room(sink)]))
        for side, name in enumerate("kv"):
            held = [x[side][:, :, : end - first] for first, end, x in spans]
            raw = torch.cat(held, 2) if held else torch.empty(0)
            parts[f"raw_{name}"] = raw.contiguous().view(-1).view(torch.uint8)
            floats = {"offset": self._offset[side][0] if self._offset is not None else None}
            floats |= {"given_offset": self._given[side], "lambda": self._factors[side][0]}
            floats["rotation"] = self._dense[side]
            parts |= {f"{kind}_{name}": torch.empty(0) if x is None else x for kind, x in floats.items()}
        parts["counted"] = torch.empty(0, dtype=torch.uint8) if self._counted is None else self._counted
        parts["frequencies"] = torch.empty(0) if self._turn is None else self._turn.rope.frequencies
        parts["interleaved"] = self._turn is not None and self._turn.interleaved
        for name, value in parts.items():
            if isinstance(value, torch.Tensor):
                parts[name] = value.cpu().contiguous().view(-1).numpy()
        self._check()
        return _native.Layer.load(**self._config, parts=parts).save()

    @classmethod
    def load(cls, device, parts, **config):
        """The layer that `parts` were saved from, on `device`. ValueError if they are damaged."""
        parts = _native.Layer.load(**config, parts=parts).save()
        layer = cls(device, **config)
        tensors = {name: torch.from_numpy(x) for name, x in parts.items() if hasattr(x, "dtype")}
        for name in ("length", "first", "packed_end"):
            setattr(layer, name, parts[name])
        for side, name in enumerate("kv"):
            given, factor, dense = (tensors[f"{kind}_{name}"] for kind in ("given_offset", "lambda", "rotation"))
            dim = layer.dims[side]
            layer._given[side] = given.view(-1, dim) if given.numel() else None
            layer._dense[side] = dense.view(dim, dim) if layer.recipe.rotation == "dense" else None
            if factor.numel():
                layer._factors[side] = tuple(x.view(-1, dim).to(device) for x in (factor, 1.0 / factor))
        if len(parts["frequencies"]):
            interleaved = parts["interleaved"]
            layer._turn = Turn(tensors["frequencies"], interleaved, layer.recipe.offset_span, device)
        layer._start(parts["batch"])
        layer._fill(parts, tensors)
        return layer

    def _fill(self, parts, tensors):
        self._pages_dropped = self._pages.first = parts["pages_dropped"]
        if tensors["page_table"].numel():
            table = tensors["page_table"].view(self.batch, -1).long()
            pages = tensors["pages"].view(-1, self._kernels.page_bytes)[table]
            self._pages.add(pages.to(self.device))
        for side, name in enumerate("kv"):
            raw, at = tensors[f"raw_{name}"], 0
            if raw.numel():
                raw = raw.view(self.dtype).view(self.batch, self.kv_heads, -1, self.dims[side])
            for first, end, pair in self._raw_spans():
                pair[side][:, :, : end - first] = raw[:, :, at : at + end - first].to(self.device)
                at += end - first
        if tensors["counted"].numel():
            self._counted = tensors["counted"].view(self.batch, -1).to(self.device)
        self._chunk_start = self._before_start = self.length
        if self.recipe.offset and parts["offset_ready"]:
            shape = self.batch, self.kv_heads, -1
            self._set_offsets(tuple(tensors[f"offset_{name}"].view(shape).to(self.device) for name in "kv"))
        self._bind()

    @property
    def visible(self):
        return self.length - self.first

    @property
    def packed_tokens(self):
        return max(self.packed_end - max(self.recipe.sink_tokens, self._pages_dropped * PAGE_TOKENS), 0)

    @property
    def has_offset(self):
        return self._offset is not None

    @property
    def nbytes(self):
        """Bytes held; those of the rotations, which all layers of a kind in the process share, are not among them."""
        tensors = [*self._pages.tensors(), self._counted]
        undo = self._undo and self._undo[1]
        for pair in (self._sinks, self._tail, undo, *(self._offset or ()), *self._factors):
            tensors += pair or ()
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _between(spans, begin, end):
    """(K, V) of the tokens [begin, end), which lie in spans [(first, end, (K, V))] one after the other."""
    found = []
    for first, last, pair in spans:
        lo, hi = max(begin, first), min(end, last)
        if lo < hi:
            found.append([x[:, :, lo - first : hi - first] for x in pair])
    return found[0] if len(found) == 1 else [torch.cat(side, 2) for side in zip(*found, strict=True)]
