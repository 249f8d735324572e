// Launches encoding and decoding, and makes the tables they read.
#include "cuda/encode.cuh"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "cuda/layer.h"
#include "cuda/length.cuh"
#include "gpu/decode.h"
#include "numbers.h"
#include "rotation.h"

namespace halfbyte::gpu {
namespace {

constexpr int kSimds = 8;  // of a portable thread block

// Even thread blocks take K, odd ones V.
__device__ int first_vector(int head_dim) {
  return (blockIdx.x / 2 * blockDim.x / kSimd + threadIdx.x / kSimd) * (kSimd / lanes_of(head_dim));
}

// encode_vectors from vector `first` on. Never in line: what a step packs has to be what an append packs, and in two
// kernels the compiler would join products and sums differently. D: of both sides, which rotates by its fast
// transform, or 0.
template <int D>
__device__ __attribute__((noinline)) void encode_from(const EncodeCall& call, bool is_k, int first, float* memory) {
  encode_vectors<D>(call.shape, call.pages, call.side[is_k ? 0 : 1], is_k, first,
                    memory + threadIdx.x / kSimd * kSimdFloats, call.bad, threadIdx.x % kSimd);
}

template <int D>
__global__ void __launch_bounds__(kSimds* kSimd) portable_encode_kernel(const __grid_constant__ EncodeCall call) {
  __shared__ float memory[kSimds * kSimdFloats];
  const bool is_k = blockIdx.x % 2 == 0;
  const PageFormat& f = call.shape.format;
  encode_from<D>(call, is_k, first_vector(is_k ? f.k.head_dim : f.v.head_dim), memory);
}

struct DecodeCall {
  DecodeShape shape;
  DecodeSide side[2];
  Pages pages;
};

__global__ void __launch_bounds__(kSimds* kSimd) decode_kernel(const __grid_constant__ DecodeCall call) {
  __shared__ float memory[kSimds * kSimdFloats];
  const bool is_k = blockIdx.x % 2 == 0;
  const PageFormat& f = call.shape.format;
  decode_vectors<0>(call.shape, call.pages, call.side[is_k ? 0 : 1], is_k,
                    first_vector(is_k ? f.k.head_dim : f.v.head_dim), memory + threadIdx.x / kSimd * kSimdFloats,
                    threadIdx.x % kSimd);
}

// Thread blocks for all vectors of both sides.
int portable_blocks(const TokenRange& range, const PageFormat& f) {
  const int fewest = std::min(vectors_of(f.k.head_dim), vectors_of(f.v.head_dim)) * kSimds;
  return 2 * ((range.batch * range.kv_heads * range.tokens + fewest - 1) / fewest);
}

struct CopyCall {
  const uchar* from[2];
  uchar* to[2];
  Strides3 from_strides[2], to_strides[2];
  int head_dim[2], kv_heads, tokens, element_bytes;
};

// A thread block a (sequence, head, token); K, then V.
__global__ void copy_kernel(const __grid_constant__ CopyCall call) {
  const int token = blockIdx.x % call.tokens, row = blockIdx.x / call.tokens;
  for (int side = 0; side < 2; side++) {
    const long long from = element_at(call.from_strides[side], row / call.kv_heads, row % call.kv_heads, token);
    const long long to = element_at(call.to_strides[side], row / call.kv_heads, row % call.kv_heads, token);
    for (int c = threadIdx.x; c < call.head_dim[side]; c += blockDim.x)
      if (call.element_bytes == 4)
        reinterpret_cast<uint*>(call.to[side])[to + c] = reinterpret_cast<const uint*>(call.from[side])[from + c];
      else
        reinterpret_cast<ushort*>(call.to[side])[to + c] = reinterpret_cast<const ushort*>(call.from[side])[from + c];
  }
}

OffsetSpans spans_of(const HalfbyteCudaTables& tables) {
  return {(int)tables.offset_span, (int)tables.offset_first, std::max(1, (int)tables.offset_count)};
}

EncodeSide side_of(const SideFormat& f, const HalfbyteCudaView& view, const HalfbyteCudaTables& tables) {
  EncodeSide side{bytes_of(view.data), strides_of(view), table_of(tables), tables.offset, tables.lambda, {},
                  spans_of(tables)};
  std::copy_n(f.signed_scale ? kSearchSigned : kSearch, kSearchSize, side.factors);
  return side;
}

// Rows that 16-byte loads can read.
bool is_aligned(const HalfbyteCudaView& view) {
  return ((uintptr_t)view.data | (uintptr_t)(2 * (view.batch_stride | view.head_stride | view.token_stride))) % 16 == 0;
}

bool has_fragments(const SideFormat& f, int64_t dtype) {
  const int d = f.head_dim;
  return (d == 64 || d == 128 || d == 256) && (f.group == kSpan || f.group == d) && dtype != kFloat32;
}

// The largest element up to `limit`, as bits of fp16 or bf16.
uint32_t limit_bits(float limit, int dtype) {
  if (dtype == kBfloat16) return float_to_bits(limit) >> 16;
  return std::min<uint32_t>(0x7bff, float_to_half(std::min(limit, 65504.0f)));
}

// What the tensor-core kernels for a head size take.
struct FastShape {
  int warps;
  size_t bytes;  // of shared memory
};

template <int D>
constexpr FastShape kFastShape = {kEncodeWarps<D>, sizeof(EncodeMemory<D>)};

FastShape fast_shape(int d) { return d == 64 ? kFastShape<64> : d == 128 ? kFastShape<128> : kFastShape<256>; }

// Thread blocks of the tensor-core kernels for so many blocks of 16 tokens a side: an even number.
int fast_blocks(int blocks, int warps) {
  return 2 * std::max(1, std::min(multiprocessors() / 2, (blocks + warps - 1) / warps));
}

template <class T>
int encode_blocks_with(const EncodeCall& call, void* stream) {
  const int d = call.shape.format.k.head_dim;
  const FastShape shape = fast_shape(d);
  const TokenRange& range = call.shape.range;
  return launch(d == 64    ? encode_kernel<T, 64>
                : d == 128 ? encode_kernel<T, 128>
                           : encode_kernel<T, 256>,
                fast_blocks(range.batch * range.kv_heads * range.tokens / kBlockTokens, shape.warps),
                shape.warps * kSimd, shape.bytes, stream, call);
}

using EncodeKernel = void (*)(EncodeCall);

EncodeKernel portable_kernel(const EncodeCall& call) {
  if (!call.side[0].rotation.factors) return portable_encode_kernel<0>;
  switch (call.shape.format.k.head_dim) {
    case 64:
      return portable_encode_kernel<64>;
    case 128:
      return portable_encode_kernel<128>;
    default:
      return portable_encode_kernel<256>;
  }
}

// Whether both sides have the fast transform that a kernel for their head size takes.
bool has_fast_transform(const HalfbyteCudaEncode& a) {
  const int64_t d = a.layer.head_dim_k;
  return (d == 64 || d == 128 || d == 256) && a.layer.head_dim_v == d && a.k_tables.fast && a.v_tables.fast;
}

int encode_portable(EncodeCall call, int first_token, int tokens, void* stream) {
  if (tokens <= 0) return 0;
  call.shape.range.first_token = first_token, call.shape.range.tokens = tokens;
  return launch(portable_kernel(call), portable_blocks(call.shape.range, call.shape.format), kSimds * kSimd, 0, stream,
                call);
}

// ---- What a step packs whose length is in device memory: a block of 16 tokens, rarely several or a single token

struct EncodeStep {
  EncodeCall call;  // without the range
  LengthRule rule;
};

constexpr size_t kPortableWarpBytes = kSimdFloats * 4;  // of shared memory

__device__ __forceinline__ void take_range(EncodeCall& call, const LengthRule& rule, Packing packing) {
  call.shape.range.first_token = packing.begin, call.shape.range.tokens = packing.end - packing.begin;
  call.shape.data_first = tail_round(rule, packing.begin);
  OffsetSpans& spans = call.side[0].spans;
  if (spans.span) spans.first = packing.begin / spans.span;
}

// Vector by vector, with as many thread blocks as there are. D: as portable_encode_kernel.
template <int D>
__device__ __forceinline__ void encode_in_turn(const EncodeCall& call, float* memory) {
  const bool is_k = blockIdx.x % 2 == 0;
  const SideFormat& f = is_k ? call.shape.format.k : call.shape.format.v;
  const TokenRange& range = call.shape.range;
  const int step = gridDim.x / 2 * blockDim.x / kSimd * (kSimd / lanes_of(f.head_dim));
  for (int first = first_vector(f.head_dim); first < range.batch * range.kv_heads * range.tokens; first += step) {
    encode_from<D>(call, is_k, first, memory);
    __syncwarp();  // before the memory is filled again
  }
}

// Whole: full blocks go through tensor cores, which take T. Cell 0 is read by no kernel of this launch.
template <class T, int D, bool Whole>
__global__ void __launch_bounds__(Whole ? kEncodeWarps<D> * kSimd : kSimds * kSimd, 1)
    encode_step_kernel(const __grid_constant__ EncodeStep step) {
  __shared__ uint64_t memory[sizeof(EncodeCall) / 8];
  int64_t* cells = step.rule.cells;
  if (blockIdx.x == 0 && threadIdx.x == 0) cells[kSeenCell] = cells[kLengthCell];
  const Packing packing =
      packing_of(step.rule, (int)cells[kPackedFromCell], (int)cells[kLengthCell], (int)cells[kNewCell]);
  if (packing.begin >= packing.end) return;
  EncodeCall& call = copy_call(step.call, memory);
  if (threadIdx.x == 0) take_range(call, step.rule, packing);
  __syncthreads();
  if constexpr (Whole)
    if (packing.begin % kBlockTokens == 0 && packing.end % kBlockTokens == 0) {
      encode_whole_blocks<T>(call, *shared_memory<EncodeMemory<D>>());
      return;
    }
  encode_in_turn<D>(call, shared_memory<float>());
}

template <class T>
int encode_step_with(const EncodeStep& step, void* stream) {
  const int d = step.call.shape.format.k.head_dim;
  const FastShape shape = fast_shape(d);
  const TokenRange& range = step.call.shape.range;
  return launch(d == 64    ? encode_step_kernel<T, 64, true>
                : d == 128 ? encode_step_kernel<T, 128, true>
                           : encode_step_kernel<T, 256, true>,
                fast_blocks(range.batch * range.kv_heads, shape.warps), shape.warps * kSimd,
                std::max(shape.bytes, shape.warps * kPortableWarpBytes), stream, step);
}

int encode_step(EncodeStep step, bool fast, void* stream) {
  EncodeShape& s = step.call.shape;
  if (fast)
    return s.dtype == kBfloat16 ? encode_step_with<__nv_bfloat16>(step, stream)
                                : encode_step_with<__half>(step, stream);
  s.range.tokens = kBlockTokens;
  const int d = step.call.side[0].rotation.factors ? s.format.k.head_dim : 0;
  return launch(d == 64    ? encode_step_kernel<__half, 64, false>
                : d == 128 ? encode_step_kernel<__half, 128, false>
                : d == 256 ? encode_step_kernel<__half, 256, false>
                           : encode_step_kernel<__half, 0, false>,
                portable_blocks(s.range, s.format), kSimds * kSimd, kSimds * kPortableWarpBytes, stream, step);
}

// r in terms of fp16 that add up to it, in the order of fragment_index. Column n of a product is number
// n / 8 · 2 + n % 2 of the channels that threads t = n % 8 / 2 have.
template <int D>
void write_fragments(const float* r, ushort* out) {
  for (int step = 0; step < D / 16; step++)
    for (int half = 0; half < 2; half++)
      for (int n = 0; n < D; n++)
        for (int i = 0; i < 8; i++) {
          const int own = n / 8 * 2 + n % 2;
          const int channel = Values<D>::first_channel(n % 8 / 2, own / 8) + own % 8 / 4 * 16 + own % 4;
          float rest = r[(size_t)channel * D + step * 16 + half * 8 + i];
          for (int term = 0; term < kTerms; term++) {
            const ushort x = float_to_half(rest);
            out[fragment_index(D, term * (D / 16) + step, half, n) * 8 + i] = x;
            rest -= half_to_float(x);  // exact
          }
        }
}

Coding coding_of(const SideFormat& f) {
  constexpr float kRounding = 0x1p-10f;  // more than that of fp16
  Coding coding{};
  for (int c = 0; c < kSearchSize; c++) {
    const float factor = f.signed_scale ? kSearchSigned[c] : kSearch[c];
    coding.candidates[c] = {factor, factor * (1.0f - kRounding), factor * (1.0f + kRounding)};
  }
  const auto half = (float)zero_code(f.bits);
  coding.to_covering = f.signed_scale ? -1.0f / half : 1.0f / (half - 1.0f);
  coding.spares_lowest = lowest_code(f) > -zero_code(f.bits);
  coding.bits = f.bits, coding.group = f.group, coding.scale_bytes = f.scale_bytes;
  coding.search = f.search, coding.signed_scale = f.signed_scale;
  return coding;
}

EncodeCall call_of(const HalfbyteCudaEncode& a) {
  EncodeCall call{};
  EncodeShape& s = call.shape;
  s.format = page_format(a.layer);
  s.range = {(int)a.batch, (int)a.layer.kv_heads, 0, 0}, s.dtype = (int)a.layer.dtype;
  s.data_first = (int)a.data_first, s.limit = (float)a.limit;
  call.side[0] = side_of(s.format.k, a.k, a.k_tables), call.side[1] = side_of(s.format.v, a.v, a.v_tables);
  call.fragments[0] = static_cast<const uint4*>(a.k_tables.fragments);
  call.fragments[1] = static_cast<const uint4*>(a.v_tables.fragments);
  call.rotated_offset[0] = a.k_tables.rotated_offset, call.rotated_offset[1] = a.v_tables.rotated_offset;
  call.coding[0] = coding_of(s.format.k), call.coding[1] = coding_of(s.format.v);
  call.pages = pages_of(a.pages), call.bad = a.bad;
  call.limit_bits = limit_bits(s.limit, s.dtype);
  return call;
}

}  // namespace
}  // namespace halfbyte::gpu

