// Attention over the paged cache: keys and values are read where they lie. Decode and prompt chunks of any lengths in
// one call, bfloat16 or float32; sums are float32.
//
// The bits of one query's result depend on the query, its position and the keys and values that it sees, and on
// nothing else: not on what runs beside it, on chunks, pages or threads. So each query goes through blocks of BLOCK keys
// that begin at fixed positions, in ascending order; every block has a maximum, a sum and a weighted sum of values of
// its own (a `Part`), and parts are merged one after the other, whoever made them. A score is one chain of additions
// along the head, a value's sum one chain along the keys. What a query does not see is never added, not even as zero.
// The file is compiled with native/__init__.py:STRICT, so that the compiler chooses no other order, and does not fuse
// in one copy of a loop what it does not fuse in another.

#include <math.h>
#include <stdlib.h>

#include "formats.h"

#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { W = 16, G = 4 };  // floats in a vector, and vectors of keys whose scores are summed at once
#elif defined(__AVX2__)
enum { W = 8, G = 2 };
#else
enum { W = 4, G = 2 };
#endif
enum {
  STRIP = G * W,
  BLOCK = 128,  // keys
  ROWS = 32,    // of one tile; a row is one head of one query
  TOGETHER = 4,  // rows that share the loads of a key or a value
  MOST = 512,   // head_dim
};

typedef float vec __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t loose_hvec __attribute__((vector_size(2 * W), aligned(2), may_alias));

typedef struct {
  int bf16;
  const char *q, *keys, *values;
  char *out;
  const float *sinks;
  const int32_t *pages, *first, *query_starts, *starts;
  long most_pages, page_size, heads, kv_heads, dim, q_stride, window;
  float scale, softcap;
} Call;

typedef struct {  // some rows of one sequence that look at the same key head, and the keys that any of them sees
  int sequence, kv_head, rows;
  long row, low, high, parts;  // parts: where those of its first block stand, if blocks are shared out
} Tile;

typedef struct {
  float max[ROWS], sum[ROWS];  // sum -1: the row sees nothing here
  float acc[] __attribute__((aligned(64)));  // (ROWS, width)
} Part;

static inline long width_of(long dim) { return (dim + 15) / 16 * 16; }
static inline size_t part_bytes(long dim, long rows) { return (sizeof(Part) + rows * width_of(dim) * 4 + 63) / 64 * 64; }

static INLINE vec all(float x) { return x - (vec){0}; }
static INLINE vec pick(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }
static INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

static INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// exp(x) for x <= 0: 2^n exp(r), |r| <= ln 2 / 2, by Taylor's series; 0 below the normal numbers. NaN stays NaN.
static INLINE vec exponential(vec x) {
  const vec shift = all(0x1.8p23f), t = fused(x, all(0x1.715476p0f), shift), n = t - shift;
  const vec r = fused(n, all(-0x1.7f7d1cp-20f), fused(n, all(-0x1.62e4p-1f), x));
  vec y = all(1.0f / 5040);
  y = fused(y, r, all(1.0f / 720));
  y = fused(y, r, all(1.0f / 120));
  y = fused(y, r, all(1.0f / 24));
  y = fused(y, r, all(1.0f / 6));
  y = fused(y, r, all(0.5f));
  y = fused(y, r, all(1));
  y = fused(y, r, all(1));
  const uvec power = ((uvec)t - (uvec)shift + 127) << 23;
  return pick(x < all(-87), all(0), y * (vec)power);
}

static INLINE float exponential_of(float x) { return exponential(all(x))[0]; }

static INLINE vec capped(vec x, float softcap) {  // softcap * tanh(x / softcap)
  const vec y = x / all(softcap), size = (vec)((ivec)y & 0x7fffffff), e = exponential(size * -2.0f);
  return (vec)((ivec)((1 - e) / (1 + e)) | ((ivec)y & (int32_t)0x80000000)) * softcap;
}

// The first `there` of W numbers of a key or value, as float32, and zeros after them.
static INLINE vec load(const int bf16, const char *p, const long there) {
  float rest[W] = {0};
  if (there < W) {
    for (long i = 0; i < there; i++) rest[i] = bf16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
    return *(const loose_vec *)rest;
  }
  if (!bf16) return *(const loose_vec *)p;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
  return (vec)(__builtin_convertvector(*(const loose_hvec *)p, uvec) << 16);
#endif
}

