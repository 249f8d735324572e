// Launches attention: the tensor-core kernel where the geometry has one, the portable bodies elsewhere.
#include "cuda/attend.cuh"
#include "gpu/attend_packed.h"

#include <algorithm>

#include "cuda/layer.h"
#include "numbers.h"

namespace halfbyte::gpu {
namespace {

// ---- The portable way: a thread block some tokens of a tile of rows, then one a tile for the merge

struct PortableCall {
  AttendCall base;
  int begin, end;  // packed tokens that any query sees
  int splits;
  int most_splits;  // whatever the tokens
  LengthRule rule;  // without cells, the counts are those of the call
};

constexpr int kSmallestSplit = 128;  // tokens

HALFBYTE_INLINE int segments_of(const AttendShape& s) { return s.batch * s.kv_heads * row_tiles(s); }

HALFBYTE_INLINE void split_tokens(PortableCall& call) {
  packed_range(call.base.shape, call.base.buffers.mask != nullptr, call.begin, call.end);
  call.splits = call.begin < call.end ? max(1, min(call.most_splits, (call.end - call.begin) / kSmallestSplit)) : 0;
}

// One kernel for both kinds of length: in two, the compiler would join products and sums differently.
__device__ __forceinline__ const PortableCall& with_length(const PortableCall& launched, uint64_t* memory) {
  PortableCall& call = copy_call(launched, memory);
  if (call.rule.cells) {
    if (threadIdx.x == 0) {
      take_counts(call.base.shape, call.rule, call.base.buffers.mask != nullptr);
      call.base.n_raw = take_raw(call.base.raw, call.base.shape, call.rule);
      split_tokens(call);
    }
    __syncthreads();
  }
  return call;
}

template <int Spans>
__global__ void __launch_bounds__(kAttendThreads) portable_kernel(const __grid_constant__ PortableCall launched) {
  __shared__ uint64_t call_memory[sizeof(PortableCall) / 8];
  const PortableCall& call = with_length(launched, call_memory);
  const AttendShape& s = call.base.shape;
  if ((int)blockIdx.x >= segments_of(s) * call.splits) return;
  const int tiles = row_tiles(s), segment = blockIdx.x / call.splits, split = blockIdx.x % call.splits;
  attend_packed<0, Spans>(s, call.base.buffers, segment / tiles / s.kv_heads, segment / tiles % s.kv_heads,
                          segment % tiles, part_of({call.begin, call.end}, split, call.splits), shared_memory<float>(),
                          call.base.buffers.partials + (long long)blockIdx.x * partial_floats(s), threadIdx.x);
}

template <bool Wide>
__global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ PortableCall launched) {
  __shared__ uint64_t call_memory[sizeof(PortableCall) / 8];
  const PortableCall& call = with_length(launched, call_memory);
  const AttendShape& s = call.base.shape;
  const int tiles = row_tiles(s), segment = blockIdx.x;
  finish<Wide>(s, call.base.buffers, call.base.raw, call.base.n_raw,
               call.base.buffers.partials + (long long)segment * call.splits * partial_floats(s), call.splits,
               segment / tiles / s.kv_heads, segment / tiles % s.kv_heads, segment % tiles, shared_memory<float>(),
               threadIdx.x, blockDim.x);
}

int most_splits(const AttendShape& s) { return (4 * multiprocessors() + segments_of(s) - 1) / segments_of(s); }

int widest(const PageFormat& f) { return std::max(f.k.padded_dim, f.v.padded_dim); }

size_t portable_bytes(const AttendCall& base) {
  const PageFormat& f = base.shape.format;
  return attend_floats(f.k.head_dim, widest(f), base.buffers.turn.waves ? base.buffers.turn.pairs : 0) * 4;
}

size_t finish_bytes(const AttendShape& s) {
  return finish_floats(s.format.k.head_dim, s.format.v.padded_dim, s.format.v.head_dim) * 4;
}

// For heads of up to so many channels, padded.
auto portable_kernel_for(int padded) {
  return padded <= 64    ? portable_kernel<2>
         : padded <= 128 ? portable_kernel<4>
         : padded <= 256 ? portable_kernel<8>
                         : portable_kernel<kMaxHeadDim / kSpan>;
}

int attend_portable(const AttendCall& base, const LengthRule& rule, void* stream) {
  const AttendShape& s = base.shape;
  PortableCall call{base, 0, 0, 0, most_splits(s), rule};
  if (!rule.cells) split_tokens(call);
  const int segments = segments_of(s), splits = rule.cells ? call.most_splits : call.splits;
  if (splits)
    if (int error = launch(portable_kernel_for(widest(s.format)), segments * splits, kAttendThreads,
                           portable_bytes(base), stream, call))
      return error;
  return launch(s.dtype == kFloat32 ? finish_kernel<true> : finish_kernel<false>, segments, 256, finish_bytes(s),
                stream, call);
}

// ---- The tensor-core way

// For lengths that the call names, and for those in device memory; null where there is none.
struct AttendKernels {
  void (*call)(AttendCall) = nullptr;
  void (*step)(AttendStep) = nullptr;
};

template <int D, int KBits, int VBits, Groups KGroups, Groups VGroups, class Scale>
AttendKernels kernels() {
  return {attend_kernel<D, KBits, VBits, KGroups, VGroups, Scale>,
          attend_step_kernel<D, KBits, VBits, KGroups, VGroups, Scale>};
}

// The kinds that recipes use; what is not here goes the portable way.
template <int D>
AttendKernels kernels_for(const PageFormat& f, Groups k, Groups v) {
  const bool wide = f.k.scale_bytes == 4;
  if (k == kHalves || v == kHalves)
    return k == v && f.k.bits == 4 && f.v.bits == 4 && !wide ? kernels<D, 4, 4, kHalves, kHalves, __half>()
                                                             : AttendKernels();
  if (f.v.bits == 8) return {};
  if (f.k.bits == 8) return v == kWhole && !wide ? kernels<D, 8, 4, kSpans, kWhole, __half>() : AttendKernels();
  if (wide) return v == kWhole ? kernels<D, 4, 4, kSpans, kWhole, float>() : kernels<D, 4, 4, kSpans, kSpans, float>();
  return v == kWhole ? kernels<D, 4, 4, kSpans, kWhole, __half>() : kernels<D, 4, 4, kSpans, kSpans, __half>();
}

Groups groups_of(const SideFormat& f) { return f.n_groups == 1 ? kWhole : f.group < kSpan ? kHalves : kSpans; }

AttendKernels kernels_for(const PageFormat& f, int dtype) {
  if (f.k.head_dim != f.v.head_dim || dtype == kFloat32) return {};
  switch (f.k.head_dim) {
    case 64:
      return kernels_for<64>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    case 128:
      return kernels_for<128>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    case 256:
      return kernels_for<256>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    default:
      return {};
  }
}

// A span's group is span >> shift, where groups are whole spans.
int shift_of(const SideFormat& f) { return f.n_groups == 1 ? 31 : f.group == 2 * kSpan; }

// Sets warps and stages to what fits in shared memory beside `other` bytes; false if two stages do not.
bool plan_memory(AttendCall& call, size_t other) {
  const PageFormat& f = call.shape.format;
  for (call.warps = max_warps(f.v.head_dim); call.warps >= 2; call.warps /= 2) {
    call.plan = work_plan(f.v.head_dim, call.warps, call.buffers.turn.waves != nullptr);
    const int room = shared_memory_limit() - 64 - (int)other - call.plan.end * 4;
    call.stages = std::min(kMaxStages, room / (call.warps * stage_bytes(f)));
    if (call.stages >= 2) return true;
  }
  return false;
}

AttendCall call_of(const HalfbyteCudaAttend& a) {
  AttendCall call{};
  AttendShape& s = call.shape;
  s.format = page_format(a.layer);
  s.batch = (int)a.batch, s.kv_heads = (int)a.layer.kv_heads, s.group = (int)(a.heads / a.layer.kv_heads);
  s.queries = (int)a.queries, s.dtype = (int)a.layer.dtype, s.scale = (float)a.scale, s.softcap = (float)a.softcap;
  s.length = (int)a.length, s.first = (int)a.first, s.sliding_window = (int)a.sliding_window, s.causal = (int)a.causal;
  s.sink_tokens = (int)a.sink_tokens, s.packed_end = (int)a.packed_end, s.raw_window = (int)a.raw_window;
  s.warm_up = (int)a.warm_up, s.kept = (int)a.kept, s.mask_tokens = (int)a.mask_tokens;
  s.mask_batch_stride = a.mask_batch_stride, s.mask_query_stride = a.mask_query_stride;
  s.q_strides = strides_of(a.q), s.out_strides = strides_of(a.out);
  AttendBuffers& in = call.buffers;
  in.q = bytes_of(a.q.data), in.out = bytes_of(a.out.data), in.mask = bytes_of(a.mask), in.sinks = a.sinks;
  in.rotation_k = table_of(a.k), in.rotation_v = table_of(a.v);
  in.offset_k = a.k.offset, in.offset_v = a.v.offset;
  in.inverse_lambda_k = a.k.inverse_lambda, in.inverse_lambda_v = a.v.inverse_lambda;
  if (a.k.offset) in.turn = turn_of(a.turn);
  in.pages = pages_of(a.pages), in.partials = static_cast<float*>(a.space);
  call.new_token = {bytes_of(a.new_k.data), bytes_of(a.new_v.data), strides_of(a.new_k), strides_of(a.new_v)};
  call.n_raw = (int)a.n_raw, call.arrivals = a.arrivals;
  for (int i = 0; i < call.n_raw; i++) call.raw[i] = raw_of(a.raw[i]);
  call.raw_blocks = raw_blocks(call);
  return call;
}

// Rows that the kernel can load 16 bytes at a time, and write 4.
bool is_aligned(const HalfbyteCudaAttend& a) {
  const auto fits = [](const HalfbyteCudaView& view, uintptr_t bytes) {
    return ((uintptr_t)view.data | 2 * (view.batch_stride | view.head_stride | view.token_stride)) % bytes == 0;
  };
  bool all = fits(a.q, 16) && fits(a.out, 4) && a.turn.pairs % 2 == 0 && (uintptr_t)a.turn.waves % 16 == 0;
  for (int i = 0; i < a.n_raw; i++) all = all && fits(a.raw[i].k, 16) && fits(a.raw[i].v, 16);
  return all;
}

// Completes what does not depend on the tokens, of which there are at most so many; false if the call is one for the
// portable kernels. other: bytes of shared memory that the kernel has beside its work space.
bool plan(AttendCall& call, const HalfbyteCudaAttend& a, long long tokens, size_t other) {
  const AttendShape& s = call.shape;
  if (a.portable || !a.k.attend_fragments || !is_aligned(a) || !kernels_for(s.format, s.dtype).call) return false;
  if (!plan_memory(call, other)) return false;
  const long long counted = (tokens + kTileTokens - 1) / kTileTokens + kSegmentTiles;  // of a segment, in 32 bits
  if (segments_of(s) * counted >= 1 << 30) return false;
  call.bytes = stage_bytes(s.format), call.head_bytes = (int)page_head_bytes(s.format);
  call.k_shift = shift_of(s.format.k), call.v_shift = shift_of(s.format.v);
  call.fragments[0] = static_cast<const uint4*>(a.k.attend_fragments);
  call.fragments[1] = static_cast<const uint4*>(a.v.attend_fragments);
  return true;
}

size_t shared_bytes(const AttendCall& call) {
  return call.plan.end * 4 + (size_t)call.warps * call.stages * stage_bytes(call.shape.format);
}

// Copies the new token to where the call reads it, for kernels that do not.
int keep_new_token(const HalfbyteCudaAttend& a) {
  const HalfbyteCudaRaw& raw = a.raw[a.n_raw - 1];
  const int64_t bytes = (raw.end - 1 - raw.first) * (a.layer.dtype == kFloat32 ? 4 : 2);
  HalfbyteCudaCopy copy{a.layer, a.new_k, a.new_v, raw.k, raw.v, a.batch, 1, a.device, a.stream};
  copy.k_to.data = bytes_of(raw.k.data) + bytes * raw.k.token_stride;
  copy.v_to.data = bytes_of(raw.v.data) + bytes * raw.v.token_stride;
  return halfbyte_cuda_copy(&copy);
}

int attend_step(const HalfbyteCudaAttend& a) {
  AttendStep step{call_of(a), rule_of(a.at), multiprocessors()};
  const AttendShape& s = step.call.shape;
  if (!plan(step.call, a, a.at.capacity, sizeof step.call)) return attend_portable(step.call, step.rule, a.stream);
  return launch(kernels_for(s.format, s.dtype).step, std::max(segments_of(s), step.processors), step.call.warps * kSimd,
                shared_bytes(step.call), a.stream, step);
}

}  // namespace
}  // namespace halfbyte::gpu

