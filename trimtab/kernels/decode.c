/* One decode step's attention over a cache in blocks, and the drawing of tokens. Python side: decode.py.

   A block holds BLOCK keys of every kv head, keys transposed [kv head, d, BLOCK] so that a score is a sum over
   d of whole vectors of keys, values as they are [kv head, BLOCK, dvp]. Both inner products then are the same
   loop: a few vectors loaded once, multiplied with a broadcast number for each of up to TILE queries. */
#include "common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define BLOCK 32
#define SPAN 256 /* keys of one part: its scores for TILE queries stay in the first-level cache */
#define INLINE static inline __attribute__((always_inline))
#ifdef __AVX512F__
#define LANES 16
#define TILE 8
#else
#define LANES 8
#define TILE 4
#endif
#define HEADER 16 /* floats before a part's sums: their maximum and total, and the rest of the cache line */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t wide __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t wide_signed __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

/* LANES numbers from element i on, as fp32. */
INLINE vec load(const void *x, int64_t i, int is_bf16) {
  if (!is_bf16) return *(const vec *)((const float *)x + i);
#if defined(__AVX512F__) /* what the general form should become, and in GCC 12 does not */
  return (vec)(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const bf16 *)x + i))), 16));
#elif defined(__AVX2__)
  return (vec)(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)((const bf16 *)x + i))), 16));
#else
  return (vec)(__builtin_convertvector(*(const half *)((const bf16 *)x + i), wide) << 16);
#endif
}

/* fast_exp of common.h on a whole vector: loops over a part's few scores are too short to be vectorised well. */
INLINE vec exp_of(vec x) {
  const float shift = 12582912.0f; /* 1.5·2²³: adding and subtracting it rounds to a whole number */
  wide keep = (wide)(x >= -87.0f);
  x = (vec)((wide)x & keep);
  vec n = (x * 1.442695041f + shift) - shift;
  vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  wide_signed power = (__builtin_convertvector(n, wide_signed) + 127) << 23;
  return (vec)((wide)(p * (vec)power) & keep);
}

INLINE float number(const void *x, int64_t i, int is_bf16) {
  return is_bf16 ? widen(((const bf16 *)x)[i]) : ((const float *)x)[i];
}

INLINE const void *at(const void *x, int64_t i, int is_bf16) { return (const char *)x + i * (is_bf16 ? 2 : 4); }

/* What the steps between two changes of the set of running rows have in common; `Plan` in decode.py.
   A task is up to SPAN keys of a node with the rows that see it. Every (task, row) has a part: the softmax's
   maximum, its total and the weighted sum of values over those keys, for each head. */
typedef struct {
  int64_t rows, heads, kv_heads, d, dv, dvp, tasks, stride, own_parts;
  const int32_t *task_block, *task_keys, *task_start, *task_first, *task_rows, *blocks;
  const int32_t *row_first, *row_slots;           /* each row's parts over nodes */
  const int32_t *own_blocks, *own_len, *position; /* own_len: before this step's token */
  float *parts;
} Plan;

/* scores[Q, SPAN] of one block: SPAN apart for each query, q is [Q, d]. */
INLINE void block_scores(const int Q, const float *q, const void *k, int64_t d, float *scores, int is_bf16) {
  const int U = Q <= 2 ? 2 : 1; /* few queries: two sums each, or the additions wait for each other */
  for (int c = 0; c < BLOCK; c += 2 * LANES) {
    vec sum[2][TILE][2];
#pragma GCC unroll 2
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int j = 0; j < Q; j++) sum[u][j][0] = sum[u][j][1] = (vec){0};
    int64_t i = 0;
    for (; i + U <= d; i += U)
#pragma GCC unroll 2
      for (int u = 0; u < U; u++) {
        vec k0 = load(k, (i + u) * BLOCK + c, is_bf16), k1 = load(k, (i + u) * BLOCK + c + LANES, is_bf16);
#pragma GCC unroll 8
        for (int j = 0; j < Q; j++) {
          sum[u][j][0] += k0 * q[j * d + i + u];
          sum[u][j][1] += k1 * q[j * d + i + u];
        }
      }
    for (; i < d; i++) {
      vec k0 = load(k, i * BLOCK + c, is_bf16), k1 = load(k, i * BLOCK + c + LANES, is_bf16);
      for (int j = 0; j < Q; j++) {
        sum[0][j][0] += k0 * q[j * d + i];
        sum[0][j][1] += k1 * q[j * d + i];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < Q; j++) {
      if (U == 2) {
        sum[0][j][0] += sum[1][j][0];
        sum[0][j][1] += sum[1][j][1];
      }
      *(vec *)(scores + j * SPAN + c) = sum[0][j][0];
      *(vec *)(scores + j * SPAN + c + LANES) = sum[0][j][1];
    }
  }
}