// A column is what one step of a score's chain multiplies: one number, or two of bfloat16 where they have a product.
#if defined(WIDE_BF16)
#define PAIRS(BF16) (BF16)
#else
#define PAIRS(BF16) 0
#endif

static inline long columns_of(const Call *c) { return PAIRS(c->bf16) ? (c->dim + 1) / 2 : c->dim; }

static INLINE vec load_columns(const int bf16, const char *p, long i, long dim) {
  if (!PAIRS(bf16)) return load(bf16, p + i * (bf16 ? 2 : 4), dim - i);
  float rest[W] = {0};
  if (dim - 2 * i >= 2 * W) return *(const loose_vec *)(p + i * 4);
  memcpy(rest, p + i * 4, (size_t)(dim - 2 * i) * 2);
  return *(const loose_vec *)rest;
}

static INLINE vec step(const int bf16, vec column, float q, vec sum) {
#if defined(WIDE_BF16)
  if (bf16) return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)column, (__m512bh)_mm512_set1_ps(q));
#endif
  (void)bf16;
  return fused(column, all(q), sum);
}

// W keys' columns i..i+W-1 as W vectors of one column each, STRIP apart.
static INLINE void transpose(const int bf16, const char *const *keys, long i, long dim, float *to) {
  vec v[W];
#pragma GCC unroll 16
  for (int k = 0; k < W; k++) v[k] = load_columns(bf16, keys[k], i, dim);
#if defined(__clang__)
  for (int k = 0; k < W; k++)
    for (int j = 0; j < W; j++) to[j * STRIP + k] = v[k][j];
#else
#pragma GCC unroll 4
  for (int s = 1; s < W; s *= 2) {
    ivec low, high;
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) low[j] = j & s ? j - s + W : j, high[j] = j & s ? j + W : j + s;
#pragma GCC unroll 16
    for (int k = 0; k < W; k++)
      if (!(k & s)) {
        const vec a = v[k], b = v[k | s];
        v[k] = __builtin_shuffle(a, b, low), v[k | s] = __builtin_shuffle(a, b, high);
      }
  }
#pragma GCC unroll 16
  for (int j = 0; j < W; j++) *(vec *)(to + j * STRIP) = v[j];
#endif
}

// out (rows, BLOCK), STRIP of them: products of some rows of q (rows, MOST) and the keys of a strip.
static INLINE void dots(const int bf16, const int rows, const float *q, const float *strip, long columns, float *out) {
  vec sum[TOGETHER][G];
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < G; g++) sum[r][g] = all(0);
  for (long i = 0; i < columns; i++)
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      const vec column = *(const vec *)(strip + i * STRIP + g * W);
#pragma GCC unroll 4
      for (int r = 0; r < rows; r++) sum[r][g] = step(bf16, column, q[r * MOST + i], sum[r][g]);
    }
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < G; g++) *(vec *)(out + r * BLOCK + g * W) = sum[r][g];
}

// acc (rows, width) += weights (rows, BLOCK) times the values of keys from..to-1: of each the numbers from the i-th on, as
// many vectors, whole ones if there are `there` numbers.
static INLINE void add_some(const int bf16, const int rows, const int vectors, const char *const *values, int from,
                            int to, long i, const long there, const float *weights, float *acc, long width) {
  vec sum[TOGETHER][G];
  acc += i;
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) sum[r][v] = *(const vec *)(acc + r * width + v * W);
  const long size = bf16 ? 2 : 4;
  for (int k = from; k < to; k++) {
    vec value[G];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) value[v] = load(bf16, values[k] + (i + v * W) * size, there - v * W);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sum[r][v] = fused(all(weights[r * BLOCK + k]), value[v], sum[r][v]);
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) *(vec *)(acc + r * width + v * W) = sum[r][v];
}

