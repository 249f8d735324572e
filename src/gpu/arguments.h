// What callers of the Metal entry points pass as numbers: 64-bit members in order of declaration and nothing between
// them, which is how a list of Python integers arrives.
#pragma once

#include <stdint.h>

namespace halfbyte {
namespace gpu {

enum { kMaxRaw = 3 };  // spans of raw tokens: sinks, the tail before this step, this step's own

struct ViewNumbers {  // strides of a [batch, heads, tokens, channels] array, in elements
  int64_t batch_stride, head_stride, token_stride;
};

struct LayerNumbers {
  int64_t batch, kv_heads;
  int64_t dtype;     // of what is not code: 0 float32, 1 float16, 2 bfloat16
  int64_t rotation;  // 0 identity, 1 srft, 2 srht, 3 dense
  int64_t k_bits, k_group, v_bits, v_group, scale_bits, search, signed_scale;  // group 0: one scale a vector
  int64_t table_stride, first_page;
};

// An offset that turns with RoPE is given for each span of so many tokens, `count` of them from span `first` on, as
// [batch][kv_heads][count][D]; span 0: one for all tokens, first 0, count 1.
struct SpanNumbers {
  int64_t span, first, count;
};

struct EncodeNumbers {
  LayerNumbers layer;
  int64_t is_k, first_token, tokens;  // positions [first_token, first_token + tokens) of every sequence
  int64_t data_first;                 // position of the token that lies first in data
  ViewNumbers data;
  int64_t has_offset, has_lambda;
  SpanNumbers offset;
};

struct DecodeNumbers {
  LayerNumbers layer;
  int64_t is_k, first_token, tokens, out_first, out_tokens;
  int64_t has_offset, has_inverse_lambda;
  SpanNumbers offset;
};

struct RawNumbers {
  ViewNumbers k, v;
  int64_t first, begin, end, are_sinks;  // positions [begin, end); `first` is the position at the views' start
};

struct AttendNumbers {
  LayerNumbers layer;
  int64_t heads, queries, causal;
  int64_t length, first, sliding_window, sink_tokens, packed_end, raw_window, warm_up, kept;  // as Layer::State
  int64_t begin, end, splits;  // packed tokens that any query sees, and in how many parts
  ViewNumbers q, out;
  int64_t has_mask, mask_tokens, mask_batch_stride, mask_query_stride;
  int64_t has_sinks, has_offset_k, has_offset_v, has_inverse_lambda_k, has_inverse_lambda_v;
  int64_t n_raw;
  RawNumbers raw[kMaxRaw];
  // Tokens that share an offset of K, 0 where it does not turn; pairs of channels that do: 2i and 2i + 1 when
  // interleaved, else i and i + pairs.
  int64_t turn_span, turn_pairs, turn_interleaved;
};

struct AttendReals {
  float scale, softcap;  // softcap 0: none
};

}  // namespace gpu
}  // namespace halfbyte