/* out[j][c…] = Σ weights · values over the keys first…keys−1, W vectors of the values' width. */
INLINE void weighted_sum(const int Q, const int W, const float *weights, const void *values, const int32_t *blocks,
                         int64_t step, int64_t dvp, int first, int keys, int64_t c, float **out, int is_bf16) {
  vec sum[TILE][4];
#pragma GCC unroll 8
  for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) sum[j][w] = (vec){0};
  for (int b = first / BLOCK; b * BLOCK < keys; b++) {
    const void *v = at(values, blocks[b] * step + c, is_bf16);
    int end = keys - b * BLOCK < BLOCK ? keys - b * BLOCK : BLOCK;
    for (int i = 0; i < end; i++) {
      vec x[4];
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) x[w] = load(v, i * dvp + w * LANES, is_bf16);
#pragma GCC unroll 8
      for (int j = 0; j < Q; j++) {
        float p = weights[j * SPAN + b * BLOCK + i];
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) sum[j][w] += x[w] * p;
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Q; j++)
#pragma GCC unroll 4
    for (int w = 0; w < W; w++) *(vec *)(out[j] + c + w * LANES) = sum[j][w];
}

typedef struct {
  const int32_t *blocks;
  int keys, from[TILE]; /* keys before `from` are outside a query's window */
  int64_t kv_head;
  float *part[TILE];
  const float *q;
} Tile;

/* The parts of `count` ≤ Q queries over one task's keys. */
INLINE void tile_parts(const int Q, int count, const Plan *p, const Tile *t, const void *K, const void *V,
                       float cap, int is_bf16) {
  float scores[TILE * SPAN] __attribute__((aligned(64)));
  float spare[HEADER + p->dvp];
  int64_t k_step = p->kv_heads * p->d * BLOCK, v_step = p->kv_heads * p->dvp * BLOCK;
  int first = t->from[0], keys = t->keys, end = (keys + BLOCK - 1) / BLOCK * BLOCK;
  for (int j = 1; j < count; j++) first = t->from[j] < first ? t->from[j] : first;
  first = first < keys ? first / BLOCK * BLOCK : end; /* whole blocks; none where no query sees a key */
  for (int b = first / BLOCK; b * BLOCK < keys; b++)
    block_scores(Q, t->q, at(K, t->blocks[b] * k_step + t->kv_head * p->d * BLOCK, is_bf16), p->d,
                 scores + b * BLOCK, is_bf16);
  float *out[TILE];
  for (int j = 0; j < Q; j++) {
    float *s = scores + j * SPAN, top = -INFINITY, total = 0;
    out[j] = (j < count ? t->part[j] : spare) + HEADER;
    if (j >= count) continue;
    if (cap > 0)
      for (int i = first; i < end; i += LANES) {
        vec *x = (vec *)(s + i);
        vec y = *x * (2 / cap);
        wide less = (wide)(y < 40.0f);
        y = (vec)(((wide)y & less) | ((wide)((vec){0} + 40.0f) & ~less));
        *x = cap - 2 * cap / (exp_of(y) + 1); /* cap · tanh(x / cap) */
      }
    for (int i = first; i < t->from[j] && i < keys; i++) s[i] = -INFINITY;
    for (int i = keys; i < end; i++) s[i] = -INFINITY;
    vec most = (vec){0} - INFINITY, sum = {0};
    for (int i = first; i < end; i += LANES) {
      vec x = *(vec *)(s + i);
      wide more = (wide)(x > most);
      most = (vec)(((wide)x & more) | ((wide)most & ~more));
    }
    for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
    float low = top == -INFINITY ? 0 : top;
    for (int i = first; i < end; i += LANES) sum += *(vec *)(s + i) = exp_of(*(vec *)(s + i) - low);
    for (int i = 0; i < LANES; i++) total += sum[i];
    t->part[j][0] = top;
    t->part[j][1] = total;
  }
  const void *v = at(V, t->kv_head * p->dvp * BLOCK, is_bf16);
  int64_t c = 0, n = p->dvp;
  if (Q <= 4 && TILE == 8)
    for (; c + 4 * LANES <= n; c += 4 * LANES)
      weighted_sum(Q, 4, scores, v, t->blocks, v_step, n, first, keys, c, out, is_bf16);
  for (; c + 2 * LANES <= n; c += 2 * LANES)
    weighted_sum(Q, 2, scores, v, t->blocks, v_step, n, first, keys, c, out, is_bf16);
  for (; c < n; c += LANES) weighted_sum(Q, 1, scores, v, t->blocks, v_step, n, first, keys, c, out, is_bf16);
}