using namespace halfbyte;
using namespace halfbyte::gpu;

extern "C" int halfbyte_cuda_encode(const HalfbyteCudaEncode* a) {
  const OnDevice device(a->device);
  EncodeCall call = call_of(*a);
  EncodeShape& s = call.shape;
  const bool fast = !a->portable && call.fragments[0] && call.fragments[1] &&
                    s.format.k.head_dim == s.format.v.head_dim && is_aligned(a->k) && is_aligned(a->v) &&
                    (int)fast_shape(s.format.k.head_dim).bytes <= shared_memory_limit();
  if (has_fast_transform(*a)) {
    call.side[0].rotation = fast_table_of(a->layer, a->k_tables, s.format.k.head_dim);
    call.side[1].rotation = fast_table_of(a->layer, a->v_tables, s.format.v.head_dim);
  }
  if (a->at.cells) return encode_step({call, rule_of(a->at)}, fast, a->stream);
  const int begin = (int)a->first_token, end = begin + (int)a->tokens;
  // Whole blocks have kernels of their own; what is before and after them goes vector by vector.
  const int from = std::min(end, (begin + kBlockTokens - 1) / kBlockTokens * kBlockTokens);
  const int to = fast ? std::max(from, end / kBlockTokens * kBlockTokens) : from;
  if (int error = encode_portable(call, begin, from - begin, a->stream)) return error;
  if (int error = encode_portable(call, to, end - to, a->stream)) return error;
  if (from == to) return 0;
  s.range.first_token = from, s.range.tokens = to - from;
  return s.dtype == kBfloat16 ? encode_blocks_with<__nv_bfloat16>(call, a->stream)
                              : encode_blocks_with<__half>(call, a->stream);
}

