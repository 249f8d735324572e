/* The C interface of libhalfbyte_cuda: launches on memory and streams of the caller, who may be any framework.
 *
 * Addresses are of device memory unless a comment says otherwise. Every function that launches returns 0 or a CUDA
 * error number for halfbyte_cuda_error; none synchronises, and none allocates. Numbers are 64-bit so that bindings need
 * no padding. */
#ifndef HALFBYTE_CUDA_H
#define HALFBYTE_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What never changes in a layer. dtype: 0 float32, 1 float16, 2 bfloat16. rotation: 0 identity, 1 srft, 2 srht; a dense
 * one needs no number here: its tables are the caller's. */
typedef struct {
  int64_t kv_heads, head_dim_k, head_dim_v, dtype;
  int64_t k_bits, v_bits, k_group, v_group, scale_bits, search, signed_scale;
  int64_t rotation, seed, layer_index;
} HalfbyteCudaLayer;

/* A [batch, heads, tokens, channels] array; strides in elements, channels contiguous. */
typedef struct {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
} HalfbyteCudaView;

/* Tables of a layer's rotation and factors; null where the recipe has none. */
typedef struct {
  const float* rotation;        /* [d][d]: y_i = sum of r[i][j] x_j */
  const float* transposed;      /* [d][d] */
  const void* fragments;        /* halfbyte_cuda_fragments, or null */
  const void* attend_fragments; /* halfbyte_cuda_attend_fragments, or null */
  const float* fast;            /* halfbyte_cuda_fast, or null */
  const float* offset;          /* [batch][kv_heads][offset_count][d]; to attend: [batch][kv_heads][d] */
  const float* rotated_offset;  /* R mu, alike */
  const float* lambda;          /* [kv_heads][d] */
  const float* inverse_lambda;
  /* Each offset serves offset_span tokens, the first from token offset_span * offset_first on; 0: one for all. */
  int64_t offset_span, offset_first, offset_count;
} HalfbyteCudaTables;

/* How K's offset turns in spans of tokens; waves: cos and sin in the middle of spans 0, 1, ..., [spans][pairs][2], or
 * null. Pair i: channels i and i + pairs, or 2 i and 2 i + 1 when interleaved. */
typedef struct {
  const float* waves;
  int64_t span, pairs, interleaved;
} HalfbyteCudaTurn;

/* table[b][i]: where the page lies that holds tokens 64 * (first_page + i) onwards of sequence b: bytes from pool, that
 * is, an address where pool is null. */
typedef struct {
  const int64_t* table;
  int64_t table_stride, first_page;
  const void* pool;
} HalfbyteCudaPages;

/* Tokens of K and V as they came, at positions [begin, end); `first` is the position at the views' start. */
typedef struct {
  HalfbyteCudaView k, v;
  int64_t first, begin, end, are_sinks;
} HalfbyteCudaRaw;

/* A layer whose length is in device memory, for steps of one token a sequence that a CUDA graph can repeat: append,
 * then encode, then attend, which may be repeated, all with the same arguments in every step. All counts of those calls
 * follow from the cells:
 *
 * - 0: tokens before the step; encode moves it on
 * - 1: tokens with those of the step; written by append
 * - 2: tokens of the step: 1, or 0 if there is no room
 * - 3: packed_end at some earlier length of this sequence
 * - 4: 1 if the offsets hold a mean, or need none
 * - 5: set to 1 by a value that can not be coded
 * - 6: set to 1 by a step for which there is no room
 *
 * The raw token at position p lies in slot p of the sinks or slot p % tail_slots of the tail, with tail_slots a
 * multiple of 16, at least 32 more than raw_window and warm_up. A page table may name pages in turn, with a window at
 * least ceil((window - 1) / 64) + 1 of them. */
enum { HALFBYTE_CUDA_CELLS = 8 };
typedef struct {
  int64_t* cells; /* null: the numbers in the call count */
  int64_t capacity, tail_slots, sink_tokens, raw_window, warm_up, sliding_window;
} HalfbyteCudaLength;

/* See AttendArgs in halfbyte.hpp, and Layer::State for the counts. kept: raw values exist from this position on. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaTables k, v;
  HalfbyteCudaPages pages;
  HalfbyteCudaTurn turn;
  int64_t batch, heads, queries, causal;
  double scale, softcap;
  int64_t length, first, sliding_window, sink_tokens, packed_end, raw_window, warm_up, kept;
  HalfbyteCudaView q, out;
  const void* mask; /* bytes [batch, queries, mask_tokens], 1 = visible, or null */
  int64_t mask_tokens, mask_batch_stride, mask_query_stride;
  const float* sinks; /* [heads] or null */
  HalfbyteCudaRaw raw[3];
  int64_t n_raw;
  /* A token of each sequence that goes to the last place of the last raw tokens before anything is read; data null:
   * none. */
  HalfbyteCudaView new_k, new_v;
  void* space;       /* halfbyte_cuda_attend_space bytes */
  int32_t* arrivals; /* [batch * kv_heads * ceil(heads / kv_heads * queries / 8)], zeros; left zero */
  int64_t portable;  /* 1: the kernels for any geometry, whatever the shape */
  int64_t device;    /* that holds all of this, as in the other calls */
  void* stream;
  /* With cells: queries 1, raw [0] the sinks' slots (data null if there are none) and raw [1] the tail's, from position
   * 0 on, and a mask has columns for the whole capacity, from position 0 on. */
  HalfbyteCudaLength at;
} HalfbyteCudaAttend;