/* All heads of kv head h for `count` rows over the same keys, TILE queries at a time. */
INLINE void task_parts(const Plan *p, int count, const int32_t *rows, const int32_t *blocks, int keys, int start,
                       int64_t h, int64_t slot, const void *q, int64_t q_row, const void *K, const void *V,
                       float scale, float cap, int window, int is_bf16) {
  int64_t repeat = p->heads / p->kv_heads, d = p->d, size = p->dvp + HEADER, all = count * repeat;
  float numbers[TILE * d];
  Tile t = {.blocks = blocks, .keys = keys, .kv_head = h, .q = numbers};
  for (int64_t done = 0; done < all; done += TILE) {
    int some = all - done < TILE ? (int)(all - done) : TILE;
    for (int j = 0; j < some; j++) {
      int64_t place = (done + j) / repeat, head = h * repeat + (done + j) % repeat, row = rows[place];
      for (int64_t i = 0; i < d; i++) numbers[j * d + i] = number(q, row * q_row + head * d + i, is_bf16) * scale;
      t.part[j] = p->parts + ((slot + place) * p->heads + head) * size;
      int from = window > 0 ? p->position[row] - window + 1 - start : 0;
      t.from[j] = from > 0 ? from : 0;
    }
    if (some > 4) {
      memset(numbers + some * d, 0, (TILE - some) * d * 4);
      tile_parts(TILE, some, p, &t, K, V, cap, is_bf16);
    } else if (some > 2) {
      memset(numbers + some * d, 0, (4 - some) * d * 4);
      tile_parts(4, some, p, &t, K, V, cap, is_bf16);
    } else if (some == 2) {
      tile_parts(2, some, p, &t, K, V, cap, is_bf16);
    } else {
      tile_parts(1, some, p, &t, K, V, cap, is_bf16);
    }
  }
}

/* Write one token's key and value of head h to its place in a block. */
INLINE void put(const Plan *p, const void *k, const void *v, void *K, void *V, int64_t block, int place, int64_t h,
                int is_bf16) {
  int64_t to_k = (block * p->kv_heads + h) * p->d * BLOCK + place;
  int64_t to_v = ((block * p->kv_heads + h) * BLOCK + place) * p->dvp;
  if (is_bf16)
    for (int64_t i = 0; i < p->d; i++) ((bf16 *)K)[to_k + i * BLOCK] = ((const bf16 *)k)[i];
  else
    for (int64_t i = 0; i < p->d; i++) ((float *)K)[to_k + i * BLOCK] = ((const float *)k)[i];
  memcpy((void *)at(V, to_v, is_bf16), v, p->dv * (is_bf16 ? 2 : 4));
}