static INLINE void add_values(const int bf16, const int rows, const char *const *values, int from, int to, long dim,
                              const float *weights, float *acc, long width) {
  long i = 0;
  for (; i + G * W <= dim; i += G * W)
    add_some(bf16, rows, G, values, from, to, i, G * W, weights, acc, width);
  for (; i + W <= dim; i += W) add_some(bf16, rows, 1, values, from, to, i, W, weights, acc, width);
  if (i < dim) add_some(bf16, rows, 1, values, from, to, i, dim - i, weights, acc, width);
}

#define KINDS_OF(BF16, ROWS_)                                                                                         \
  static void dots_##BF16##_##ROWS_(const float *q, const float *strip, long columns, float *out) {                   \
    dots(BF16, ROWS_, q, strip, columns, out);                                                                        \
  }                                                                                                                   \
  static void values_##BF16##_##ROWS_(const char *const *values, int from, int to, long dim, const float *weights,    \
                                      float *acc, long width) {                                                       \
    add_values(BF16, ROWS_, values, from, to, dim, weights, acc, width);                                              \
  }
KINDS_OF(0, 1) KINDS_OF(0, 2) KINDS_OF(0, 3) KINDS_OF(0, 4) KINDS_OF(1, 1) KINDS_OF(1, 2) KINDS_OF(1, 3) KINDS_OF(1, 4)

typedef void dots_fn(const float *, const float *, long, float *);
typedef void values_fn(const char *const *, int, int, long, const float *, float *, long);
static dots_fn *const DOTS_OF[2][TOGETHER] = {{dots_0_1, dots_0_2, dots_0_3, dots_0_4},
                                              {dots_1_1, dots_1_2, dots_1_3, dots_1_4}};
static values_fn *const VALUES_OF[2][TOGETHER] = {{values_0_1, values_0_2, values_0_3, values_0_4},
                                                  {values_1_1, values_1_2, values_1_3, values_1_4}};

// Scores from..to-1 of one row into weights, not yet divided by their sum; the others become 0 as far as vectors reach.
static void weigh(const Call *c, float *scores, int from, int to, float *max, float *sum) {
  const int begin = from / W * W;
  ivec lane;
  for (int j = 0; j < W; j++) lane[j] = j;
  vec top = all(-INFINITY), total = all(0);
  for (int k = begin; k < to; k += W) {
    vec x = *(vec *)(scores + k) * c->scale;
    if (c->softcap > 0) x = capped(x, c->softcap);
    x = pick((lane + k >= from) & (lane + k < to), x, all(-INFINITY));
    *(vec *)(scores + k) = x;
    top = larger(top, x);
  }
  float m = top[0];
  for (int j = 1; j < W; j++) m = top[j] > m ? top[j] : m;
  const float base = m == -INFINITY ? 0 : m;  // -inf less -inf would be NaN
  for (int k = begin; k < to; k += W) {
    const vec e = exponential(*(vec *)(scores + k) - base);
    *(vec *)(scores + k) = e;
    total += e;
  }
  for (int half = W / 2; half; half /= 2)
    for (int j = 0; j < half; j++) total[j] += total[j + half];
  *max = m, *sum = total[0];
}

static inline void visible(const Call *c, const Tile *t, int r, long *low, long *high) {
  const long position = c->starts[t->sequence] + (t->row + r) / (c->heads / c->kv_heads);
  *high = position + 1;
  *low = c->window && position >= c->window ? position - c->window + 1 : 0;
}

// The tile's queries as columns, and zeros after them.
static void load_queries(const Call *c, const Tile *t, float *q) {
  const long repeat = c->heads / c->kv_heads, size = c->bf16 ? 2 : 4, columns = columns_of(c);
  for (int r = 0; r < t->rows; r++, q += MOST) {
    const long token = c->query_starts[t->sequence] + (t->row + r) / repeat;
    const long head = t->kv_head * repeat + (t->row + r) % repeat;
    const char *from = c->q + (token * c->q_stride + head * c->dim) * size;
    for (long i = 0; i < columns; i += W) *(vec *)(q + i) = load_columns(c->bf16, from, i, c->dim);
  }
}

