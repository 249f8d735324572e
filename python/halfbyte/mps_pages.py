"""The pages of one layer on an Apple GPU: numbers of pages in one buffer, since a kernel takes one."""

import torch

from .gpu_kernels import PAGE_TOKENS

SMALLEST = 4  # pages that a pool grows by


class PagePool:
    """Pages of `page_bytes` in one uint8 tensor; sequences of a layer and its copies hold them by number."""

    def __init__(self, page_bytes, device):
        self.bytes = torch.zeros(0, page_bytes, dtype=torch.uint8, device=device)
        self.holders = []  # of each page
        self.spare = []

    def hold(self, pages):
        for page in pages:
            self.holders[page] += 1

    def release(self, pages):
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.spare.append(page)

    def take(self, count):
        """Numbers of so many pages, held once, of zeros: kernels read whole blocks, and what they mask are numbers."""
        if len(self.spare) < count:
            self._grow(count - len(self.spare))
        taken = [self.spare.pop() for _ in range(count)]
        self.hold(taken)
        self.bytes[self.index(taken)] = 0
        return taken

    def _grow(self, least):
        """A quarter more pages. The old ones are copied, each about four times in the end."""
        old = len(self.holders)
        more = max(least, old // 4, SMALLEST)
        self.bytes = torch.cat([self.bytes, self.bytes.new_zeros(more, self.bytes.shape[1])])
        self.holders += [0] * more
        self.spare += range(old + more - 1, old - 1, -1)

    def index(self, pages):
        return torch.tensor(pages, dtype=torch.int64, device=self.bytes.device)


class MpsPages:
    """Pages first, first + 1, … of every sequence; page i holds tokens from 64 i on. Methods say if places changed.

    Sequences share pages until one writes to them, and so do copies of a layer.
    """

    def __init__(self, batch, page_bytes, device):
        self.page_bytes, self.pool = page_bytes, PagePool(page_bytes, device)
        self.first = 0
        self.numbers = [[] for _ in range(batch)]

    def __del__(self):
        self._let_go(self.numbers)

    @property
    def end(self):
        return self.first + (len(self.numbers[0]) if self.numbers else 0)

    @property
    def nbytes(self):
        """Of the pages held, and of spare ones."""
        return (len({page for row in self.numbers for page in row}) + len(self.pool.spare)) * self.page_bytes

    def table(self):
        """int64 [batch, pages]: where each page starts in pool.bytes; of at least one page a sequence."""
        return self.pool.index([row or [0] for row in self.numbers]) * self.page_bytes

    def save(self, begin, end):
        """(numbers of pages [begin, end) of every sequence, uint8 of the pages one after the other)."""
        seen = {}
        rows = (row[begin - self.first : end - self.first] for row in self.numbers)
        table = [seen.setdefault(page, len(seen)) for row in rows for page in row]
        return torch.tensor(table), self.pool.bytes[self.pool.index(list(seen))].view(-1)

    def load(self, table, pages):
        """Takes over pages from page `first` on. table: [batch, pages] numbers of pages, as `save` gave them."""
        pages = pages.view(-1, self.page_bytes)
        taken = self.pool.take(len(pages))
        self.pool.bytes[self.pool.index(taken)] = pages.to(self.pool.bytes.device)
        self.numbers = [[taken[number] for number in row] for row in table.tolist()]
        for row in self.numbers:
            self.pool.hold(row)
        self.pool.release(taken)

    def make_room(self, begin, end):
        """Has pages for tokens [begin, end) that are this layer's and one sequence's alone."""
        first, last, changed = begin // PAGE_TOKENS - self.first, -(-end // PAGE_TOKENS) - self.first, False
        for row in self.numbers:
            shared = [i for i in range(first, min(last, len(row))) if self.pool.holders[row[i]] > 1]
            count = len(shared) + max(last - len(row), 0)
            if not count:
                continue
            own, changed = self.pool.take(count), True
            for i in shared:
                self.pool.bytes[own[0]] = self.pool.bytes[row[i]]
                self.pool.release([row[i]])
                row[i] = own.pop(0)
            row += own
        return changed

    def drop(self, gone):
        """Lets go of pages before page `gone`."""
        count = max(gone - self.first, 0)
        self._let_go([row[:count] for row in self.numbers])
        self.numbers = [row[count:] for row in self.numbers]
        self.first += count
        return count > 0

    def crop(self, end):
        """Lets go of pages from page `end` on."""
        kept = max(end - self.first, 0)
        self._let_go([row[kept:] for row in self.numbers])
        self.numbers = [row[:kept] for row in self.numbers]

    def select(self, rows, index):
        """Keeps these sequences, in that order. index: int64 [sequences], the same on the device."""
        kept = [list(self.numbers[row]) for row in rows]
        for row in kept:
            self.pool.hold(row)
        self._let_go(self.numbers)
        self.numbers = kept

    def copy(self):
        """Pages of another layer, in the same memory until either writes to them."""
        other = object.__new__(MpsPages)
        other.page_bytes, other.pool, other.first = self.page_bytes, self.pool, self.first
        other.numbers = [list(row) for row in self.numbers]
        for row in other.numbers:
            self.pool.hold(row)
        return other

    def _let_go(self, numbers):
        for row in numbers:
            self.pool.release(row)