extern "C" int halfbyte_cuda_copy(const HalfbyteCudaCopy* a) {
  if (a->tokens <= 0) return 0;
  const OnDevice device(a->device);
  const CopyCall call{{bytes_of(a->k.data), bytes_of(a->v.data)},
                      {bytes_of(a->k_to.data), bytes_of(a->v_to.data)},
                      {strides_of(a->k), strides_of(a->v)},
                      {strides_of(a->k_to), strides_of(a->v_to)},
                      {(int)a->layer.head_dim_k, (int)a->layer.head_dim_v},
                      (int)a->layer.kv_heads,
                      (int)a->tokens,
                      a->layer.dtype == kFloat32 ? 4 : 2};
  return launch(copy_kernel, (int)(a->batch * a->layer.kv_heads * a->tokens), 128, 0, a->stream, call);
}

extern "C" int halfbyte_cuda_decode(const HalfbyteCudaDecode* a) {
  if (a->tokens <= 0) return 0;
  const OnDevice device(a->device);
  DecodeCall call{};
  DecodeShape& s = call.shape;
  s.format = page_format(a->layer);
  s.range = {(int)a->batch, (int)a->layer.kv_heads, (int)a->first_token, (int)a->tokens};
  s.out_first = (int)a->out_first, s.out_tokens = (int)a->out_tokens;
  call.side[0] = {a->k, table_of(a->k_tables), a->k_tables.offset, a->k_tables.inverse_lambda, spans_of(a->k_tables)};
  call.side[1] = {a->v, table_of(a->v_tables), a->v_tables.offset, a->v_tables.inverse_lambda, spans_of(a->v_tables)};
  call.pages = pages_of(a->pages);
  return launch(decode_kernel, portable_blocks(s.range, s.format), kSimds * kSimd, 0, a->stream, call);
}

