"""Stands in for a GPU's kernels on a machine without one: pages of plain floats in CPU memory, attention in double.

It takes what GpuLayer hands to its kernels (pages, spans of raw tokens, counts) and does the plain thing with it, so
that the layer's bookkeeping can be held against the C++ Layer's under a recipe that codes nothing.
"""

import ctypes

import numpy as np
import torch

from halfbyte.cuda_pages import CudaPages
from halfbyte.gpu_kernels import GpuKernels
from halfbyte.mps_pages import MpsPages

BLOCK, PAGE = 16, 64


class PlainKernels(GpuKernels):
    """With the pages of CUDA: addresses."""

    takes_new = True

    @staticmethod
    def why_not(device, config, exact=False):
        assert config["recipe"].k_bits == 32

    @property
    def page_bytes(self):
        return self.kv_heads * 4 * PAGE * sum(self.dims)  # multiples of 64 for even head sizes

    def pages(self, batch):
        return CudaPages(batch, self.page_bytes, self.device, one_by_one=self.sliding_window > 0)

    def bind(self, batch, pages, offset, factors, turn, warm_up):
        self.batch, self.held = batch, pages

    def _page(self, b, number):
        """Address of a sequence's page."""
        where = self.held.described()
        assert where.table == self.held._table.data_ptr()
        return int(self.held._table[b, number - where.first_page])

    def _blocks(self, b, begin, end):
        """For each block of [begin, end): its tokens' slots there and in the range, and its K and V in memory."""
        for first in range(begin // BLOCK * BLOCK, end, BLOCK):
            lo, hi = max(first, begin), min(first + BLOCK, end)
            page = (ctypes.c_char * self.page_bytes).from_address(self._page(b, first // PAGE))
            blocks = torch.from_numpy(np.frombuffer(page, np.float32)).view(self.kv_heads, PAGE // BLOCK, -1)
            block = blocks[:, first % PAGE // BLOCK].split([BLOCK * dim for dim in self.dims], 1)
            pair = [x.view(self.kv_heads, BLOCK, dim) for x, dim in zip(block, self.dims, strict=True)]
            yield slice(lo - first, hi - first), slice(lo - begin, hi - begin), pair

    def encode(self, pair, data_first, begin, end):
        for b in range(self.batch):
            for there, here, block in self._blocks(b, begin, end):
                for to, x in zip(block, pair, strict=True):
                    to[:, there] = x[b, :, begin - data_first : end - data_first][:, here]

    def copy_raw(self, pair, room, slot):
        for to, x in zip(room, pair, strict=True):
            to[:, :, slot : slot + x.shape[2]] = x

    def decode(self, first_token, tokens, out_first, parts):
        for b in range(self.batch):
            for there, here, block in self._blocks(b, first_token, first_token + tokens):
                for out, x in zip(parts, block, strict=True):
                    out[b, :, first_token - out_first :][:, here] = x[:, there]

    def attend(self, query, out, scale, softcap, sinks, mask, counts, spans, new=None, strides=None):
        if new is not None:
            room, at, _, end, _ = spans[-1]
            self.copy_raw(new, room, end - 1 - at)
        length, first, packed_end, kept = counts
        sink, window, raw_window = self.recipe.sink_tokens, self.sliding_window, self.recipe.raw_window
        batch, heads, queries, _ = query.shape
        packed_first = max(first, sink)
        packed = [torch.empty(batch, self.kv_heads, max(packed_end - packed_first, 0), dim) for dim in self.dims]
        self.decode(packed_first, packed[0].shape[2], packed_first, packed)
        for i in range(queries):
            position = length - queries + i
            raw_from = max(position // BLOCK * BLOCK - raw_window, sink, min(kept, position + 1))
            low, high = first, position + 1
            if mask is not None:
                low, high = max(low, length - mask.shape[3]), length
            elif window:
                low = max(low, position + 1 - window)
            parts = [(packed, packed_first, max(low, sink), min(high, raw_from, packed_end))]
            for pair, at, begin, end, are_sinks in spans:
                parts.append((pair, at, max(begin, low if are_sinks else max(low, raw_from)), min(end, high)))
            parts = [part for part in parts if part[2] < part[3]]
            if not parts:
                out[:, i] = 0.0
                continue
            group = heads // self.kv_heads
            k, v = (
                torch.cat([pair[side][:, :, lo - at : hi - at] for pair, at, lo, hi in parts], 2)
                .double()
                .repeat_interleave(group, 1)
                for side in (0, 1)
            )
            scores = (k @ query[:, :, i].double()[..., None])[..., 0] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                shown = torch.cat(
                    [mask[:, 0, i, lo - length + mask.shape[3] :][:, : hi - lo] for _, _, lo, hi in parts], 1
                )
                scores = scores.masked_fill(~shown[:, None], -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None].expand(batch, -1, 1)], 2)
            weights = scores.softmax(2).nan_to_num()[:, :, None, : v.shape[2]]  # rows that see nothing give zeros
            out[:, i] = (weights @ v)[:, :, 0].to(out.dtype)


class PlainKernelsOfMps(PlainKernels):
    """With the pages of Metal: places in one buffer."""

    takes_new = False

    def pages(self, batch):
        return MpsPages(batch, self.page_bytes, self.device)

    def _page(self, b, number):
        return self.held.pool.bytes.data_ptr() + int(self.held.table()[b, number - self.held.first])
