// Multiply by weights that stay in GGUF's blocks of 32 (Q4_0, Q4_1, Q8_0), and turn rows of them into bfloat16 or float32.
//
// A block is value[i] = scale * code[i] + offset: Q4_0 {half scale; 16 bytes}, offset = -8 * scale;
// Q4_1 {half scale; half offset; 16 bytes}; Q8_0 {half scale; 32 signed bytes}. Byte j of a 4-bit block holds code j
// in its low half and code j + 16 in its high half. Sums are float32.

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 };
enum { GROUP = 8 };  // tokens that share one pass over the weights

static int block_bytes(int kind) { return kind == Q4_0 ? 18 : kind == Q4_1 ? 20 : 34; }

static inline float half_at(const uint8_t *p) {
#if defined(__F16C__)
  uint16_t h;
  memcpy(&h, p, 2);
  return _cvtsh_ss(h);
#else
  _Float16 h;
  memcpy(&h, p, 2);
  return (float)h;
#endif
}

static inline uint16_t to_bf16(float f) {  // round to nearest even
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline float from_bf16(uint16_t b) {
  uint32_t u = (uint32_t)b << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline void scale_offset(const uint8_t *b, int kind, float *scale, float *offset) {
  *scale = half_at(b);
  *offset = kind == Q4_1 ? half_at(b + 2) : kind == Q4_0 ? -8.0f * *scale : 0.0f;
}

// One row of weights times `count` tokens; `kind` and `count` are constants at every call, so that sums stay in
// registers. x: (count, width) float32; xb: the same in bfloat16, or NULL;
// sums: (count, width / 32), the sum of x over each block.
static inline __attribute__((always_inline)) void dot_row(const int kind, const uint8_t *row, int blocks,
                                                          const float *x, const uint16_t *xb, const float *sums,
                                                          const int count, float *out) {
  const int width = blocks * 32, bytes = block_bytes(kind);
#if defined(__AVX512F__) && defined(__AVX512BW__)
  __m512 acc[GROUP];
  float low[GROUP];
  for (int t = 0; t < count; t++) acc[t] = _mm512_setzero_ps(), low[t] = 0;
#if defined(__AVX512BF16__)
  if (kind != Q8_0 && xb) {
    // The codes 0..15 as bfloat16, twice, so that vpermw need not care about the fifth bit.
    const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
        0x4160, 0x4170));
    for (int b = 0; b < blocks; b++, row += bytes) {
      float scale, offset;
      scale_offset(row, kind, &scale, &offset);
      __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(row + bytes - 16)));
      __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(codes), _mm256_srli_epi16(codes, 4), 1);
      __m512bh w = (__m512bh)_mm512_permutexvar_epi16(index, table);
      __m512 s = _mm512_set1_ps(scale);
      for (int t = 0; t < count; t++) {
        __m512bh v = (__m512bh)_mm512_loadu_si512(xb + (size_t)t * width + b * 32);
        acc[t] = _mm512_fmadd_ps(s, _mm512_dpbf16_ps(_mm512_setzero_ps(), w, v), acc[t]);
        low[t] += offset * sums[t * blocks + b];
      }
    }
    for (int t = 0; t < count; t++) out[t] = _mm512_reduce_add_ps(acc[t]) + low[t];
    return;
  }
#endif
  for (int b = 0; b < blocks; b++, row += bytes) {
    float scale, offset;
    scale_offset(row, kind, &scale, &offset);
    __m512 w0, w1;
    if (kind == Q8_0) {
      w0 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + 2))));
      w1 = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + 18))));
    } else {
      __m128i q = _mm_loadu_si128((const __m128i *)(row + bytes - 16)), mask = _mm_set1_epi8(15);
      w0 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(q, mask)));
      w1 = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(_mm_srli_epi16(q, 4), mask)));
    }
    __m512 s = _mm512_set1_ps(scale);
    for (int t = 0; t < count; t++) {
      const float *v = x + (size_t)t * width + b * 32;
      __m512 p = _mm512_mul_ps(w0, _mm512_loadu_ps(v));
      acc[t] = _mm512_fmadd_ps(s, _mm512_fmadd_ps(w1, _mm512_loadu_ps(v + 16), p), acc[t]);
      low[t] += offset * sums[t * blocks + b];
    }
  }
  for (int t = 0; t < count; t++) out[t] = _mm512_reduce_add_ps(acc[t]) + low[t];