using namespace halfbyte;
using namespace halfbyte::gpu;

extern "C" int halfbyte_cuda_attend(const HalfbyteCudaAttend* a) {
  const OnDevice device(a->device);
  if (a->at.cells) return attend_step(*a);
  AttendCall call = call_of(*a);
  const AttendShape& s = call.shape;
  int begin, end;
  packed_range(s, a->mask != nullptr, begin, end);
  if (!plan(call, *a, std::max(end - begin, 0), 0)) {
    if (a->new_k.data)
      if (int error = keep_new_token(*a)) return error;
    return attend_portable(call, {}, a->stream);
  }
  deal_tiles(call, begin, end, segments_of(s), multiprocessors());
  return launch(kernels_for(s.format, s.dtype).call, call.blocks, call.warps * kSimd, shared_bytes(call), a->stream,
                call);
}

extern "C" int64_t halfbyte_cuda_attend_space(const HalfbyteCudaAttend* a) {
  const OnDevice device(a->device);
  const AttendShape s = call_of(*a).shape;
  const int64_t segments = segments_of(s);
  const int64_t portable = segments * most_splits(s) * partial_floats(s) * 4;
  // The tensor-core way: a slot a segment, and one a thread block, of which there are as many or a round of them.
  const int64_t slots = 2 * segments + multiprocessors(), d = s.format.v.head_dim;
  return std::max(portable, slots * part_bytes(d) + segments * raw_bytes(d));
}

