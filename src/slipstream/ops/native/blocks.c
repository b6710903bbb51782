// Multiply by weights that stay in blocks of 32 (MXFP4 and GGUF's Q4_0, Q4_1, Q8_0), and turn rows of them into
// bfloat16 or float32.
//
// A block is value[i] = scale * number[code[i]] + offset. Each has a head (the scale, and the offset of Q4_1) and
// codes, which are walked by two pointers, as they lie together in GGUF's formats and apart in MXFP4:
//   Q4_0 {half scale; 16 bytes}, number = code - 8; Q4_1 {half scale; half offset; 16 bytes}, number = code;
//   Q8_0 {half scale; 32 signed bytes}; MXFP4 {16 bytes} and {E8M0 scale}, number = E2M1.
// Byte j holds in its low half and its high half: codes j and j + 16 in GGUF's formats, codes 2j and 2j + 1 in MXFP4.
// To multiply by the latter, x is put into the former's order once. Sums are float32.

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE 1
#if defined(__AVX512BF16__)
#define WIDE_BF16 1
#endif
#endif

enum { MXFP4, Q4_0, Q4_1, Q8_0 };
enum { ROWS = 4, TOKENS = 4 };  // of one pass: their sums fit into the registers, and no sum waits for another

static const int8_t HEAD_BYTES[] = {0, 2, 4, 2};  // that stand before the codes
static const int8_t STEP[] = {16, 18, 20, 34};    // from the codes of one block to those of the next
static const int8_t HEAD_STEP[] = {1, 18, 20, 34};

// The float32 of every E8M0 byte: a load is faster than the two exceptions.
#define E1(s) ((s) == 0 ? 0x00400000u : (s) == 255 ? 0x7fc00000u : (uint32_t)(s) << 23)
#define E4(s) E1(s), E1(s + 1), E1(s + 2), E1(s + 3)
#define E16(s) E4(s), E4(s + 4), E4(s + 8), E4(s + 12)
#define E64(s) E16(s), E16(s + 16), E16(s + 32), E16(s + 48)
static const uint32_t E8M0[256] = {E64(0), E64(64), E64(128), E64(192)};

static inline float as_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline float half_at(const uint8_t *p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | rest << 13);  // infinite, or NaN
  return as_float(sign | rest << 13) * 0x1p112f;  // between the two exponents' biases; right for subnormals too
#endif
}

static inline uint16_t to_bf16(float f) {  // round to nearest even
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float from_bf16(uint16_t b) { return as_float((uint32_t)b << 16); }

static inline float scale_at(int kind, const uint8_t *head) {
  return kind == MXFP4 ? as_float(E8M0[*head]) : half_at(head);
}

static inline float offset_at(int kind, const uint8_t *head) { return kind == Q4_1 ? half_at(head + 2) : 0; }

// The 32 numbers of a block, in the order of the codes. Vectors of GCC's and Clang's own, for any processor.
typedef float floats __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));

static inline __attribute__((always_inline)) void numbers(const int kind, const uint8_t *q, floats w[4]) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const uint8_t *from = q + 8 * (kind == Q8_0 ? k : k % 2);
#if defined(__AVX2__)
    ints c = (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    ints c = __builtin_convertvector(*(const bytes *)from, ints);
#endif
    if (kind != Q8_0) c = (k < 2 ? c : c >> 4) & 15;
    if (kind == Q4_0) c -= 8;
    if (kind == MXFP4) {  // 0 1 2 3 4 6 8 12 halves, and their negatives
      const ints n = c & 7, twice = n + ((n - 4) & (n > 4)) + 2 * ((n - 6) & (n > 6));
      c = (twice ^ (c > 7)) - (c > 7);  // a comparison is -1 where it holds
    }
    w[k] = __builtin_convertvector(c, floats) * (kind == MXFP4 ? 0.5f : 1.0f);
  }
}