// The part of the tile's result that comes from the block of keys at `begin`.
static void attend(const Call *c, const Tile *t, const float *q, long begin, Part *part) {
  const int bf16 = c->bf16;
  const long width = width_of(c->dim), size = bf16 ? 2 : 4, columns = columns_of(c);
  const int low = t->low > begin ? (int)(t->low - begin) : 0;
  const int high = t->high < begin + BLOCK ? (int)(t->high - begin) : BLOCK;
  const char *keys[BLOCK], *values[BLOCK];
  const int32_t *pages = c->pages + t->sequence * c->most_pages - c->first[t->sequence];
  for (int k = low; k < high;) {
    const long page = (begin + k) / c->page_size, offset = (begin + k) % c->page_size;
    const int32_t *where = pages + page;
    size_t at = (((size_t)*where * c->page_size + offset) * c->kv_heads + t->kv_head) * c->dim * size;
    for (long n = c->page_size - offset; n && k < high; n--, k++, at += (size_t)c->kv_heads * c->dim * size)
      keys[k] = c->keys + at, values[k] = c->values + at;
  }
  for (int k = low / W * W; k < low; k++) keys[k] = keys[low];  // scores that nobody sees: of keys that are there
  for (int k = high; k % W; k++) keys[k] = keys[low];

  float scores[ROWS][BLOCK] __attribute__((aligned(64)));
  float strip[MOST * STRIP] __attribute__((aligned(64)));
  for (int s = low / STRIP * STRIP; s < high; s += STRIP) {
    for (int k = s; k < s + STRIP; k += W)
      if (k + W > low && k < high)
        for (long i = 0; i < columns; i += W) {
          if (bf16) transpose(1, keys + k, i, c->dim, strip + i * STRIP + k - s);
          else transpose(0, keys + k, i, c->dim, strip + i * STRIP + k - s);
        }
    for (int r = 0; r < t->rows; r += TOGETHER) {
      const int count = t->rows - r < TOGETHER ? t->rows - r : TOGETHER;
      DOTS_OF[bf16][count - 1](q + r * MOST, strip, columns, &scores[r][s]);
    }
  }
  int from[ROWS], to[ROWS];
  for (int r = 0; r < t->rows; r++) {
    long first, end;
    visible(c, t, r, &first, &end);
    from[r] = first > begin ? (int)(first - begin) : 0;
    to[r] = end < begin + BLOCK ? (int)(end - begin) : BLOCK;
    part->max[r] = -INFINITY, part->sum[r] = -1;
    if (from[r] < to[r]) weigh(c, scores[r], from[r], to[r], part->max + r, part->sum + r);
  }
  memset(part->acc, 0, (size_t)t->rows * width * 4);
  for (int r = 0; r < t->rows; r += TOGETHER) {
    const int count = t->rows - r < TOGETHER ? t->rows - r : TOGETHER;
    int first = 0, end = BLOCK;  // what all of these rows see
    for (int i = r; i < r + count; i++) {
      if (from[i] > first) first = from[i];
      if (to[i] < end) end = to[i];
    }
    values_fn *const one = VALUES_OF[bf16][0];
    for (int i = r; i < r + count; i++)
      one(values, from[i], first < end ? first : to[i], c->dim, scores[i], part->acc + i * width, width);
    if (first >= end) continue;
    VALUES_OF[bf16][count - 1](values, first, end, c->dim, scores[r], part->acc + r * width, width);
    for (int i = r; i < r + count; i++) one(values, end, to[i], c->dim, scores[i], part->acc + i * width, width);
  }
}

static void empty(Part *total, int rows, long width) {
  for (int r = 0; r < rows; r++) total->max[r] = -INFINITY, total->sum[r] = 0;
  memset(total->acc, 0, (size_t)rows * width * 4);
}

static void merge(Part *total, const Part *part, int rows, long width) {
  for (int r = 0; r < rows; r++) {
    if (part->sum[r] < 0) continue;
    const float top = total->max[r] > part->max[r] ? total->max[r] : part->max[r];
    const float base = top == -INFINITY ? 0 : top;
    const float a = exponential_of(total->max[r] - base), b = exponential_of(part->max[r] - base);
    total->max[r] = top, total->sum[r] = total->sum[r] * a + part->sum[r] * b;
    for (long i = r * width; i < (r + 1) * width; i += W)
      *(vec *)(total->acc + i) = fused(*(vec *)(total->acc + i), all(a), *(vec *)(part->acc + i) * b);
  }
}