extern "C" int64_t halfbyte_cuda_page_bytes(const HalfbyteCudaLayer* layer) {
  return (int64_t)page_head_bytes(page_format(*layer));
}

extern "C" int64_t halfbyte_cuda_fragment_bytes(const HalfbyteCudaLayer* layer, int64_t is_v) {
  const PageFormat f = page_format(*layer);
  const SideFormat& side = is_v ? f.v : f.k;
  if (!has_fragments(side, layer->dtype)) return 0;
  return (int64_t)(fragment_index(side.head_dim, kTerms * side.head_dim / 16, 0, 0) * sizeof(uint4));
}

extern "C" void halfbyte_cuda_rotation(const HalfbyteCudaLayer* layer, int64_t is_v, float* rotation) {
  const std::vector<double> r =
      rotation_matrix(make_rotation((Rotation)layer->rotation, (int)(is_v ? layer->head_dim_v : layer->head_dim_k),
                                    (uint64_t)layer->seed, (int)layer->layer_index));
  std::copy(r.begin(), r.end(), rotation);
}

extern "C" int64_t halfbyte_cuda_fast_bytes(const HalfbyteCudaLayer* layer, int64_t is_v) {
  const int64_t d = is_v ? layer->head_dim_v : layer->head_dim_k;
  if ((d != 64 && d != 128 && d != 256) || layer->rotation == (int64_t)Rotation::identity ||
      layer->rotation == (int64_t)Rotation::dense)
    return 0;
  return (layer->rotation == (int64_t)Rotation::srft ? 3 * d : d) * (int64_t)sizeof(float);
}