#else
  for (int t = 0; t < count; t++) out[t] = 0;
  for (int b = 0; b < blocks; b++, row += bytes) {
    float scale, offset, w[32];
    scale_offset(row, kind, &scale, &offset);
    if (kind == Q8_0)
      for (int i = 0; i < 32; i++) w[i] = (float)(int8_t)row[2 + i];
    else
      for (int i = 0; i < 16; i++) {
        uint8_t q = row[bytes - 16 + i];
        w[i] = (float)(q & 15), w[i + 16] = (float)(q >> 4);
      }
    for (int t = 0; t < count; t++) {
      const float *v = x + (size_t)t * width + b * 32;
      float p = 0;
      for (int i = 0; i < 32; i++) p += w[i] * v[i];
      out[t] += scale * p + offset * sums[t * blocks + b];
    }
  }
#endif
}

// The same for any kind and count.
static void dot_any(int kind, const uint8_t *row, int blocks, const float *x, const uint16_t *xb, const float *sums,
                    int count, float *out) {
  while (count > 0) {
    int n = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
#define CASE(K, N) \
  case K * 16 + N: dot_row(K, row, blocks, x, xb, sums, N, out); break;
#define CASES(K) CASE(K, 1) CASE(K, 2) CASE(K, 4) CASE(K, 8)
    switch (kind * 16 + n) { CASES(Q4_0) CASES(Q4_1) CASES(Q8_0) }
#undef CASES
#undef CASE
    x += (size_t)n * blocks * 32, sums += (size_t)n * blocks, out += n, count -= n;
    if (xb) xb += (size_t)n * blocks * 32;
  }
}

// out (tokens, rows) = x (tokens, width) times weight^T. `scratch` holds tokens * (width + width / 32) floats.
// x and out are bfloat16 where `bf16` is set, else float32.
void slipstream_blocks_linear(int kind, const uint8_t *weight, const void *x, void *out, float *scratch, long tokens,
                              long rows, long width, int bf16, int threads) {
  const int blocks = (int)(width / 32);
  const size_t stride = (size_t)blocks * block_bytes(kind);
  const uint16_t *xb = bf16 ? (const uint16_t *)x : NULL;
  const float *xf = bf16 ? scratch : (const float *)x;
  float *sums = scratch + (bf16 ? tokens * width : 0);
  for (long t = 0; t < tokens; t++)
    for (int b = 0; b < blocks; b++) {
      float sum = 0;
      for (int i = 0; i < 32; i++) {
        long at = t * width + b * 32 + i;
        if (bf16) scratch[at] = from_bf16(xb[at]);
        sum += xf[at];
      }
      sums[t * blocks + b] = sum;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < rows; n++)
    for (long t = 0; t < tokens; t += GROUP) {
      float sum[GROUP];
      int count = tokens - t < GROUP ? (int)(tokens - t) : GROUP;
      dot_any(kind, weight + n * stride, blocks, xf + t * width, xb ? xb + t * width : NULL, sums + t * blocks, count,
              sum);
      for (int i = 0; i < count; i++) {
        if (bf16) ((uint16_t *)out)[(t + i) * rows + n] = to_bf16(sum[i]);
        else ((float *)out)[(t + i) * rows + n] = sum[i];
      }
    }
}

// out (rows, width) bfloat16 or float32 = the numbers that the blocks stand for.
void slipstream_blocks_unpack(int kind, const uint8_t *weight, void *out, long rows, long width, int bf16, int threads) {
  const int bytes = block_bytes(kind);
  const long blocks = rows * (width / 32);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long b = 0; b < blocks; b++) {
    const uint8_t *p = weight + b * bytes;
    float scale, offset, w[32];
    scale_offset(p, kind, &scale, &offset);
    if (kind == Q8_0)
      for (int i = 0; i < 32; i++) w[i] = scale * (float)(int8_t)p[2 + i];
    else
      for (int i = 0; i < 16; i++) {
        uint8_t q = p[bytes - 16 + i];
        w[i] = scale * (float)(q & 15) + offset, w[i + 16] = scale * (float)(q >> 4) + offset;
      }
    if (bf16)
      for (int i = 0; i < 32; i++) ((uint16_t *)out)[b * 32 + i] = to_bf16(w[i]);
    else
      memcpy((float *)out + b * 32, w, sizeof w);
  }
}
