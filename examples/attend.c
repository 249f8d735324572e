/* A C engine's use of Halfbyte: one layer's cache is filled token by token, attended, and compared with plain attention. */
#include <halfbyte/halfbyte.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 8, KV_HEADS = 2, HEAD_DIM = 128, PROMPT = 1000, STEPS = 24, TOKENS = PROMPT + STEPS };

static float k[KV_HEADS][TOKENS][HEAD_DIM], v[KV_HEADS][TOKENS][HEAD_DIM];
static float q[HEADS][HEAD_DIM], out[HEADS][HEAD_DIM], expected[HEADS][HEAD_DIM];

static void must(halfbyte_status status) {
  if (status == HALFBYTE_OK) return;
  fprintf(stderr, "error %d: %s\n", (int)status, halfbyte_last_error());
  exit(1);
}

/* Roughly normal numbers: the sum of twelve uniform ones. */
static float normal(void) {
  float sum = -6.0f;
  for (int i = 0; i < 12; i++) sum += (float)rand() / (float)RAND_MAX;
  return sum;
}

static void fill(float* x, size_t n) {
  for (size_t i = 0; i < n; i++) x[i] = normal();
}

/* Plain attention of one head over everything appended. */
static void attend_plainly(int head) {
  const int kv = head / (HEADS / KV_HEADS);
  static double p[TOKENS];
  double sum = 0.0;
  for (int t = 0; t < TOKENS; t++) {
    double score = 0.0;
    for (int c = 0; c < HEAD_DIM; c++) score += (double)q[head][c] * k[kv][t][c];
    p[t] = exp(score / sqrt(HEAD_DIM));   /* scores of a few units: no maximum needs to be taken off */
    sum += p[t];
  }
  for (int c = 0; c < HEAD_DIM; c++) {
    double value = 0.0;
    for (int t = 0; t < TOKENS; t++) value += p[t] / sum * v[kv][t][c];
    expected[head][c] = (float)value;
  }
}

/* Relative error, root mean square over all outputs. */
static double relative_error(void) {
  double error = 0.0, size = 0.0;
  for (int h = 0; h < HEADS; h++)
    for (int c = 0; c < HEAD_DIM; c++) {
      error += pow((double)out[h][c] - expected[h][c], 2);
      size += pow(expected[h][c], 2);
    }
  return sqrt(error / size);
}

int main(void) {
  srand(1);
  fill(&k[0][0][0], sizeof k / sizeof(float));
  fill(&v[0][0][0], sizeof v / sizeof(float));
  fill(&q[0][0], sizeof q / sizeof(float));

  halfbyte_config config = halfbyte_default_config();
  config.kv_heads = KV_HEADS;
  config.head_dim_k = config.head_dim_v = HEAD_DIM;
  config.dtype = HALFBYTE_FLOAT32;
  halfbyte_layer* layer = NULL;
  must(halfbyte_create(&config, &layer));

  /* The prompt in one append, then a token at a time. Strides count elements: batch, head, token. */
  halfbyte_view new_k = {k, 0, TOKENS * HEAD_DIM, HEAD_DIM}, new_v = {v, 0, TOKENS * HEAD_DIM, HEAD_DIM};
  must(halfbyte_append(layer, &new_k, &new_v, 1, PROMPT, NULL));
  for (int t = PROMPT; t < TOKENS; t++) {
    new_k.data = k[0][t];
    new_v.data = v[0][t];
    must(halfbyte_append(layer, &new_k, &new_v, 1, 1, NULL));
  }

  halfbyte_attend_args args = halfbyte_default_attend_args();
  args.q.data = q;
  args.q.head_stride = HEAD_DIM;
  args.out.data = out;
  args.out.head_stride = HEAD_DIM;
  args.heads = HEADS;
  args.scale = 1.0f / sqrtf(HEAD_DIM);
  must(halfbyte_attend(layer, &args));

  for (int h = 0; h < HEADS; h++) attend_plainly(h);
  const double error = relative_error();
  const size_t fp16_bytes = 2 * sizeof(short) * KV_HEADS * TOKENS * HEAD_DIM;
  printf("halfbyte %s, %s: %zu tokens, relative error %.3f, %zu bytes where fp16 takes %zu\n", halfbyte_version(),
         halfbyte_backend(), halfbyte_length(layer), error, halfbyte_bytes(layer), fp16_bytes);
  halfbyte_destroy(layer);
  /* Random keys and values are the hardest there are: 4 bits leave each number about 9 % off, K and V both. */
  return error < 0.2 ? 0 : 1;
}
