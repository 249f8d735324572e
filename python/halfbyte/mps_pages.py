"""PagePool: the packed pages of a layer and its copies as one tensor, with a count of who holds each page."""

import torch

SMALLEST = 4  # pages of a new pool


class PagePool:
    """Pages of `page_bytes` in one uint8 tensor; sequences hold them by number, and share them until one writes."""

    def __init__(self, page_bytes, device):
        self.page_bytes = page_bytes
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

    def take(self):
        """The number of a page of zeros, held once: kernels read whole blocks, and what they mask must be numbers."""
        if not self.spare:
            self._grow()
        page = self.spare.pop()
        self.holders[page] = 1
        self.bytes[page].zero_()
        return page

    def _grow(self, least=SMALLEST):
        """A quarter more pages. Kernels take one buffer: the old ones are copied, each about four times in the end."""
        old = len(self.holders)
        more = max(least, old // 4)
        grown = self.bytes.new_zeros(old + more, self.page_bytes)
        grown[:old] = self.bytes
        self.bytes = grown
        self.holders += [0] * more
        self.spare += range(old + more - 1, old - 1, -1)

    def writable(self, sequences, begin, end):
        """Gives each list of pages own pages at [begin, end): new ones, and copies of shared ones. Whether any changed.

        Only the first may be there already: the others are behind what is packed.
        """
        changed = False
        for pages in sequences:
            if begin < len(pages) and self.holders[pages[begin]] > 1:
                own = self.take()
                self.bytes[own] = self.bytes[pages[begin]]
                self.release([pages[begin]])
                pages[begin], changed = own, True
            while len(pages) < end:
                pages.append(self.take())
                changed = True
        return changed

    def add(self, content):
        """Numbers of new pages, not yet held, with this content (uint8, one page after the other)."""
        count = content.numel() // self.page_bytes
        self._grow(count)
        numbers = [self.spare.pop() for _ in range(count)]
        if count:
            index = torch.tensor(numbers, device=self.bytes.device)
            self.bytes[index] = content.view(count, self.page_bytes).to(self.bytes.device)
        return numbers

    def bytes_of(self, pages):
        """The content of some pages, on the host."""
        if not pages:
            return torch.empty(0, dtype=torch.uint8)
        return self.bytes[torch.tensor(pages, device=self.bytes.device)].cpu().reshape(-1)

    def bytes_held(self, sequences):
        """Bytes of the pages that these hold, and of the spare ones."""
        return (len({page for pages in sequences for page in pages}) + len(self.spare)) * self.page_bytes