static void finish(const Call *c, const Tile *t, const Part *total) {
  const long repeat = c->heads / c->kv_heads, width = width_of(c->dim);
  for (int r = 0; r < t->rows; r++) {
    const long token = c->query_starts[t->sequence] + (t->row + r) / repeat;
    const long head = t->kv_head * repeat + (t->row + r) % repeat, to = (token * c->heads + head) * c->dim;
    float sum = total->sum[r], share = 1;
    if (c->sinks) {  // one more score, which takes weight and gives no value
      const float sink = c->sinks[head], top = total->max[r] > sink ? total->max[r] : sink;
      share = exponential_of(total->max[r] - top);
      sum = sum * share + exponential_of(sink - top);
    }
    const float *acc = total->acc + r * width, factor = share / sum;
    for (long i = 0; i < c->dim; i++) {
      if (c->bf16) ((uint16_t *)c->out)[to + i] = to_bf16(acc[i] * factor);
      else ((float *)c->out)[to + i] = acc[i] * factor;
    }
  }
}

// Returns 0, or 1 where there is not enough memory.
int slipstream_attention(const Call *c, int sequences, int threads) {
  const long repeat = c->heads / c->kv_heads, width = width_of(c->dim);
  long count = 0, parts = 0, most = 0;  // most: rows of one tile
  for (int s = 0; s < sequences; s++) {
    const long rows = (c->query_starts[s + 1] - c->query_starts[s]) * repeat;
    count += (rows + ROWS - 1) / ROWS * c->kv_heads;
    if (rows > most) most = rows < ROWS ? rows : ROWS;
  }
  Tile *const tiles = malloc((size_t)(count + 1) * sizeof(Tile)), *t = tiles;
  if (!tiles) return 1;
  for (int s = 0; s < sequences; s++) {
    const long rows = (c->query_starts[s + 1] - c->query_starts[s]) * repeat;
    for (long row = 0; row < rows; row += ROWS)
      for (int h = 0; h < c->kv_heads; h++, t++) {
        long unused;
        *t = (Tile){.sequence = s, .kv_head = h, .row = row, .rows = rows - row < ROWS ? (int)(rows - row) : ROWS};
        visible(c, t, 0, &t->low, &unused), visible(c, t, t->rows - 1, &unused, &t->high);
        t->parts = parts;
        parts += (t->high - 1) / BLOCK - t->low / BLOCK + 1;
      }
  }
  t->parts = parts;
  // With few tiles, their blocks are shared out, and merged when all are there: the same sums in the same order.
  const int shared = threads > 1 && count < 4 * threads && parts > count;
  const size_t bytes = part_bytes(c->dim, most);
  char *const made = aligned_alloc(64, (shared ? (size_t)parts : 1) * bytes);
  if (!made) return free(tiles), 1;
  int short_of_memory = 0;
#pragma omp parallel num_threads(threads)
  {
    float *const q = aligned_alloc(64, ROWS * MOST * 4 + 2 * bytes);
    if (!q) {
#pragma omp atomic write
      short_of_memory = 1;
    }
    Part *const total = (Part *)((char *)q + ROWS * MOST * 4), *const part = (Part *)((char *)total + bytes);
    if (shared) {
#pragma omp for schedule(dynamic)
      for (long n = 0; n < parts; n++) {
        const Tile *tile = tiles;
        while (tile[1].parts <= n) tile++;
        if (!q) continue;
        load_queries(c, tile, q);
        attend(c, tile, q, (tile->low / BLOCK + n - tile->parts) * BLOCK, (Part *)(made + n * bytes));
      }
    }
#pragma omp for schedule(dynamic)
    for (long n = 0; n < count; n++) {
      const Tile *const tile = tiles + n;
      if (!q) continue;
      empty(total, tile->rows, width);
      if (!shared) load_queries(c, tile, q);
      for (long b = tile->low / BLOCK, p = tile->parts; b * BLOCK < tile->high; b++, p++) {
        if (!shared) attend(c, tile, q, b * BLOCK, part);
        merge(total, shared ? (Part *)(made + p * bytes) : part, tile->rows, width);
      }
      finish(c, tile, total);
    }
    free(q);
  }
  free(made), free(tiles);
  return short_of_memory;
}
