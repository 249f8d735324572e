/* The C API of Halfbyte, for engines in C and for other languages: one cache object for each attention layer. */
#ifndef HALFBYTE_HALFBYTE_H
#define HALFBYTE_HALFBYTE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Every call that can fail returns one of these; a failed call leaves the layer as it was. */
typedef enum halfbyte_status {
  HALFBYTE_OK = 0,
  HALFBYTE_BAD_ARGUMENT = 1,
  HALFBYTE_BAD_VALUE = 2, /* a NaN, an infinity, or a number too large to code: last_error says where */
  HALFBYTE_OUT_OF_MEMORY = 3,
  HALFBYTE_UNSUPPORTED = 4,
  HALFBYTE_INTERNAL = 5
} halfbyte_status;

/* What the newest failed call of this thread had to say: the argument, what it got and what it takes. Never NULL;
   valid until this thread's next failure. */
const char* halfbyte_last_error(void);

typedef enum halfbyte_dtype { HALFBYTE_FLOAT32 = 0, HALFBYTE_FLOAT16 = 1, HALFBYTE_BFLOAT16 = 2 } halfbyte_dtype;
typedef enum halfbyte_rotation {
  HALFBYTE_IDENTITY = 0,
  HALFBYTE_SRFT = 1, /* any even head size */
  HALFBYTE_SRHT = 2, /* head sizes that are powers of two */
  HALFBYTE_DENSE = 3 /* given by halfbyte_set_rotation */
} halfbyte_rotation;

/* How K and V become codes; docs/format.md defines each field to the bit. Flags are 0 or 1. */
typedef struct halfbyte_recipe {
  int rotation;  /* a halfbyte_rotation */
  uint64_t seed; /* of the rotation's signs */
  int offset;    /* subtract the mean over the first prefill, or what halfbyte_set_offset gave */
  int k_bits;    /* 4, 8, or 32: floats, not codes */
  int k_group;   /* channels that share a scale: 16, 32, 64, or 0 for the whole vector */
  int v_bits;
  int v_group;
  int scale_bits;    /* 16: fp16, 32: fp32 */
  int search;        /* pick the scale among six by squared error */
  int signed_scale;  /* scales carry a sign, so that all codes are used */
  int lambda;        /* per-channel factors, given by halfbyte_set_lambda */
  int sink_tokens;   /* first tokens kept raw; a multiple of 16 */
  int raw_window;    /* newest tokens kept raw besides the unfinished block; a multiple of 16 */
  int offset_tokens; /* > 0: the mean over so many first tokens, raw until then; a multiple of 16 */
  int offset_span; /* tokens that share K's offset once halfbyte_set_frequencies was called: 16 or 64; 0: it is fixed */
} halfbyte_recipe;

typedef struct halfbyte_config {
  int kv_heads;
  int head_dim_k; /* even, 16 to 512 */
  int head_dim_v;
  int dtype; /* a halfbyte_dtype, of K, V, queries and outputs */
  halfbyte_recipe recipe;
  int layer_index;    /* selects the rotation's signs, together with the seed */
  int sliding_window; /* 0: every token stays visible */
} halfbyte_config;

/* A [batch, heads, tokens, channels] array: strides in elements, channels contiguous. */
typedef struct halfbyte_view {
  const void* data;
  ptrdiff_t batch_stride;
  ptrdiff_t head_stride;
  ptrdiff_t token_stride;
} halfbyte_view;

typedef struct halfbyte_mutable_view {
  void* data;
  ptrdiff_t batch_stride;
  ptrdiff_t head_stride;
  ptrdiff_t token_stride;
} halfbyte_mutable_view;

typedef struct halfbyte_attend_args {
  halfbyte_view q;           /* [batch, heads, queries, head_dim_k]: the newest positions; NaN out where not finite */
  halfbyte_mutable_view out; /* [batch, heads, queries, head_dim_v] */
  int heads;                 /* a multiple of kv_heads; head h reads KV head h / (heads / kv_heads) */
  int queries;
  float scale;                    /* of the scores, commonly 1 / sqrt(head_dim_k) */
  halfbyte_view chunk_k, chunk_v; /* raw K, V of those newest tokens; needed when queries > 1 */
  const uint8_t* mask;            /* [batch, queries, mask_tokens], 1 = visible, of the newest mask_tokens; or NULL */
  ptrdiff_t mask_batch_stride;
  ptrdiff_t mask_query_stride;
  size_t mask_tokens;
  int causal;         /* without a mask: token p sees tokens up to p, inside the sliding window */
  int exact;          /* float32 throughout, and the same bits however queries are batched; slower */
  float softcap;      /* c > 0: score -> c * tanh(score / c) */
  const float* sinks; /* [heads]: one more logit in each softmax, with no value; or NULL */
} halfbyte_attend_args;

