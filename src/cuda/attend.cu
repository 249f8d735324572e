// Launches attention: the tensor-core kernel where the geometry has one, the portable bodies elsewhere.
#include "cuda/attend.cuh"
#include "gpu/attend_packed.h"

#include <algorithm>

#include "cuda/layer.h"

namespace halfbyte::gpu {
namespace {

// ---- The portable way: a thread block some tokens of a tile of rows, then one a tile for the merge

struct PortableCall {
  AttendCall base;
  int begin, end;  // packed tokens that any query sees
  int splits;
};

constexpr int kSmallestSplit = 128;  // tokens

template <int Spans>
__global__ void __launch_bounds__(kAttendThreads) portable_kernel(const __grid_constant__ PortableCall call) {
  float* memory = shared_memory<float>();
  const AttendShape& s = call.base.shape;
  const int tiles = row_tiles(s), segment = blockIdx.x / call.splits, split = blockIdx.x % call.splits;
  attend_packed<0, Spans>(s, call.base.buffers, segment / tiles / s.kv_heads, segment / tiles % s.kv_heads,
                          segment % tiles, part_of({call.begin, call.end}, split, call.splits), memory,
                          call.base.buffers.partials + (long long)blockIdx.x * partial_floats(s), threadIdx.x);
}

// For heads of up to so many channels, padded.
auto portable_kernel_for(int padded) {
  return padded <= 64    ? portable_kernel<2>
         : padded <= 128 ? portable_kernel<4>
         : padded <= 256 ? portable_kernel<8>
                         : portable_kernel<kMaxHeadDim / kSpan>;
}

template <bool Wide>
__global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ PortableCall call) {
  float* memory = shared_memory<float>();
  const AttendShape& s = call.base.shape;
  const int tiles = row_tiles(s), segment = blockIdx.x;
  finish<Wide>(s, call.base.buffers, call.base.raw, call.base.n_raw,
               call.base.buffers.partials + (long long)segment * call.splits * partial_floats(s), call.splits,
               segment / tiles / s.kv_heads, segment / tiles % s.kv_heads, segment % tiles, memory, threadIdx.x,
               blockDim.x);
}

int most_splits(const AttendShape& s) {
  const int segments = s.batch * s.kv_heads * row_tiles(s);
  return (4 * multiprocessors() + segments - 1) / segments;
}

int splits_of(const AttendShape& s, int begin, int end) {
  return std::max(1, std::min(most_splits(s), (end - begin) / kSmallestSplit));
}

int attend_portable(const AttendCall& base, int begin, int end, void* stream) {
  const AttendShape& s = base.shape;
  const int segments = s.batch * s.kv_heads * row_tiles(s);
  PortableCall call{base, begin, end, begin < end ? splits_of(s, begin, end) : 0};
  const int padded = std::max(s.format.k.padded_dim, s.format.v.padded_dim);
  const int pairs = base.buffers.turn.waves ? base.buffers.turn.pairs : 0;
  if (call.splits)
    if (int error = launch(portable_kernel_for(padded), segments * call.splits, kAttendThreads,
                           attend_floats(s.format.k.head_dim, padded, pairs) * 4, stream, call))
      return error;
  return launch(s.dtype == kFloat32 ? finish_kernel<true> : finish_kernel<false>, segments, 256,
                finish_floats(s.format.k.head_dim, s.format.v.padded_dim, s.format.v.head_dim) * 4, stream, call);
}

// ---- The tensor-core way

using AttendKernel = void (*)(AttendCall);

// The kinds that recipes use; what is not here goes the portable way.
template <int D>
AttendKernel kernel_for(const PageFormat& f, Groups k, Groups v) {
  const bool wide = f.k.scale_bytes == 4;
  if (k == kHalves || v == kHalves)
    return k == v && f.k.bits == 4 && f.v.bits == 4 && !wide ? attend_kernel<D, 4, 4, kHalves, kHalves, __half>
                                                             : nullptr;
  if (f.v.bits == 8) return nullptr;
  if (f.k.bits == 8) return v == kWhole && !wide ? attend_kernel<D, 8, 4, kSpans, kWhole, __half> : nullptr;
  if (wide)
    return v == kWhole ? attend_kernel<D, 4, 4, kSpans, kWhole, float> : attend_kernel<D, 4, 4, kSpans, kSpans, float>;
  return v == kWhole ? attend_kernel<D, 4, 4, kSpans, kWhole, __half> : attend_kernel<D, 4, 4, kSpans, kSpans, __half>;
}

Groups groups_of(const SideFormat& f) { return f.n_groups == 1 ? kWhole : f.group < kSpan ? kHalves : kSpans; }

// Null where there is no kernel.
AttendKernel kernel_for(const PageFormat& f, int dtype) {
  if (f.k.head_dim != f.v.head_dim || dtype == kFloat32) return nullptr;
  switch (f.k.head_dim) {
    case 64:
      return kernel_for<64>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    case 128:
      return kernel_for<128>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    case 256:
      return kernel_for<256>(f, groups_of(f.k) == kWhole ? kSpans : groups_of(f.k), groups_of(f.v));
    default:
      return nullptr;
  }
}

// A span's group is span >> shift, where groups are whole spans.
int shift_of(const SideFormat& f) { return f.n_groups == 1 ? 31 : f.group == 2 * kSpan; }

// Sets warps and stages to what fits in shared memory; false if two stages do not.
bool plan_memory(AttendCall& call) {
  const PageFormat& f = call.shape.format;
  for (call.warps = max_warps(f.v.head_dim); call.warps >= 2; call.warps /= 2) {
    const int room = shared_memory_limit() - 64 - ring_start(call) * 4;
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
  const int pairs = (int)a.turn.pairs;
  if (a.k.offset && a.turn.waves)
    in.turn = {a.turn.waves, (int)a.turn.span, pairs, a.turn.interleaved ? 2 : 1, a.turn.interleaved ? 1 : pairs};
  in.pages = pages_of(a.pages), in.partials = static_cast<float*>(a.space);
  call.n_raw = (int)a.n_raw, call.arrivals = a.arrivals;
  for (int i = 0; i < call.n_raw; i++) {
    const HalfbyteCudaRaw& raw = a.raw[i];
    call.raw[i] = {bytes_of(raw.k.data), bytes_of(raw.v.data), strides_of(raw.k), strides_of(raw.v),
                   (int)raw.first,       (int)raw.begin,       (int)raw.end,      (int)raw.are_sinks};
  }
  return call;
}

// Packed tokens that any query sees: queries come in order of position, so the first and the last bound them.
void packed_range(const AttendShape& s, bool masked, int& begin, int& end) {
  begin = std::max(sight_of(s, 0, masked).lo, s.sink_tokens);
  end = 0;
  for (int query = 0; query < s.queries; query++) end = std::max(end, sight_of(s, query * s.group, masked).packed_end);
}

// Tiles that take as long as preparing the queries of one more segment and finishing it.
constexpr int kSegmentTiles = 100;
constexpr int kFewestTiles = 2;  // of a warp: with fewer, merging costs more than it saves

// Whole segments to blocks, or equal parts of one segment, unless that leaves too many multiprocessors idle: then
// blocks cross from one segment into the next.
void split_work(AttendCall& call, int all) {
  const int segments = all / call.n_tiles, processors = multiprocessors();
  const int most = std::max(1, call.n_tiles / (call.warps * kFewestTiles));
  call.splits = std::max(1, std::min(most, processors / segments));
  call.blocks = segments * call.splits;
  const int rounds = (call.blocks + processors - 1) / processors;
  if (rounds * (call.n_tiles / call.splits + kSegmentTiles) <= all / processors + 2 * kSegmentTiles ||
      call.splits == most)
    return;
  call.splits = 0;
  call.blocks = std::min(processors, (all + call.warps - 1) / call.warps);
  call.share = all / call.blocks, call.larger = all % call.blocks;
}

// Completes the call; false if it is one for the portable kernels.
bool plan(AttendCall& call, const HalfbyteCudaAttend& a, int& begin, int& end) {
  packed_range(call.shape, a.mask != nullptr, begin, end);
  if (a.portable || begin >= end || !kernel_for(call.shape.format, call.shape.dtype) || !plan_memory(call))
    return false;
  call.first_tile = begin / kTileTokens, call.n_tiles = (end + kTileTokens - 1) / kTileTokens - call.first_tile;
  const AttendShape& s = call.shape;
  const long long all = (long long)s.batch * s.kv_heads * row_tiles(s) * call.n_tiles;
  if (all >= 1 << 30) return false;  // items are counted in 32 bits
  call.k_shift = shift_of(s.format.k), call.v_shift = shift_of(s.format.v);
  split_work(call, (int)all);
  return true;
}

}  // namespace
}  // namespace halfbyte::gpu

using namespace halfbyte;
using namespace halfbyte::gpu;

extern "C" int halfbyte_cuda_attend(const HalfbyteCudaAttend* a) {
  const OnDevice device(a->device);
  AttendCall call = call_of(*a);
  int begin, end;
  if (!plan(call, *a, begin, end)) return attend_portable(call, begin, end, a->stream);
  const PageFormat& f = call.shape.format;
  const size_t bytes = ring_start(call) * 4 + (size_t)call.warps * call.stages * stage_bytes(f);
  return launch(kernel_for(f, call.shape.dtype), call.blocks, call.warps * kSimd, bytes, a->stream, call);
}

extern "C" int64_t halfbyte_cuda_attend_space(const HalfbyteCudaAttend* a) {
  const OnDevice device(a->device);
  const AttendShape s = call_of(*a).shape;
  const int64_t segments = (int64_t)s.batch * s.kv_heads * row_tiles(s);
  // The tensor-core way: a slot a segment, and one a thread block, of which there are as many or a round of them.
  const int64_t fast = 2 * segments + multiprocessors(), portable = segments * most_splits(s);
  return std::max(fast, portable) * partial_floats(s) * 4;
}
