// Multiply by weights that stay in blocks (MXFP4 and GGUF's Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K: formats.h), and turn
// rows of them into bfloat16 or float32. To multiply by MXFP4, x is put into the order of the others' codes once. Sums
// are float32.

#include "formats.h"

enum { ROWS = 4, TOKENS = 4 };  // of one pass: their sums fit into the registers, and no sum waits for another

#if defined(WIDE)
static INLINE void add_up(const int count, __m512 acc[ROWS][TOKENS], float out[ROWS][TOKENS]) {
  for (int t = 0; t < count; t++) {  // four horizontal sums at once
    __m256 h[ROWS];
    for (int r = 0; r < ROWS; r++)
      h[r] = _mm256_add_ps(_mm512_castps512_ps256(acc[r][t]),
                           _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(acc[r][t]), 1)));
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    for (int r = 0; r < ROWS; r++) out[r][t] = sum[r];
  }
}
#endif

// ROWS rows of weights times `count` tokens; `kind`, `count` and `half` are constants at every call, so that sums stay
// in registers. x: (count, width) float32, or bfloat16 with `half`, in the order of the codes;
// sums: (count, width / 32), the sum of x over each block, for offsets.
static INLINE void dot_rows(const int kind, const int count, const int half, const uint8_t *const *codes,
                            const uint8_t *const *heads, int blocks, const void *x, const float *sums,
                            float out[ROWS][TOKENS]) {
  const size_t width = (size_t)blocks * 32;
  (void)half;  // where there is no bfloat16
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
  add_up(count, acc, out);
  if (kind == Q4_1)
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < count; t++) out[r][t] += low[r][t][1];
#else
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

// The same for super-blocks, four blocks at a time.
static INLINE void dot_super(const int kind, const int count, const int half, const uint8_t *const *rows, int blocks,
                             const void *x, const float *sums, float out[ROWS][TOKENS]) {
  const size_t width = (size_t)blocks * 32;
  (void)half;  // where there is no bfloat16
  const int pairs = kind == Q6_K;  // two scales a block, and no offsets
#if defined(WIDE)
#if defined(WIDE_BF16)
  __m512 n[4];  // the numbers of codes 0 to 63; of Q4_K, whose bits above the fourth are left over, of 0 to 15 twice
  for (int i = 0; i < 4; i++) {
    const __m512 first = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    n[i] = _mm512_add_ps(first, _mm512_set1_ps((float)(kind == Q4_K ? 0 : i * 16 - (kind == Q6_K ? 32 : 0))));
  }
  const __m512i table[2] = {(__m512i)_mm512_cvtne2ps_pbh(n[1], n[0]), (__m512i)_mm512_cvtne2ps_pbh(n[3], n[2])};
#endif
  __m512 acc[ROWS][TOKENS];
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < count; t++) acc[r][t] = _mm512_setzero_ps();
  for (int b = 0; b < blocks; b += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      const uint8_t *p = rows[r] + (size_t)(b / 8) * STEP[kind];
      const int g = b / 4 % 2;
      floats f;
      super_heads(kind, p, g, &f);
      const __m512 heads = _mm512_castps256_ps512((__m256)f);
      if (!pairs)
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
          const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(sums + (size_t)t * blocks + b));
          acc[r][t] = _mm512_mask3_fmadd_ps(heads, four, acc[r][t], 0xf0);
        }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const size_t at = ((size_t)b + j) * 32;
#if defined(WIDE_BF16)
        if (half) {
          words c;
          super_codes(kind, p, g, j, &c);
          const __m512i index = _mm512_cvtepu8_epi16((__m256i)c);
          const __m512bh w = (__m512bh)(pairs ? _mm512_permutex2var_epi16(table[0], index, table[1])
                                              : _mm512_permutexvar_epi16(index, table[0]));
          const __m512i first = _mm512_set1_epi32(j << pairs);
          const __m512 s = _mm512_permutexvar_ps(_mm512_mask_set1_epi32(first, 0xff00, (j << pairs) + pairs), heads);
#pragma GCC unroll 4
          for (int t = 0; t < count; t++) {
            const __m512bh v = (__m512bh)_mm512_loadu_si512((const uint16_t *)x + t * width + at);
            acc[r][t] = _mm512_fmadd_ps(s, _mm512_dpbf16_ps(_mm512_setzero_ps(), w, v), acc[r][t]);
          }
          continue;
        }
