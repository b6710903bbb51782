// Formats of weights in blocks, for blocks.c: where things stand in them, and the numbers that their codes mean.
//
// A block is value[i] = scale * number[code[i]] + offset. Each block of 32 has a head (the scale, and the offset of
// Q4_1) and codes, which are walked by two pointers, as they lie together in GGUF's formats and apart in MXFP4:
//   Q4_0 {half scale; 16 bytes}, number = code - 8; Q4_1 {half scale; half offset; 16 bytes}, number = code;
//   Q8_0 {half scale; 32 signed bytes}; MXFP4 {16 bytes} and {E8M0 scale}, number = E2M1.
// Byte j holds in its low half and its high half: codes j and j + 16 in GGUF's formats, codes 2j and 2j + 1 in MXFP4.
//
// A super-block of 256 (K-quants) is 8 blocks of 32 whose scales and offsets are integers times a half of its own:
//   Q4_K {half d; half m; 12 bytes of heads; 128 bytes}, value = d * scale * code - m * offset;
//   Q5_K {half d; half m; 12 bytes of heads; 32 bytes of fifth bits; 128 bytes}, the same;
//   Q6_K {128 bytes; 64 bytes of upper two bits; 16 signed scales; half d}, value = d * scale * (code - 32), with a
//   scale for each 16. Two blocks are the low and the high halves of 32 bytes: neighbours, but in Q6_K j and j + 2.

#pragma once

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

#define INLINE inline __attribute__((always_inline))

enum { MXFP4, Q4_0, Q4_1, Q8_0, Q4_K, Q5_K, Q6_K, KINDS };

static const uint8_t HEAD_BYTES[] = {0, 2, 4, 2, 0, 0, 0};            // that stand before the codes
static const uint8_t STEP[] = {16, 18, 20, 34, 144, 176, 210};  // from the codes of one (super-)block to the next
static const uint8_t HEAD_STEP[] = {1, 18, 20, 34, 144, 176, 210};

static inline int size_of(int kind) { return kind < Q4_K ? 32 : 256; }
static inline int has_offset(int kind) { return kind == Q4_1 || kind == Q4_K || kind == Q5_K; }

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

// Vectors of GCC's and Clang's own, for any processor.
typedef float floats __attribute__((vector_size(32)));
typedef float loose __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));

// Eight signed bytes as integers.
static INLINE void widen(const void *p, ints *to) {
#if defined(__AVX2__)
  *to = (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
  *to = __builtin_convertvector(*(const bytes *)p, ints);
#endif
}

// The 32 numbers of a block, in the order of the codes.
static INLINE void numbers(const int kind, const uint8_t *q, floats w[4]) {
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++) {
    const uint8_t *from = q + 8 * (kind == Q8_0 ? k : k % 2);
    ints c;
    widen(from, &c);
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
static INLINE __m512 number_table(const int kind) {
  static const uint8_t all[32] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  floats w[4];
  numbers(kind, all, w);
  return _mm512_loadu_ps(w);
}

// The same by a table of the 16 numbers.
static INLINE void look_up(const int kind, const uint8_t *q, __m512 table, __m512 *w0, __m512 *w1) {
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

typedef int8_t bytes32 __attribute__((vector_size(32)));
typedef uint16_t words __attribute__((vector_size(32)));
typedef uint16_t loose_words __attribute__((vector_size(32), aligned(1), may_alias));

// Super-blocks are taken by halves, of four blocks: p is where the super-block begins, g which half, j the block in it.

// 32 codes in the low bits of bytes. What the bits above them hold is left over: tables do not look at it.
static INLINE void super_codes(const int kind, const uint8_t *p, int g, const int j, words *to) {
  const int part = kind == Q6_K ? j % 2 : j / 2, upper = kind == Q6_K ? j / 2 : j % 2;
  *to = *(const loose_words *)(p + (kind == Q6_K ? 0 : kind == Q5_K ? 48 : 16) + g * 64 + part * 32) >> 4 * upper;
  if (kind == Q4_K) return;
  words high;
  if (kind == Q5_K) high = *(const loose_words *)(p + 16) >> 4 * g << (4 - j);
  else high = *(const loose_words *)(p + 128 + g * 32), high = j < 2 ? high << (4 - 2 * j) : high >> (2 * j - 4);
  *to = ((*to ^ high) & 0x0f0f) ^ high;
}

// The same as signed numbers.
static INLINE void super_numbers(const int kind, const uint8_t *p, int g, const int j, bytes32 *to) {
  words c;
  super_codes(kind, p, g, j, &c);
  *to = (bytes32)(c & (uint16_t)(kind == Q4_K ? 0x0f0f : kind == Q5_K ? 0x1f1f : 0x3f3f));
  if (kind == Q6_K) *to -= 32;
}

// Q6_K: a scale for each 16 codes; else a scale for each 32, then an offset for each 32.
static INLINE void super_heads(const int kind, const uint8_t *p, int g, floats *to) {
  ints n;
  if (kind == Q6_K) {
    widen(p + 192 + 8 * g, &n);
    *to = __builtin_convertvector(n, floats) * half_at(p + 208);
    return;
  }
  // Heads have six bits. Those of the first half are the low bits of 8 bytes; of the second half, two bits are the
  // upper bits of these bytes, and four bits are the halves of 4 bytes more.
  uint64_t six;
  uint32_t four;
  memcpy(&six, p + 4, 8), memcpy(&four, p + 12, 4);
  const uint64_t low = (four & 0x0f0f0f0f) | (uint64_t)(four >> 4 & 0x0f0f0f0f) << 32;
  const uint64_t all = g ? (six >> 2 & 0x3030303030303030) | low : six & 0x3f3f3f3f3f3f3f3f;
  widen(&all, &n);
  const float d = half_at(p), m = -half_at(p + 2);
  *to = __builtin_convertvector(n, floats) * (floats){d, d, d, d, m, m, m, m};
}