/* Values to start from; config has sizes 0, attend_args has no arrays. */
halfbyte_recipe halfbyte_default_recipe(void);
halfbyte_config halfbyte_default_config(void);
halfbyte_attend_args halfbyte_default_attend_args(void);

/* The cache of one attention layer: `batch` sequences of equal length. Calls on one layer must not overlap. */
typedef struct halfbyte_layer halfbyte_layer;

halfbyte_status halfbyte_create(const halfbyte_config* config, halfbyte_layer** layer);
void halfbyte_destroy(halfbyte_layer* layer); /* NULL is allowed */

/* Adds `tokens` tokens to each sequence; the first append decides the batch. counted: [batch, tokens], 0 marks padding
   that is left out of the offset; or NULL. */
halfbyte_status halfbyte_append(halfbyte_layer* layer, const halfbyte_view* k, const halfbyte_view* v, int batch,
                                size_t tokens, const uint8_t* counted);
halfbyte_status halfbyte_attend(halfbyte_layer* layer, const halfbyte_attend_args* args);

/* The newest halfbyte_visible() tokens as float32 [batch, kv_heads, visible, head_dim]. */
halfbyte_status halfbyte_decode(const halfbyte_layer* layer, float* k_out, float* v_out);

halfbyte_status halfbyte_crop(halfbyte_layer* layer, size_t length); /* forgets tokens at positions >= length */
halfbyte_status halfbyte_select(halfbyte_layer* layer, const size_t* rows, size_t n); /* sequence i := old rows[i] */
halfbyte_status halfbyte_copy(const halfbyte_layer* layer, halfbyte_layer** copy);    /* pages are shared */
halfbyte_status halfbyte_reset(halfbyte_layer* layer); /* forgets all tokens; keeps what the set_ calls gave */

/* float32 [kv_heads, head_dim] each; NULL leaves that side alone. Offsets as large as K and V may be, lambda finite and
   1e-6 or more. Only while nothing is packed. */
halfbyte_status halfbyte_set_offset(halfbyte_layer* layer, const float* k, const float* v);
halfbyte_status halfbyte_set_lambda(halfbyte_layer* layer, const float* k, const float* v);
/* R of a dense recipe: float32 [head_dim, head_dim] each, row-major, y = R (x - mu), orthonormal within 1e-3. NULL
   leaves that side alone. Only while nothing is packed; halfbyte_append needs both. */
halfbyte_status halfbyte_set_rotation(halfbyte_layer* layer, const float* k, const float* v);
/* RoPE's frequencies, float32 [pairs] in radians a token: K's offset, set or found, is K as before RoPE, and turns with
   the position from span to span of recipe.offset_span tokens. Pair i is channels i and i + pairs, or 2 i and 2 i + 1
   when interleaved; other channels keep a fixed offset. pairs = 0 undoes it. Only while nothing is packed. */
halfbyte_status halfbyte_set_frequencies(halfbyte_layer* layer, const float* frequencies, int pairs, int interleaved);
halfbyte_status halfbyte_record_past(halfbyte_layer* layer,
                                     int on); /* sliding: keep tokens behind the window while on */

/* 0 for a NULL layer. */
int halfbyte_batch(const halfbyte_layer* layer);
size_t halfbyte_length(const halfbyte_layer* layer);        /* tokens seen by each sequence */
size_t halfbyte_visible(const halfbyte_layer* layer);       /* of those, still held */
size_t halfbyte_packed_tokens(const halfbyte_layer* layer); /* of those, held as codes */
size_t halfbyte_bytes(const halfbyte_layer* layer);         /* everything held, slack included */

/* Kernels: the i-th built into this library, best first; NULL past the end. usable may be NULL. */
const char* halfbyte_backend_name(int i, int* usable);
const char* halfbyte_backend(void); /* the one in use; the environment variable HALFBYTE_BACKEND chooses at start */
halfbyte_status halfbyte_set_backend(const char* name);

void halfbyte_set_num_threads(int n);
int halfbyte_num_threads(void);

const char* halfbyte_version(void);
const char* halfbyte_commit(void);

#ifdef __cplusplus
}
#endif

#endif