#if defined(WIDE)
static inline __attribute__((always_inline)) __m512 number_table(const int kind) {
  static const uint8_t all[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats w[4];
  numbers(kind, all, w);
  return _mm512_loadu_ps(w);
}

// The same by a table of the 16 numbers.
static inline __attribute__((always_inline)) void look_up(const int kind, const uint8_t *q, __m512 table, __m512 *w0,
                                                          __m512 *w1) {
  const __m128i first = _mm_loadu_si128((const __m128i *)q);
  if (kind == Q8_0) {
    *w0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
    *w1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + 16))));
  } else {
    const __m512i codes = _mm512_cvtepu8_epi32(first);
    *w0 = _mm512_permutexvar_ps(codes, table);  // looks at four bits
    *w1 = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
  }
}
#endif

// ROWS rows of weights times `count` tokens; `kind`, `count` and `half` are constants at every call, so that sums stay
// in registers. x: (count, width) float32, or bfloat16 with `half`, in the order of the codes;
// sums: (count, width / 32), the sum of x over each block, for Q4_1.
static inline __attribute__((always_inline)) void dot_rows(const int kind, const int count, const int half,
                                                           const uint8_t *const *codes, const uint8_t *const *heads,
                                                           int blocks, const void *x, const float *sums,
                                                           float out[ROWS][TOKENS]) {
  const size_t width = (size_t)blocks * 32;
#if defined(WIDE)
  const __m512 table = kind == Q8_0 ? _mm512_setzero_ps() : number_table(kind);
#if defined(WIDE_BF16)
  const __m512i twice = (__m512i)_mm512_cvtne2ps_pbh(table, table);  // vpermw looks at five bits
#endif
  __m512 acc[ROWS][TOKENS];
  __m128 low[ROWS][TOKENS];  // of the offsets: in element 1
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < count; t++) acc[r][t] = _mm512_setzero_ps(), low[r][t] = _mm_setzero_ps();
  for (int b = 0; b < blocks; b++) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const uint8_t *q = codes[r] + (size_t)b * STEP[kind], *head = heads[r] + (size_t)b * HEAD_STEP[kind];
      __m512 s;
      if (kind == MXFP4)
        s = _mm512_set1_ps(scale_at(kind, head));
      else {
        const __m128 h = _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)head));
        s = _mm512_broadcastss_ps(h);
        if (kind == Q4_1)
#pragma GCC unroll 4
          for (int t = 0; t < count; t++)
            low[r][t] = _mm_fmadd_ps(h, _mm_set1_ps(sums[(size_t)t * blocks + b]), low[r][t]);
      }
#if defined(WIDE_BF16)
      if (half) {
        const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)q));
        const __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(c), _mm256_srli_epi16(c, 4), 1);
        const __m512bh w = (__m512bh)_mm512_permutexvar_epi16(index, twice);
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
          const __m512bh v = (__m512bh)_mm512_loadu_si512((const uint16_t *)x + t * width + (size_t)b * 32);
          acc[r][t] = _mm512_fmadd_ps(s, _mm512_dpbf16_ps(_mm512_setzero_ps(), w, v), acc[r][t]);
        }
        continue;
      }
#endif
      __m512 w0, w1;
      look_up(kind, q, table, &w0, &w1);
#pragma GCC unroll 4
      for (int t = 0; t < count; t++) {
        const float *v = (const float *)x + t * width + (size_t)b * 32;
        const __m512 p = _mm512_mul_ps(w0, _mm512_loadu_ps(v));
        acc[r][t] = _mm512_fmadd_ps(s, _mm512_fmadd_ps(w1, _mm512_loadu_ps(v + 16), p), acc[r][t]);
      }
    }
  }
  for (int t = 0; t < count; t++) {  // four horizontal sums at once
    __m256 h[ROWS];
    for (int r = 0; r < ROWS; r++)
      h[r] = _mm256_add_ps(_mm512_castps512_ps256(acc[r][t]),
                           _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(acc[r][t]), 1)));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    for (int r = 0; r < ROWS; r++) out[r][t] = sum[r] + (kind == Q4_1 ? low[r][t][1] : 0);
  }