#endif
        bytes32 c;
        __m512 w0, w1;
        super_numbers(kind, p, g, j, &c);
        look_up(Q8_0, (const uint8_t *)&c, heads, &w0, &w1);
        w0 = _mm512_mul_ps(w0, _mm512_permutexvar_ps(_mm512_set1_epi32(j << pairs), heads));
        w1 = _mm512_mul_ps(w1, _mm512_permutexvar_ps(_mm512_set1_epi32((j << pairs) + pairs), heads));
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
          const float *v = (const float *)x + t * width + at;
          acc[r][t] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(v), acc[r][t]);
          acc[r][t] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(v + 16), acc[r][t]);
        }
      }
    }
  }
  add_up(count, acc, out);
#else
  for (int r = 0; r < ROWS; r++) {
    floats acc[TOKENS] = {{0}};
    float low[TOKENS] = {0};
    for (int b = 0; b < blocks; b += 4) {
      const uint8_t *p = rows[r] + (size_t)(b / 8) * STEP[kind];
      floats f;
      super_heads(kind, p, b / 4 % 2, &f);
      for (int j = 0; j < 4; j++) {
        const float s0 = f[j << pairs], s1 = f[(j << pairs) + pairs];
        bytes32 c;
        floats w[4];
        super_numbers(kind, p, b / 4 % 2, j, &c);
        numbers(Q8_0, (const uint8_t *)&c, w);
#pragma GCC unroll 4
        for (int t = 0; t < count; t++) {
          const loose *v = (const loose *)((const float *)x + t * width + ((size_t)b + j) * 32);
          acc[t] += s0 * (w[0] * v[0] + w[1] * v[1]) + s1 * (w[2] * v[2] + w[3] * v[3]);
          if (!pairs) low[t] += f[4 + j] * sums[(size_t)t * blocks + b + j];
        }
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
    if (KIND < Q4_K) dot_rows(KIND, COUNT, HALF, codes, heads, blocks, x, sums, out);                                \
    else dot_super(KIND, COUNT, HALF, codes, blocks, x, sums, out);                                                  \
  }
#define DOTS(KIND, HALF) DOT(KIND, 1, HALF) DOT(KIND, 2, HALF) DOT(KIND, 3, HALF) DOT(KIND, 4, HALF)
#define NAMES(KIND, HALF) \
  [HALF][KIND] = {dot_##KIND##_1_##HALF, dot_##KIND##_2_##HALF, dot_##KIND##_3_##HALF, dot_##KIND##_4_##HALF}
DOTS(MXFP4, 0) DOTS(Q4_0, 0) DOTS(Q4_1, 0) DOTS(Q8_0, 0) DOTS(Q4_K, 0) DOTS(Q5_K, 0) DOTS(Q6_K, 0)
#if defined(WIDE_BF16)
DOTS(MXFP4, 1) DOTS(Q4_0, 1) DOTS(Q4_1, 1) DOTS(Q4_K, 1) DOTS(Q5_K, 1) DOTS(Q6_K, 1)
#endif
static dot_fn *const DOT_OF[2][KINDS][TOKENS] = {
    NAMES(MXFP4, 0), NAMES(Q4_0, 0), NAMES(Q4_1, 0), NAMES(Q8_0, 0), NAMES(Q4_K, 0), NAMES(Q5_K, 0), NAMES(Q6_K, 0),
#if defined(WIDE_BF16)
    NAMES(MXFP4, 1), NAMES(Q4_0, 1), NAMES(Q4_1, 1), NAMES(Q4_K, 1), NAMES(Q5_K, 1), NAMES(Q6_K, 1),
#endif
};

// out (tokens, rows) = x (tokens, width) times weight^T. `heads` is NULL where they stand in the blocks. `scratch`
// holds tokens * (width + width / 32) floats. x and out are bfloat16 where `bf16` is set, else float32.
void slipstream_blocks_linear(int kind, const uint8_t *weight, const uint8_t *heads, const void *x, void *out,
                              float *scratch, long tokens, long rows, long width, int bf16, int threads) {
  const int blocks = (int)(width / 32);
  const size_t in_row = (size_t)width / size_of(kind);
  const size_t stride = in_row * STEP[kind], head_stride = in_row * HEAD_STEP[kind];
  const uint8_t *codes = weight + HEAD_BYTES[kind];
  if (!heads) heads = weight;
  float *sums = scratch + tokens * width;
  int half = 0;
#if defined(WIDE_BF16)
  half = bf16 && kind != Q8_0;
#endif
  const void *v = half == bf16 && kind != MXFP4 ? x : scratch;
  for (long b = 0; b < tokens * blocks && (v == scratch || has_offset(kind)); b++) {
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
      DOT_OF[half][kind][count - 1](q, h, blocks, (const char *)v + t * token, sums + t * blocks, sum);
      for (int r = 0; r < ROWS && n + r < rows; r++)
        for (int i = 0; i < count; i++) {
          if (bf16) ((uint16_t *)out)[(t + i) * rows + n + r] = to_bf16(sum[r][i]);
          else ((float *)out)[(t + i) * rows + n + r] = sum[r][i];
        }
    }
  }
}

static INLINE void put(const int bf16, const float y[32], void *out, int block) {
  if (bf16)
    for (int i = 0; i < 32; i++) ((uint16_t *)out)[block * 32 + i] = to_bf16(y[i]);
  else
    memcpy((float *)out + block * 32, y, 128);
}

// One row as float32 or bfloat16.
static INLINE void unpack(const int kind, const int bf16, const uint8_t *q, const uint8_t *head, int blocks,
                          void *out) {
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
    put(bf16, y, out, b);
  }
}

static INLINE void unpack_super(const int kind, const int bf16, const uint8_t *p, int blocks, void *out) {
  for (int b = 0; b < blocks; b += 4) {
    const uint8_t *from = p + (size_t)(b / 8) * STEP[kind];
    floats f;
    super_heads(kind, from, b / 4 % 2, &f);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      bytes32 c;
      floats w[4];
      super_numbers(kind, from, b / 4 % 2, j, &c);
      numbers(Q8_0, (const uint8_t *)&c, w);
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) w[k] = kind == Q6_K ? f[2 * j + k / 2] * w[k] : f[j] * w[k] + f[4 + j];
      put(bf16, (const float *)w, out, b + j);
    }
  }
}

