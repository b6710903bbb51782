// Multiply by floats, int8 and int4 so that a token's result is the same to the last bit whatever stands beside it: every
// sum over the width has LANES partial sums, taken from left to right, that are added up as a tree. Compile it strictly.
//
// A weight is float32, bfloat16 or float16; or a signed byte, times a scale of the row; or 4 bits less 8, the lower half
// of a byte first, times a scale of each `group` weights. Scales are bfloat16. Tokens are float32; beside HALVES, which are
// bfloat16 weights where the processor multiplies pairs of these, bfloat16.

#include "formats.h"

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, HALVES };
enum { ROWS = 4, TOKENS = 4, SPAN = 64 };  // of one pass: their sums fit into the registers; rows kept in the cache

#if defined(WIDE)
enum { LANES = 16 };
typedef __m512 vector;
static INLINE vector read(const float *p) { return _mm512_loadu_ps(p); }
static INLINE vector multiply_add(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
static INLINE void add_up(vector sums[ROWS][TOKENS], int t, float out[ROWS][TOKENS]) {  // four at once
  __m256 h[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
    h[r] = _mm256_add_ps(_mm512_castps512_ps256(sums[r][t]),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(sums[r][t]), 1)));
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) out[r][t] = sum[r];
}
#else
enum { LANES = 8 };
typedef floats vector;
static INLINE void read_to(const float *p, vector *v) { memcpy(v, p, sizeof *v); }
#define read(P) ({ vector v_; read_to(P, &v_); v_; })
#if defined(__AVX2__) && defined(__FMA__)
#define multiply_add(A, B, C) ((vector)_mm256_fmadd_ps((__m256)(A), (__m256)(B), (__m256)(C)))
#else
#define multiply_add(A, B, C) ((A) * (B) + (C))
#endif
static INLINE void add_up(vector sums[ROWS][TOKENS], int t, float out[ROWS][TOKENS]) {
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    const vector s = sums[r][t];
    out[r][t] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
}
#endif

typedef struct {
  const uint8_t *weights;
  const uint16_t *scales;
  long group;
} row;

static INLINE float one(const int kind, const row *r, long k) {
  if (kind == FLOAT32) return ((const float *)r->weights)[k];
  if (kind == BFLOAT16) return from_bf16(((const uint16_t *)r->weights)[k]);
  if (kind == FLOAT16) return half_at(r->weights + 2 * k);
  if (kind == INT8) return ((const int8_t *)r->weights)[k];
  return (float)((r->weights[k / 2] >> k % 2 * 4 & 15) - 8) * from_bf16(r->scales[k / r->group]);
}

// LANES weights from k on, the same numbers as `one` gives.
static INLINE void weights_at(const int kind, const row *r, long k, vector *to) {
#if defined(WIDE)
  const uint8_t *p = r->weights;
  switch (kind) {
    case FLOAT32: *to = _mm512_loadu_ps((const float *)p + k); return;
    case BFLOAT16: {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 2 * k)));
      *to = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
      return;
    }
    case FLOAT16: *to = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + 2 * k))); return;
    case INT8: *to = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + k)))); return;
  }
  const __m128i bytes = _mm_loadl_epi64((const __m128i *)(p + k / 2)), low = _mm_set1_epi8(15);
  const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
  const __m512i signed_codes = _mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(8));
  *to = _mm512_mul_ps(_mm512_cvtepi32_ps(signed_codes), _mm512_set1_ps(from_bf16(r->scales[k / r->group])));
#else
  float w[LANES];
  for (int i = 0; i < LANES; i++) w[i] = one(kind, r, k + i);
  *to = read(w);
#endif
}

#if defined(WIDE_BF16)
static INLINE __m512bh halves_at(const void *p, long k, __mmask32 inside) {
  return (__m512bh)_mm512_maskz_loadu_epi16(inside, (const uint16_t *)p + k);
}

// As `tile`. A lane has the products of two neighbours.
static INLINE void tile_halves(const int count, const row rows[ROWS], const uint16_t *x, long width,
                               float out[ROWS][TOKENS]) {
  vector acc[ROWS][TOKENS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) acc[r][t] = (vector){0};
  __mmask32 inside = 0xffffffff;
  for (long k = 0; k < width; k += 32) {
    if (width - k < 32) inside = ((__mmask32)1 << (width - k)) - 1;
    __m512bh w[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) w[r] = halves_at(rows[r].weights, k, inside);
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
      const __m512bh v = halves_at(x + t * width, k, inside);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], w[r], v);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < count; t++) add_up(acc, t, out);
}
#endif