#else
  (void)half;
  for (int r = 0; r < ROWS; r++) {
    floats acc[TOKENS] = {{0}};
    float low[TOKENS] = {0};
    for (int b = 0; b < blocks; b++) {
      const uint8_t *head = heads[r] + (size_t)b * HEAD_STEP[kind];
      const float scale = scale_at(kind, head);
      floats w[4];
      numbers(kind, codes[r] + (size_t)b * STEP[kind], w);
#pragma GCC unroll 4
      for (int t = 0; t < count; t++) {
        const loose *v = (const loose *)((const float *)x + t * width + (size_t)b * 32);
        acc[t] += scale * (w[0] * v[0] + w[1] * v[1] + w[2] * v[2] + w[3] * v[3]);
        if (kind == Q4_1) low[t] += offset_at(kind, head) * sums[(size_t)t * blocks + b];
      }
    }
    for (int t = 0; t < count; t++) {
      out[r][t] = low[t];
      for (int i = 0; i < 8; i++) out[r][t] += acc[t][i];
    }
  }
#endif
}

typedef void dot_fn(const uint8_t *const *codes, const uint8_t *const *heads, int blocks, const void *x,
                    const float *sums, float out[ROWS][TOKENS]);

#define DOT(KIND, COUNT, HALF)                                                                                       \
  static void dot_##KIND##_##COUNT##_##HALF(const uint8_t *const *codes, const uint8_t *const *heads, int blocks,    \
                                            const void *x, const float *sums, float out[ROWS][TOKENS]) {             \
    dot_rows(KIND, COUNT, HALF, codes, heads, blocks, x, sums, out);                                                 \
  }
#define DOTS(KIND, HALF) DOT(KIND, 1, HALF) DOT(KIND, 2, HALF) DOT(KIND, 3, HALF) DOT(KIND, 4, HALF)
#define NAMES(KIND, HALF) \
  {dot_##KIND##_1_##HALF, dot_##KIND##_2_##HALF, dot_##KIND##_3_##HALF, dot_##KIND##_4_##HALF}
DOTS(MXFP4, 0) DOTS(Q4_0, 0) DOTS(Q4_1, 0) DOTS(Q8_0, 0)
#if defined(WIDE_BF16)
DOTS(MXFP4, 1) DOTS(Q4_0, 1) DOTS(Q4_1, 1)
#endif
static dot_fn *const DOT_OF[][TOKENS] = {
    NAMES(MXFP4, 0), NAMES(Q4_0, 0), NAMES(Q4_1, 0), NAMES(Q8_0, 0),
#if defined(WIDE_BF16)
    NAMES(MXFP4, 1), NAMES(Q4_0, 1), NAMES(Q4_1, 1),
#endif
};

// out (tokens, rows) = x (tokens, width) times weight^T. `heads` is NULL where they stand in the blocks. `scratch`
// holds tokens * (width + width / 32) floats. x and out are bfloat16 where `bf16` is set, else float32.
void slipstream_blocks_linear(int kind, const uint8_t *weight, const uint8_t *heads, const void *x, void *out,
                              float *scratch, long tokens, long rows, long width, int bf16, int threads) {
  const int blocks = (int)(width / 32);
  const size_t stride = (size_t)blocks * STEP[kind], head_stride = (size_t)blocks * HEAD_STEP[kind];
  const uint8_t *codes = weight + HEAD_BYTES[kind];
  if (!heads) heads = weight;
  float *sums = scratch + tokens * width;
  int half = 0;
#if defined(WIDE_BF16)
  half = bf16 && kind != Q8_0;
#endif
  const void *v = half == bf16 && kind != MXFP4 ? x : scratch;
  for (long b = 0; b < tokens * blocks && (v == scratch || kind == Q4_1); b++) {
    const uint16_t *in = (const uint16_t *)x + b * 32;
    float part[32], sum = 0;
    if (bf16)
      for (int i = 0; i < 32; i++) part[i] = from_bf16(in[i]);
    else
      memcpy(part, (const float *)x + b * 32, sizeof part);
    for (int i = 0; i < 32; i++) sum += part[i];
    sums[b] = sum;
    if (v != scratch) continue;
    for (int i = 0; i < 32; i++) {
      const long to = b * 32 + (kind == MXFP4 ? i % 2 * 16 + i / 2 : i);
      if (half) ((uint16_t *)scratch)[to] = in[i];
      else scratch[to] = part[i];
    }
  }
  const size_t token = (size_t)width * (half ? 2 : 4);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < rows; n += ROWS) {
    const uint8_t *q[ROWS], *h[ROWS];
    for (int r = 0; r < ROWS; r++) {  // past the last row it is taken again, and dropped
      const size_t row = (size_t)(n + r < rows ? n + r : rows - 1);
      q[r] = codes + row * stride, h[r] = heads + row * head_stride;
    }
    for (long t = 0; t < tokens; t += TOKENS) {
      float sum[ROWS][TOKENS];
      const int count = tokens - t < TOKENS ? (int)(tokens - t) : TOKENS;
      DOT_OF[half ? kind + 4 : kind][count - 1](q, h, blocks, (const char *)v + t * token, sums + t * blocks, sum);
      for (int r = 0; r < ROWS && n + r < rows; r++)
        for (int i = 0; i < count; i++) {
          if (bf16) ((uint16_t *)out)[(t + i) * rows + n + r] = to_bf16(sum[r][i]);
          else ((float *)out)[(t + i) * rows + n + r] = sum[r][i];
        }
    }
  }
}

