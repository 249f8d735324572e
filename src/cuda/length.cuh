// A step of one token a sequence whose length lies in device memory, so that a CUDA graph can repeat its launches.
//
// Everything else follows from the length by the rules of Layer::State: kernels of such a step take the call as it was
// captured and put in the numbers that go with the length.
#pragma once

#include "cuda/halfbyte_cuda.h"
#include "cuda/work.cuh"

namespace halfbyte::gpu {

// The cells of HalfbyteCudaLength.
enum { kSeenCell, kLengthCell, kNewCell, kPackedFromCell, kOffsetReadyCell, kBadCell, kFullCell };

// Numbers of a layer that never change; see HalfbyteCudaLength.
struct LengthRule {
  int64_t* cells;
  int capacity, tail_slots;
  int sink_tokens, raw_window, warm_up, sliding_window;
};

inline LengthRule rule_of(const HalfbyteCudaLength& at) {
  return {at.cells,           (int)at.capacity, (int)at.tail_slots,    (int)at.sink_tokens,
          (int)at.raw_window, (int)at.warm_up,  (int)at.sliding_window};
}

// Tokens from the sinks to here are packed when there are `length` tokens. packed_from: how many were when the caller
// last said so; tokens that fill up a block of them are packed one by one.
HALFBYTE_INLINE int packed_end_at(const LengthRule& rule, int packed_from, int length) {
  const int filled = (packed_from + kBlockTokens - 1) / kBlockTokens * kBlockTokens;
  const int one_by_one = filled < length ? filled : length, whole = raw_start(rule, length - 1);
  const int end = one_by_one > whole ? one_by_one : whole;
  return end > packed_from ? end : packed_from;
}

// The tokens that a step packs, once the length counts its own.
struct Packing {
  int begin, end;
};

HALFBYTE_INLINE Packing packing_of(const LengthRule& rule, int packed_from, int length, int new_tokens) {
  return {packed_end_at(rule, packed_from, length - new_tokens), packed_end_at(rule, packed_from, length)};
}

// First position of the round through the tail's slots that a token is in.
HALFBYTE_INLINE int tail_round(const LengthRule& rule, int token) { return token / rule.tail_slots * rule.tail_slots; }

// Sets what an attention call of one new token knows by the length. raw: the sinks and the tail's slots, as launched.
HALFBYTE_INLINE void take_counts(AttendShape& s, const LengthRule& rule, bool masked) {
  s.length = (int)rule.cells[kLengthCell];
  s.packed_end = s.kept = packed_end_at(rule, (int)rule.cells[kPackedFromCell], s.length);
  s.first = rule.sliding_window ? max(0, s.length - rule.sliding_window) : 0;
  if (masked) s.mask_tokens = s.length;  // a mask has columns for the whole capacity, from position 0 on
}

// The raw tokens of a call as launched, sinks and tail, to those there are: sinks unless a window has passed them, and
// the tail in up to two pieces. Returns how many.
HALFBYTE_INLINE int take_raw(RawTokens* raw, const AttendShape& s, const LengthRule& rule) {
  const RawTokens sinks = raw[0], tail = raw[1];
  int n = 0;
  if (rule.sink_tokens > s.first && s.length) raw[n] = sinks, raw[n++].end = min(rule.sink_tokens, s.length);
  for (int begin = s.packed_end; begin < s.length;) {
    const int round = tail_round(rule, begin), end = min(s.length, round + rule.tail_slots);
    raw[n] = tail, raw[n].first = round, raw[n].begin = begin, raw[n++].end = end;
    begin = end;
  }
  return n;
}

// All of a tensor-core call's counts, and how its tiles are dealt to thread blocks.
HALFBYTE_INLINE void take_length(AttendCall& call, const LengthRule& rule, int processors) {
  AttendShape& s = call.shape;
  const bool masked = call.buffers.mask != nullptr;
  take_counts(s, rule, masked);
  call.n_raw = take_raw(call.raw, s, rule), call.raw_blocks = raw_blocks(call);
  const int segments = s.batch * s.kv_heads * row_tiles(s);
  int begin, end;
  packed_range(s, masked, begin, end);
  deal_tiles(call, begin, end, segments, processors);
}

// ---- A call with numbers of its own

// The call as it was launched, to where one thread may change it. Ends with a barrier.
template <class Call>
__device__ __forceinline__ Call& copy_call(const Call& launched, uint64_t* memory) {
  static_assert(sizeof(Call) % 8 == 0);
  for (int i = threadIdx.x; i < (int)(sizeof(Call) / 8); i += blockDim.x)
    memory[i] = reinterpret_cast<const uint64_t*>(&launched)[i];
  __syncthreads();
  return *reinterpret_cast<Call*>(memory);
}

}  // namespace halfbyte::gpu