/* Softmax over all parts of one row and head: Σ e^(mᵢ−m)·sumᵢ / Σ e^(mᵢ−m)·totalᵢ. */
INLINE void merge(const Plan *p, int64_t row, int64_t head, int64_t own, int own_parts, void *out, int is_bf16) {
  int64_t size = p->dvp + HEADER, n = p->row_first[row + 1] - p->row_first[row];
  const int32_t *slots = p->row_slots + p->row_first[row];
  float top = -INFINITY, total = 0, sum[p->dvp];
  for (int64_t i = 0; i < n + own_parts; i++) {
    const float *part = p->parts + ((i < n ? slots[i] : own + i - n) * p->heads + head) * size;
    top = part[0] > top ? part[0] : top;
  }
  memset(sum, 0, sizeof sum);
  for (int64_t i = 0; i < n + own_parts; i++) {
    const float *part = p->parts + ((i < n ? slots[i] : own + i - n) * p->heads + head) * size;
    if (part[0] == -INFINITY) continue;
    float factor = expf(part[0] - top);
    total += factor * part[1];
#pragma omp simd
    for (int64_t c = 0; c < p->dvp; c++) sum[c] += factor * part[HEADER + c];
  }
  int64_t to = (row * p->heads + head) * p->dv;
  float share = 1 / total;
  if (is_bf16)
    for (int64_t c = 0; c < p->dv; c++) ((bf16 *)out)[to + c] = narrow(sum[c] * share);
  else
    for (int64_t c = 0; c < p->dv; c++) ((float *)out)[to + c] = sum[c] * share;
}

INLINE void attend(const Plan *p, const void *q, const void *k, const void *v, const int64_t *row_step, void *K,
                   void *V, void *out, float scale, float cap, int window, int is_bf16) {
  int64_t slots = p->task_first[p->tasks], shared = p->tasks * p->kv_heads, heads = p->kv_heads;
  int64_t own = p->rows * p->own_parts * heads;
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < shared; i++) {
      int64_t t = i / heads, first = p->task_first[t];
      task_parts(p, p->task_first[t + 1] - first, p->task_rows + first, p->blocks + p->task_block[t], p->task_keys[t],
                 p->task_start[t], i % heads, first, q, row_step[0], K, V, scale, cap, window, is_bf16);
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < own; i++) {
      int64_t h = i % heads, row = i / heads / p->own_parts;
      int part = i / heads % p->own_parts, len = p->own_len[row], keys = len + 1 - part * SPAN;
      if (keys <= 0) continue;
      const int32_t *table = p->own_blocks + row * p->stride;
      if (keys <= SPAN)
        put(p, at(k, row * row_step[1] + h * p->d, is_bf16), at(v, row * row_step[2] + h * p->dv, is_bf16), K, V,
            table[len / BLOCK], len % BLOCK, h, is_bf16);
      int32_t only = row;
      task_parts(p, 1, &only, table + part * (SPAN / BLOCK), keys < SPAN ? keys : SPAN,
                 p->position[row] - len + part * SPAN, h, slots + row * p->own_parts + part, q, row_step[0], K, V,
                 scale, cap, window, is_bf16);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p->rows * p->heads; i++) {
      int64_t row = i / p->heads;
      merge(p, row, i % p->heads, slots + row * p->own_parts, p->own_len[row] / SPAN + 1, out, is_bf16);
    }
  }
}

void trimtab_attend(const Plan *p, const void *q, const void *k, const void *v, const int64_t *row_step, void *K,
                    void *V, void *out, float scale, float cap, int window, int is_bf16) {
  if (is_bf16)
    attend(p, q, k, v, row_step, K, V, out, scale, cap, window, 1);
  else
    attend(p, q, k, v, row_step, K, V, out, scale, cap, window, 0);
}