/* Packs tokens [first_token, first_token + tokens) of every sequence. k and v start at position data_first. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaTables k_tables, v_tables;
  HalfbyteCudaPages pages;
  int64_t batch, first_token, tokens, data_first;
  HalfbyteCudaView k, v;
  double limit; /* larger magnitudes can not be coded: *bad becomes 1 */
  int32_t* bad; /* of the device, or of the host where the device can write to it */
  int64_t portable, device;
  void* stream;
  /* With cells: k and v are the tail's slots, first_token, tokens, data_first and offset_first follow from the length,
   * and bad should be cell 5. */
  HalfbyteCudaLength at;
} HalfbyteCudaEncode;

/* Where the offsets of one side go: the mean of tokens, and, where it turns, what it is in some spans. */
typedef struct {
  const float* transposed; /* of the rotation, or null */
  float* offset;           /* [batch][kv_heads][d] or null; R mu alike */
  float* rotated_offset;
  float* span_offset; /* [batch][kv_heads][span_count][d] or null; R mu alike */
  float* span_rotated_offset;
  int64_t span_count; /* in an append at least ceil(tail_slots / span) + 1 */
  int64_t is_mean;    /* of an append: 0: given, and there already */
} HalfbyteCudaOffset;

/* Finds the offsets of a layer: each the mean over `total` tokens, that of K of tokens turned back by their spans, and
 * R mu. raw: the tokens, one span after the other from position 0 on; n_raw 0: the offsets are there already. With
 * k.span_count, K's as spans from first_span on have it as well. offset null: not of this side. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaTurn turn; /* of K */
  int64_t batch, total;
  HalfbyteCudaRaw raw[3];
  int64_t n_raw;
  const float* weights; /* [batch][weight_stride], 0 where a token does not count, or null */
  const float* counts;  /* [batch]: how many do, or null */
  int64_t weight_stride, first_span;
  HalfbyteCudaOffset k, v;
  double* space; /* halfbyte_cuda_offsets_space bytes */
  int64_t device;
  void* stream;
} HalfbyteCudaOffsets;

/* Takes a token of each sequence in: raw to its slot, the first length cells, and the offsets of a step that packs. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaLength at;
  int64_t batch;
  HalfbyteCudaView k, v, k_sinks, v_sinks, k_tail, v_tail;
  HalfbyteCudaOffset k_offset, v_offset;
  HalfbyteCudaTurn turn;
  const float* weights; /* [batch][weight_stride]: what a token counts for in the mean, 0 or 1; later ones count 1 */
  int64_t weight_stride, device;
  void* stream;
} HalfbyteCudaAppend;

/* Copies K and V [batch, kv_heads, tokens, head_dim] of any strides: raw tokens to where a cache keeps them. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaView k, v, k_to, v_to;
  int64_t batch, tokens, device;
  void* stream;
} HalfbyteCudaCopy;

/* Packed tokens [first_token, first_token + tokens) to float32 [batch][kv_heads][out_tokens][head_dim], whose first
 * token is at position out_first. */
typedef struct {
  HalfbyteCudaLayer layer;
  HalfbyteCudaTables k_tables, v_tables;
  HalfbyteCudaPages pages;
  int64_t batch, first_token, tokens, out_first, out_tokens;
  float* k;
  float* v;
  int64_t device;
  void* stream;
} HalfbyteCudaDecode;

int halfbyte_cuda_attend(const HalfbyteCudaAttend* call);
int halfbyte_cuda_encode(const HalfbyteCudaEncode* call);
int halfbyte_cuda_append(const HalfbyteCudaAppend* call);
int halfbyte_cuda_copy(const HalfbyteCudaCopy* call);
int halfbyte_cuda_offsets(const HalfbyteCudaOffsets* call);
int halfbyte_cuda_decode(const HalfbyteCudaDecode* call);

/* Bytes of scratch that an attend of such a batch, heads and queries needs, whatever its tokens, and that a call for
 * offsets needs; of one KV head's part of a page; of a side's fragments and of what its fast transform reads, 0 if it
 * has none. */
int64_t halfbyte_cuda_attend_space(const HalfbyteCudaAttend* call);
int64_t halfbyte_cuda_offsets_space(const HalfbyteCudaOffsets* call);
int64_t halfbyte_cuda_page_bytes(const HalfbyteCudaLayer* layer);
int64_t halfbyte_cuda_fragment_bytes(const HalfbyteCudaLayer* layer, int64_t is_v);
int64_t halfbyte_cuda_fast_bytes(const HalfbyteCudaLayer* layer, int64_t is_v);
int64_t halfbyte_cuda_attend_fragment_bytes(const HalfbyteCudaLayer* layer, int64_t is_v);

/* Fill host memory: R as [d][d] of a rotation that is not dense, what its fast transform reads (factors of the
 * channels, then roots of srft), and any R as the encoding kernel reads it. */
void halfbyte_cuda_rotation(const HalfbyteCudaLayer* layer, int64_t is_v, float* rotation);
void halfbyte_cuda_fast(const HalfbyteCudaLayer* layer, int64_t is_v, float* fast);
void halfbyte_cuda_fragments(const HalfbyteCudaLayer* layer, int64_t is_v, const float* rotation, void* fragments);
void halfbyte_cuda_attend_fragments(const HalfbyteCudaLayer* layer, int64_t is_v, const float* rotation,
                                    void* fragments);

/* 0 if device `device` can run these kernels, else a CUDA error number. */
int halfbyte_cuda_probe(int64_t device);
const char* halfbyte_cuda_error(int error);

#ifdef __cplusplus
}
#endif

#endif
