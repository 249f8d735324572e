"""Stands in for the CUDA kernels on a machine without a GPU: pages of plain floats in CPU memory, attention in double.

It takes what CudaLayer hands to its kernels (addresses of pages, spans of raw tokens, counts) and does the plain thing
with it, so that the layer's bookkeeping can be held against the C++ Layer's under a recipe that codes nothing.
"""

import ctypes

import numpy as np
import torch

BLOCK, PAGE = 16, 64


class PlainKernels:
    def __init__(self, device, recipe, kv_heads, head_dim_k, head_dim_v, dtype, layer_index):
        assert recipe.k_bits == 32
        self.recipe, self.kv_heads, self.dims = recipe, kv_heads, (head_dim_k, head_dim_v)
        self.page_bytes = kv_heads * 4 * PAGE * (head_dim_k + head_dim_v)  # multiples of 64 for even head sizes
        self.failed = False

    def forgive(self):
        pass

    def copy(self):
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def rotations(self, dense):
        return [(None, None, None)] * 2

    def bind(self, batch, pages, rotations, offset, factors, turn, **constants):
        self.batch, self.pages, self.constants = batch, pages, constants

    def _block(self, b, token):
        """K and V [kv_heads, 16, head_dim] of the block of a token, as views of its page in memory."""
        where = self.pages.described()
        assert where.table == self.pages._table.data_ptr()
        address = int(self.pages._table[b, token // PAGE - where.first_page])
        floats = np.frombuffer((ctypes.c_char * self.page_bytes).from_address(address), np.float32)
        blocks = floats.reshape(self.kv_heads, PAGE // BLOCK, -1)[:, token % PAGE // BLOCK]
        k = BLOCK * self.dims[0]
        return blocks[:, :k].reshape(self.kv_heads, BLOCK, -1), blocks[:, k:].reshape(self.kv_heads, BLOCK, -1)

    def encode(self, pair, data_first, begin, end):
        for b in range(self.batch):
            for token in range(begin, end):
                for to, x in zip(self._block(b, token), pair, strict=True):
                    to[:, token % BLOCK] = x[b, :, token - data_first].float().numpy()

    def copy_raw(self, pair, room, slot):
        for to, x in zip(room, pair, strict=True):
            to[:, :, slot : slot + x.shape[2]] = x

    def decode(self, first_token, tokens, out_first, parts):
        for b in range(self.batch):
            for token in range(first_token, first_token + tokens):
                for out, x in zip(parts, self._block(b, token), strict=True):
                    out[b, :, token - out_first] = torch.from_numpy(x[:, token % BLOCK].copy())

    def attend(self, query, out, scale, softcap, sinks, mask, counts, spans):
        length, first, packed_end, kept = counts
        sink, window, raw_window = (self.constants[name] for name in ("sink_tokens", "sliding_window", "raw_window"))
        batch, heads, queries, _ = query.shape
        for b in range(batch):
            for i in range(queries):
                position = length - queries + i
                raw_from = max(position // BLOCK * BLOCK - raw_window, sink, min(kept, position + 1))
                low, high = first, position + 1
                if mask is not None:
                    low, high = max(low, length - mask.shape[3]), length
                elif window:
                    low = max(low, position + 1 - window)
                keys, values = [], []

                def take(pair, slot, token, keys=keys, values=values, b=b, i=i):
                    if mask is None or mask[b, 0, i, token - (length - mask.shape[3])]:
                        keys.append(pair[0][:, slot])
                        values.append(pair[1][:, slot])

                for token in range(max(low, sink), min(high, raw_from, packed_end)):
                    take([torch.from_numpy(x.copy()) for x in self._block(b, token)], token % BLOCK, token)
                for (k, v), at, begin, end, are_sinks in spans:
                    for token in range(max(begin, low if are_sinks else max(low, raw_from)), min(end, high)):
                        take((k[b], v[b]), token - at, token)
                if not keys:
                    out[b, i] = 0.0
                    continue
                k, v = (torch.stack(x, 1).double().repeat_interleave(heads // self.kv_heads, 0) for x in (keys, values))
                scores = (k @ query[b, :, i].double()[..., None])[..., 0] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks.double()[:, None]], 1)
                weights = scores.softmax(1)[:, : v.shape[1]]
                out[b, i] = (weights[:, None] @ v)[:, 0].to(out.dtype)
