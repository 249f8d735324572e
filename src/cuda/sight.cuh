// Which tokens the two columns of a thread see, a bit a token.
#pragma once

#include "cuda/work.cuh"

namespace halfbyte::gpu {

// Of the 32 tokens from `token` on those in [lo, end).
__device__ __forceinline__ uint32_t bits_between(int token, int lo, int end) {
  const int from = min(max(lo - token, 0), 32), to = max(min(end - token, 32), from);
  return (uint32_t)((1ull << to) - (1ull << from));
}

// Takes from them what the call's mask hides from columns 2t and 2t + 1. By a whole warp, of which each lane reads a
// token: one by one, every thread would wait for memory eight times.
__device__ __forceinline__ void take_mask(const AttendCall& call, int b, int tile, int token, int lane,
                                          uint32_t seen[2]) {
  const AttendShape& s = call.shape;
  const int at = token + lane - (s.length - s.mask_tokens);  // among the mask's tokens
  const bool inside = at >= 0 && at < s.mask_tokens;
  const uchar* shows = call.buffers.mask + b * s.mask_batch_stride + at;
  const int pairs = s.queries == 1 ? 1 : kTileRows / 2;  // of columns that may differ
#pragma unroll 1
  for (int pair = 0; pair < pairs; pair++)
    for (int j = 0; j < 2; j++) {
      const int query = query_place(s, min(tile * kTileRows + 2 * pair + j, rows_of(s) - 1)).query;
      const uint32_t shown = __ballot_sync(0xffffffffu, inside && shows[query * s.mask_query_stride]);
      if (pairs == 1 || pair == lane % 4) seen[j] &= shown;
    }
}

}  // namespace halfbyte::gpu