// out (rows, width) bfloat16 or float32 = the numbers that the blocks stand for.
void slipstream_blocks_unpack(int kind, const uint8_t *weight, const uint8_t *heads, void *out, long rows, long width,
                              int bf16, int threads) {
  const int blocks = (int)(width / 32);
  const size_t in_row = (size_t)width / size_of(kind);
  const uint8_t *codes = weight + HEAD_BYTES[kind];
  if (!heads) heads = weight;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < rows; n++) {
    const uint8_t *q = codes + n * in_row * STEP[kind], *head = heads + n * in_row * HEAD_STEP[kind];
    char *to = (char *)out + (size_t)n * width * (bf16 ? 2 : 4);
#define CASE(KIND, HALF)                                      \
  case KIND * 2 + HALF:                                       \
    if (KIND < Q4_K) unpack(KIND, HALF, q, head, blocks, to); \
    else unpack_super(KIND, HALF, q, blocks, to);             \
    break;
    switch (kind * 2 + !!bf16) {
      CASE(MXFP4, 0) CASE(MXFP4, 1) CASE(Q4_0, 0) CASE(Q4_0, 1) CASE(Q4_1, 0) CASE(Q4_1, 1) CASE(Q8_0, 0) CASE(Q8_0, 1)
      CASE(Q4_K, 0) CASE(Q4_K, 1) CASE(Q5_K, 0) CASE(Q5_K, 1) CASE(Q6_K, 0) CASE(Q6_K, 1)
    }
#undef CASE
  }
}