// One row as float32 or bfloat16.
static inline __attribute__((always_inline)) void unpack(const int kind, const int bf16, const uint8_t *q,
                                                         const uint8_t *head, int blocks, void *out) {
#if defined(WIDE)
  const __m512 table = kind == Q8_0 ? _mm512_setzero_ps() : number_table(kind);
  const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#endif
  for (int b = 0; b < blocks; b++, q += STEP[kind], head += HEAD_STEP[kind]) {
    const float scale = scale_at(kind, head), offset = offset_at(kind, head);
    float w[32], y[32];
#if defined(WIDE)
    __m512 w0, w1;
    look_up(kind, q, table, &w0, &w1);
    if (kind == MXFP4) {
      const __m512 all = w0;
      w0 = _mm512_permutex2var_ps(all, order, w1);
      w1 = _mm512_permutex2var_ps(all, _mm512_add_epi32(order, _mm512_set1_epi32(8)), w1);
    }
    _mm512_storeu_ps(w, w0), _mm512_storeu_ps(w + 16, w1);
#else
    floats n[4];
    numbers(kind, q, n);
    const float *v = (const float *)n;
    for (int i = 0; i < 32; i++) w[i] = v[kind == MXFP4 ? i % 2 * 16 + i / 2 : i];
#endif
    for (int i = 0; i < 32; i++) y[i] = scale * w[i] + offset;
    if (bf16)
      for (int i = 0; i < 32; i++) ((uint16_t *)out)[b * 32 + i] = to_bf16(y[i]);
    else
      memcpy((float *)out + b * 32, y, sizeof y);
  }
}

// out (rows, width) bfloat16 or float32 = the numbers that the blocks stand for.
void slipstream_blocks_unpack(int kind, const uint8_t *weight, const uint8_t *heads, void *out, long rows, long width,
                              int bf16, int threads) {
  const int blocks = (int)(width / 32);
  const uint8_t *codes = weight + HEAD_BYTES[kind];
  if (!heads) heads = weight;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < rows; n++) {
    const uint8_t *q = codes + (size_t)n * blocks * STEP[kind], *head = heads + (size_t)n * blocks * HEAD_STEP[kind];
    char *to = (char *)out + (size_t)n * width * (bf16 ? 2 : 4);
#define CASE(KIND, HALF) case KIND * 2 + HALF: unpack(KIND, HALF, q, head, blocks, to); break;
    switch (kind * 2 + !!bf16) {
      CASE(MXFP4, 0) CASE(MXFP4, 1) CASE(Q4_0, 0) CASE(Q4_0, 1) CASE(Q4_1, 0) CASE(Q4_1, 1) CASE(Q8_0, 0) CASE(Q8_0, 1)
    }
#undef CASE
  }
}
