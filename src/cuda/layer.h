// The C interface's descriptions as the structures of the kernels; host only.
#pragma once

#include "gpu/attend.h"

#include "cuda/halfbyte_cuda.h"
#include "encode.h"

namespace halfbyte::gpu {

inline PageFormat page_format(const HalfbyteCudaLayer& layer) {
  Recipe recipe;
  recipe.k = {(int)layer.k_bits, (int)layer.k_group};
  recipe.v = {(int)layer.v_bits, (int)layer.v_group};
  recipe.scale_bits = (int)layer.scale_bits;
  recipe.search = layer.search != 0;
  recipe.signed_scale = layer.signed_scale != 0;
  return make_page_format(recipe, (int)layer.head_dim_k, (int)layer.head_dim_v);
}

inline Strides3 strides_of(const HalfbyteCudaView& view) {
  return {view.batch_stride, view.head_stride, view.token_stride};
}
inline uchar* bytes_of(const void* data) { return static_cast<uchar*>(const_cast<void*>(data)); }

inline Pages pages_of(const HalfbyteCudaPages& pages) {
  return {bytes_of(pages.pool), pages.table, (int)pages.table_stride, (int)pages.first_page};
}

inline RotationTable table_of(const HalfbyteCudaTables& tables) {
  return {tables.rotation, tables.transposed, nullptr, nullptr};
}

// For kernels that know the head size d: the fast transform, if there is one.
inline RotationTable fast_table_of(const HalfbyteCudaLayer& layer, const HalfbyteCudaTables& tables, int d) {
  if (!tables.fast) return table_of(tables);
  return {nullptr, nullptr, tables.fast, layer.rotation == (int64_t)Rotation::srft ? tables.fast + d : nullptr};
}

// Without waves it does not turn.
inline Turn turn_of(const HalfbyteCudaTurn& turn) {
  const int pairs = (int)turn.pairs;
  if (!turn.waves) return {};
  return {turn.waves, (int)turn.span, pairs, turn.interleaved ? 2 : 1, turn.interleaved ? 1 : pairs};
}

inline RawTokens raw_of(const HalfbyteCudaRaw& raw) {
  return {bytes_of(raw.k.data), bytes_of(raw.v.data), strides_of(raw.k), strides_of(raw.v),
          (int)raw.first,       (int)raw.begin,       (int)raw.end,      (int)raw.are_sinks};
}

// Launches go to one device of several while this lives.
class OnDevice {
 public:
  explicit OnDevice(int64_t device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice((int)device), changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

}  // namespace halfbyte::gpu