extern "C" int64_t halfbyte_cuda_attend_fragment_bytes(const HalfbyteCudaLayer* layer, int64_t is_v) {
  const int64_t d = layer->head_dim_k;
  return kernels_for(page_format(*layer), (int)layer->dtype).call ? (is_v ? 1 : kQueryTerms) * 2 * d * d : 0;
}

extern "C" void halfbyte_cuda_attend_fragments(const HalfbyteCudaLayer* layer, int64_t is_v, const float* rotation,
                                               void* fragments) {
  const int d = (int)layer->head_dim_k;
  auto* out = static_cast<ushort*>(fragments);
  for (int tile = 0; tile < d / 16; tile++)
    for (int step = 0; step < d / 16; step++)
      for (int lane = 0; lane < kSimd; lane++)
        for (int e = 0; e < 8; e++) {
          const Element at = is_v ? result_element(tile, step, lane, e) : query_element(tile, step, lane, e);
          float rest = is_v ? rotation[at.column * d + at.row] : rotation[at.row * d + at.column];
          for (int term = 0; term < (is_v ? 1 : kQueryTerms); term++) {
            const ushort bits = float_to_half(rest);
            out[(term * fragment_at(d, d / 16, 0, 0) + fragment_at(d, tile, step, lane)) * 8 + e] = bits;
            rest -= half_to_float(bits);
          }
        }
}
