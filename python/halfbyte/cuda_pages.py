"""The pages of one layer on CUDA: chunks of device memory that are never moved, and the table of their addresses."""

import torch

from . import _cuda
from .gpu_kernels import PAGE_TOKENS

GROWTH = 16  # pages are added by this part of those held, and
FEWEST_PAGES = 4  # at least so many, so that the table changes rarely


class Chunk:
    """Pages allocated together: uint8 [batch, count, bytes of all heads]."""

    __slots__ = ("pages", "shared")

    def __init__(self, pages, shared=False):
        self.pages = pages
        self.shared = shared  # with a copy of the layer: whoever writes first takes pages of its own

    @property
    def count(self):
        return self.pages.shape[1]


class CudaPages:
    """Pages first, first + 1, … of every sequence; page i holds tokens from 64 i on. Methods say if addresses changed.

    Sequences share no pages. one_by_one: each page is a chunk of its own, as those of a sliding window leave at the
    other end.
    """

    def __init__(self, batch, page_bytes, device, one_by_one=False):
        self.batch, self.page_bytes, self.device, self.one_by_one = batch, page_bytes, device, one_by_one
        self.first = 0
        self._chunks = []
        self._table = None  # int64 [batch, pages]

    @property
    def end(self):
        return self.first + sum(chunk.count for chunk in self._chunks)

    def described(self):
        if self._table is None:
            return _cuda.Pages(None, 0, self.first)
        return _cuda.Pages(self._table.data_ptr(), self._table.stride(0), self.first)

    @property
    def nbytes(self):
        held = [chunk.pages for chunk in self._chunks] + ([] if self._table is None else [self._table])
        return sum(x.numel() * x.element_size() for x in held)

    def save(self, begin, end):
        """(numbers of pages [begin, end) of every sequence, uint8 of the pages one after the other)."""
        held = torch.cat([chunk.pages for chunk in self._chunks], 1)[:, begin - self.first : end - self.first]
        return torch.arange(self.batch * (end - begin)), held.reshape(-1)

    def load(self, table, pages):
        """Takes over pages from page `first` on. table: [batch, pages] numbers of pages, as `save` gave them."""
        self._add(pages.view(-1, self.page_bytes)[table].to(self.device))

    def make_room(self, begin, end):
        """Has pages for tokens [begin, end) that are this layer's alone."""
        changed = self._own(begin // PAGE_TOKENS, end)
        held = self.end - self.first
        needed = -(-end // PAGE_TOKENS) - self.end
        if needed <= 0:
            return changed
        more = max(needed, held // GROWTH, FEWEST_PAGES if held else 0)
        for count in [1] * needed if self.one_by_one else [more]:
            # Zeros: kernels read whole blocks, and what they mask must be numbers.
            self._add(torch.zeros(self.batch, count, self.page_bytes, dtype=torch.uint8, device=self.device))
        return True

    def _add(self, pages):
        chunk = Chunk(pages)
        self._chunks.append(chunk)
        columns = self._addresses(chunk)
        self._table = columns if self._table is None else torch.cat([self._table, columns], 1)

    def _own(self, begin, end):
        """Copies the chunks that hold pages from `begin` on, up to token `end`, where they are shared."""
        page, changed = self.first, False
        for chunk in self._chunks:
            if chunk.shared and page + chunk.count > begin and page * PAGE_TOKENS < end:
                chunk.pages, chunk.shared, changed = chunk.pages.clone(), False, True
            page += chunk.count
        if changed:
            self._rebuild()
        return changed

    def _addresses(self, chunk):
        batch, count, each = chunk.pages.shape
        begin, end = chunk.pages.data_ptr(), chunk.pages.data_ptr() + batch * count * each
        return torch.arange(begin, end, each, dtype=torch.int64, device=self.device).view(batch, count)

    def _rebuild(self):
        self._table = torch.cat([self._addresses(chunk) for chunk in self._chunks], 1) if self._chunks else None

    def drop(self, gone):
        """Lets go of chunks that hold nothing from page `gone` on."""
        columns = 0
        while self._chunks and self.first + self._chunks[0].count <= gone:
            count = self._chunks.pop(0).count
            self.first += count
            columns += count
        if not columns:
            return False
        self._table = self._table[:, columns:] if self._chunks else None
        if not self._chunks:
            self.first = gone
        return True

    def crop(self, end):
        """Lets go of chunks that hold nothing before page `end`."""
        while self._chunks and self.end - self._chunks[-1].count >= end:
            self._chunks.pop()
        self._rebuild()

    def select(self, rows, index):
        """Keeps these sequences, in that order. index: int64 [sequences], the same on the device."""
        self._chunks = [Chunk(chunk.pages.index_select(0, index)) for chunk in self._chunks]
        self.batch = len(rows)
        self._rebuild()

    def copy(self):
        """Pages of another layer, in the same memory until either writes to them."""
        other = CudaPages(self.batch, self.page_bytes, self.device, self.one_by_one)
        other.first, other._table = self.first, self._table
        for chunk in self._chunks:
            chunk.shared = True
            other._chunks.append(Chunk(chunk.pages, shared=True))
        return other