/* Keys and values of `tokens` tokens to the blocks and places given for each. */
void trimtab_store(int64_t tokens, const int64_t *shape, const void *k, const void *v, const int64_t *row_step,
                   void *K, void *V, const int32_t *blocks, const int32_t *places, int is_bf16) {
  Plan p = {.kv_heads = shape[0], .d = shape[1], .dv = shape[2], .dvp = shape[3]};
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < tokens; i++)
    for (int64_t h = 0; h < p.kv_heads; h++)
      put(&p, at(k, i * row_step[0] + h * p.d, is_bf16), at(v, i * row_step[1] + h * p.dv, is_bf16), K, V, blocks[i],
          places[i], h, is_bf16);
}

/* ---- drawing ---- */

static inline uint64_t splitmix(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

#define CHUNK 64

/* argmax p/E over the row, E being `exponential_noise` of sampling.py. E ≥ u, the uniform number it is made
   from, so a token with p/u below the best so far cannot win, and hardly any logarithm is needed. */
INLINE void draw_row(const void *logits, int64_t n, float scale, const int32_t *hashes, uint64_t key, int64_t position,
                     int64_t *token, float *logp, int is_bf16) {
  uint64_t mixed = splitmix(key + splitmix((uint64_t)position + 1));
  uint32_t flip = (uint32_t)mixed, factor = (uint32_t)(mixed >> 32) | 1;
  float top = -INFINITY, best = 0, chosen = -INFINITY;
  double total = 0;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; i++) {
    float x = number(logits, i, is_bf16);
    top = x > top ? x : top;
  }
  *token = 0;
  for (int64_t start = 0; start < n; start += CHUNK) {
    float p[CHUNK], u[CHUNK], sum = 0;
    int size = n - start < CHUNK ? (int)(n - start) : CHUNK, some = 0;
    float bound = best * 0.99999f;
#pragma omp simd reduction(+ : sum) reduction(| : some)
    for (int j = 0; j < size; j++) {
      uint32_t x = ((uint32_t)hashes[start + j] ^ flip) * factor;
      x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
      x = (x ^ (x >> 13)) * 0xC2B2AE35u;
      x ^= x >> 16;
      float e = ((float)(int32_t)(x & 0x7FFFFFFF) + 0.5f) * 0x1p-31f;
      e = e < 1 - 0x1p-24f ? e : 1 - 0x1p-24f;
      float w = fast_exp((number(logits, start + j, is_bf16) - top) * scale);
      p[j] = w;
      u[j] = e;
      sum += w;
      some |= e * bound < w;
    }
    total += sum;
    if (!some) continue;
    for (int j = 0; j < size; j++)
      if (u[j] * bound < p[j]) {
        float score = p[j] / -log1pf(-u[j]);
        if (score > best) {
          best = score;
          bound = best * 0.99999f;
          *token = start + j;
          chosen = number(logits, start + j, is_bf16);
        }
      }
  }
  *logp = (chosen - top) * scale - (float)log(total);
}

/* Tokens of `rows` rows of logits. Overwrites the forbidden tokens' logits of rows that are held back. */
void trimtab_draw(int64_t rows, int64_t n, void *logits, int64_t row_step, float scale, const int32_t *hashes,
                  const uint64_t *keys, const int32_t *positions, const uint8_t *held, int64_t forbidden,
                  const int64_t *forbidden_ids, int64_t *tokens, float *logps, int is_bf16) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t r = 0; r < rows; r++) {
    void *row = (void *)at(logits, r * row_step, is_bf16);
    for (int64_t f = 0; held[r] && f < forbidden; f++) {
      if (is_bf16)
        ((bf16 *)row)[forbidden_ids[f]] = 0xFF80;
      else
        ((float *)row)[forbidden_ids[f]] = -INFINITY;
    }
    if (is_bf16)
      draw_row(row, n, scale, hashes, keys[r], positions[r], tokens + r, logps + r, 1);
    else
      draw_row(row, n, scale, hashes, keys[r], positions[r], tokens + r, logps + r, 0);
  }
}