extern "C" void halfbyte_cuda_fast(const HalfbyteCudaLayer* layer, int64_t is_v, float* fast) {
  const int d = (int)(is_v ? layer->head_dim_v : layer->head_dim_k);
  const auto kind = (Rotation)layer->rotation;
  const RotationPlan plan = make_rotation(kind, d, (uint64_t)layer->seed, (int)layer->layer_index);
  for (float sign : plan.signs) *fast++ = (float)(sign / std::sqrt((kind == Rotation::srft ? 2.0 : 1.0) * d));
  for (int k = 0; k < d && kind == Rotation::srft; k++) {
    const double angle = -2.0 * std::numbers::pi * k / d;
    *fast++ = (float)std::cos(angle), *fast++ = (float)std::sin(angle);
  }
}

extern "C" void halfbyte_cuda_fragments(const HalfbyteCudaLayer* layer, int64_t is_v, const float* rotation,
                                        void* fragments) {
  const int d = (int)(is_v ? layer->head_dim_v : layer->head_dim_k);
  const auto write = d == 64 ? write_fragments<64> : d == 128 ? write_fragments<128> : write_fragments<256>;
  write(rotation, static_cast<ushort*>(fragments));
}

extern "C" int halfbyte_cuda_probe(int64_t device) {
  cudaFuncAttributes attributes;
  int major = 0;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, (int)device))
    return (int)error;
  // A kernel of ours that the device has no code for says so here, not in the middle of a forward pass.
  return (int)cudaFuncGetAttributes(&attributes, decode_kernel);
}

extern "C" const char* halfbyte_cuda_error(int error) { return cudaGetErrorString((cudaError_t)error); }