// Whether HALVES can be asked for.
int slipstream_dense_has_halves(void) {
#if defined(WIDE_BF16)
  return 1;
#else
  return 0;
#endif
}

// ROWS rows times `count` tokens; `kind` and `count` are constants at every call.
static INLINE void tile(const int kind, const int count, const row rows[ROWS], const void *tokens, long width,
                        float out[ROWS][TOKENS]) {
#if defined(WIDE_BF16)
  if (kind == HALVES) {
    tile_halves(count, rows, tokens, width, out);
    return;
  }
#endif
  const float *x = tokens;
  vector acc[ROWS][TOKENS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) acc[r][t] = (vector){0};
  long k = 0;
  for (; k + LANES <= width; k += LANES) {
    vector w[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) weights_at(kind, rows + r, k, w + r);
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
      const vector v = read(x + t * width + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) acc[r][t] = multiply_add(w[r], v, acc[r][t]);
    }
  }
  if (k < width)
#pragma GCC unroll 4
    for (int t = 0; t < count; t++) {
      float v[LANES] = {0};
      memcpy(v, x + t * width + k, (size_t)(width - k) * 4);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        float w[LANES] = {0};
        for (long i = k; i < width; i++) w[i - k] = one(kind, rows + r, i);
        acc[r][t] = multiply_add(read(w), read(v), acc[r][t]);
      }
    }
#pragma GCC unroll 4
  for (int t = 0; t < count; t++) {
    add_up(acc, t, out);
    if (kind == INT8)
      for (int r = 0; r < ROWS; r++) out[r][t] *= from_bf16(rows[r].scales[0]);
  }
}

typedef void tile_fn(const row *, const void *, long, float[ROWS][TOKENS]);
#define TILE(KIND, COUNT)                                                                                      \
  static void tile_##KIND##_##COUNT(const row *rows, const void *x, long width, float out[ROWS][TOKENS]) { \
    tile(KIND, COUNT, rows, x, width, out);                                                                   \
  }
#define TILES(KIND) TILE(KIND, 1) TILE(KIND, 2) TILE(KIND, 3) TILE(KIND, 4)
#define NAMES(KIND) {tile_##KIND##_1, tile_##KIND##_2, tile_##KIND##_3, tile_##KIND##_4}
TILES(FLOAT32) TILES(BFLOAT16) TILES(FLOAT16) TILES(INT8) TILES(INT4) TILES(HALVES)
static tile_fn *const TILE_OF[][TOKENS] = {NAMES(FLOAT32), NAMES(BFLOAT16), NAMES(FLOAT16), NAMES(INT8), NAMES(INT4),
                                             NAMES(HALVES)};

// out (tokens, rows) float32 = x (tokens, width) times weight^T. A row has `row_bytes` bytes of weights and `row_scales`
// scales.
void slipstream_dense_linear(int kind, const uint8_t *weight, const uint16_t *scales, const char *x, float *out,
                             long tokens, long num_rows, long width, long row_bytes, long row_scales, int threads) {
  const size_t token = (size_t)width * (kind == HALVES ? 2 : 4);
  const long share = (num_rows + threads * ROWS - 1) / (threads * ROWS) * ROWS, span = share < SPAN ? share : SPAN;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long first = 0; first < num_rows; first += span)
    for (long t = 0; t < tokens; t += TOKENS) {
      const int count = tokens - t < TOKENS ? (int)(tokens - t) : TOKENS;
      for (long n = first; n < first + span && n < num_rows; n += ROWS) {
        row rows[ROWS];
        float sum[ROWS][TOKENS];
        for (int r = 0; r < ROWS; r++) {  // past the last row it is taken again, and dropped
          const long at = n + r < num_rows ? n + r : num_rows - 1;
          rows[r] = (row){weight + at * row_bytes, scales + at * row_scales, row_scales ? width / row_scales : width};
        }
        TILE_OF[kind][count - 1](rows, x + t * token, width, sum);
        for (int r = 0; r < ROWS && n + r < num_rows; r++)
          for (int i = 0; i < count; i++) out[(t + i) * num_rows + n + r] = sum[r][i];
      }
    }
}
