"""StaticRoom: the storage of an Int4StaticLayer on CUDA, and how a GpuLayer's content comes there and back."""

import contextlib

import torch

from .cuda_step import BAD, CELLS, FULL, OFFSET_READY, PACKED_FROM, SEEN, StepPlan
from .gpu_kernels import BLOCK_TOKENS, PAGE_TOKENS


class StaticRoom:
    """Tensors that never move, for steps of one token that read the length on the device.

    Everything else (a prefill, steps of several tokens, crop, reorder, save) is done by the GpuLayer, which has the
    content between `look` and `take_over`. state: int64, the cells of HalfbyteCudaLength; pages: uint8 [batch, ring,
    page_bytes]; raw: sinks and the ring of the newest tokens; offsets: float32, mu and what follows from it.
    """

    def __init__(self, layer, capacity, batch):
        self.layer, self.capacity = layer, capacity
        self.plan = self.storage = None
        self.edited = False  # the GpuLayer has the newest content
        if not layer.batch:
            layer._start(batch)
        self._make()

    def _ring(self):
        """Pages a sequence; with a window they are used in turn, unless a crop may bring back what it has passed."""
        pages, window = -(-self.capacity // PAGE_TOKENS), self.layer.window
        if not window or self.layer._past_recorded:
            return pages
        return min(pages, -(-(window - 1) // PAGE_TOKENS) + 1)

    def _make(self):
        self.plan = StepPlan.of(self.layer, self.capacity, self._ring())
        self.storage = self.state, self.pages, self.raw, self.offsets = self.plan.make_storage()
        for tensor in self.storage:  # CUDA graphs take it that these stay where they are
            torch._dynamo.mark_static_address(tensor)
        self.take_over()

    @property
    def nbytes(self):
        """Of the storage, and of what the GpuLayer has beside it."""
        own = 0 if self._shares_pages() else self.layer._pages.nbytes
        return sum(x.numel() * x.element_size() for x in self.storage) + own

    def reset(self):
        self.layer.reset()
        self.layer._start(self.plan.batch)
        self.take_over()

    def fit(self, batch):
        """Has room for so many sequences in an empty layer."""
        if batch != self.layer.batch:
            self.layer.reset()
            self.layer._start(batch)

    # ------------------------------------------------------------------------------------------------ to the device

    def take_over(self):
        """What the GpuLayer holds becomes what the next step goes on from."""
        layer = self.layer
        plan = StepPlan.of(layer, self.capacity, self._ring())
        if (plan.batch, plan.ring) != (self.plan.batch, self.plan.ring):
            self._make()  # comes back here
            return
        self.plan, self.edited = plan, False
        self._take_raw()
        self._take_pages()
        ready = self._take_offsets()
        cells = [0] * CELLS
        cells[SEEN], cells[PACKED_FROM], cells[OFFSET_READY] = layer.length, layer.packed_end, int(ready)
        self.state[:CELLS].copy_(torch.tensor(cells))

    def _take_raw(self):
        layer, held = self.layer, self.plan.raw_pieces(self.raw)
        slots = self._slots(layer.packed_end, layer.length)
        for side, name in enumerate("kv"):
            if layer._sinks is not None:
                held[f"sinks_{name}"].copy_(layer._sinks[side])
            if slots.numel():
                held[f"tail_{name}"][:, :, slots] = layer._tail[side][:, :, : slots.numel()]

    def _slots(self, begin, end):
        return torch.arange(begin, max(begin, end), device=self.state.device) % self.plan.slots

    def _shares_pages(self):
        chunks = self.layer._pages._chunks
        return len(chunks) == 1 and chunks[0].pages.data_ptr() == self.pages.data_ptr()

    def _take_pages(self):
        layer = self.layer
        begin, end = layer._pages_dropped, layer._pages_end
        if not self._shares_pages() and begin < end:
            begin = max(begin, end - self.plan.ring)
            _, pages = layer._pages.save(begin, end)
            to = torch.arange(begin, end, device=self.state.device) % self.plan.ring
            self.pages[:, to] = pages.view(layer.batch, end - begin, -1)
        self._lend_pages()

    def _lend_pages(self):
        """The GpuLayer goes on in these pages where they lie in order, and has none where they are used in turn."""
        layer = self.layer
        layer._pages = layer.kernels.pages(layer.batch)
        if not layer.window:
            layer._pages._add(self.pages)
        layer._bind()

    def _take_offsets(self):
        """Returns whether the offsets need no mean of tokens any more."""
        layer, plan = self.layer, self.plan
        if not plan.has_offset:
            return True
        held = plan.offset_pieces(self.offsets)
        for side, name in enumerate("kv"):
            tables = layer._offset and layer._offset[side]
            if not tables and layer._given[side] is not None:
                tables = layer.kernels.offset_tables(side, layer._given[side].to(layer.device))
            for kind, table in zip(("mu", "rotated"), tables or (0.0, 0.0), strict=True):
                held[f"{kind}_{name}"][:] = table
        weights = held["weights"].fill_(1.0)
        weights[:, : layer._counted.shape[1]] = layer._counted
        return layer._offset is not None or not any(plan.is_mean)

    # ------------------------------------------------------------------------------------------------ to the host

    def look(self):
        """Waits for the device, and brings the GpuLayer to where the steps since have come; returns the length.

        ValueError if one of them met a value that can not be coded, or had no room.
        """
        layer = self.layer
        if self.edited:
            return layer.length
        cells = self.state[:CELLS].tolist()
        if cells[BAD] & 0xFFFFFFFF:
            layer.kernels._failed.value = 1
            layer._check()
        if cells[FULL]:
            raise ValueError(
                f"tokens beyond max_cache_len={self.capacity} were left out; the cache can not be used before reset()"
            )
        stepped = cells[SEEN] != layer.length
        if stepped:
            self._give(cells[SEEN], cells[PACKED_FROM])
        if layer.window:
            self._give_pages()
        return layer.length

    def _give(self, length, packed_from):
        layer, held = self.layer, self.plan.raw_pieces(self.raw)
        filled = -(-packed_from // BLOCK_TOKENS) * BLOCK_TOKENS
        packed_end = max(packed_from, min(filled, length), layer._raw_start(length - 1))
        layer.length, layer.packed_end = length, packed_end
        layer._chunk_start = layer._before_start = length
        layer._before = layer._undo = None
        slots = self._slots(packed_end, length)
        layer._tail = layer._raw_room(layer._tail[0].shape[2])
        for side, name in enumerate("kv"):
            layer._tail[side][:, :, : slots.numel()] = held[f"tail_{name}"][:, :, slots]
        if layer._sinks is not None:
            layer._sinks = tuple(held[f"sinks_{name}"].clone() for name in "kv")
        if self.plan.has_offset and layer._offset is None and packed_end > layer.sink:
            mu = self.plan.offset_pieces(self.offsets)
            layer._set_offsets([mu[f"mu_{name}"].clone() for name in "kv"])
        if layer.window and not layer._past_recorded:
            layer.first = max(layer.first, length - layer.window)
            layer._pages_dropped = max(layer._pages_dropped, min(layer.first, packed_end) // PAGE_TOKENS)
            if layer.first >= layer.sink and (layer._offset is not None or not self.plan.has_offset):
                layer._sinks = None

    def _give_pages(self):
        layer = self.layer
        begin, end = layer._pages_dropped, layer._pages_end
        layer._pages = layer.kernels.pages(layer.batch)
        layer._pages.first = begin
        for page in range(begin, end):
            at = page % self.plan.ring
            layer._pages._add(self.pages[:, at : at + 1].clone())
        layer._bind()

    @contextlib.contextmanager
    def editing(self):
        """The GpuLayer may change the content; then it is taken over."""
        if self.edited:
            yield
            return
        self.look()
        self.edited = True
        try:
            yield
        finally:
            self.take_over()
