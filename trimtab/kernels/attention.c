/* Attention of a batch of pieces in bf16, its scores never leaving the cache. Python side: attention.py, attend and
   attend_backward, which say what is computed; here is how.

   Rows of queries are taken 16 (forward) or 32 (backward) at a time. Their scores against all keys that any of them
   sees are computed in fp32, become probabilities, are rounded to bf16 and multiplied on. */
#include "tiles.h"

#ifdef __AMX_BF16__

static long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

/* x [n, d] → the second factor of a product with xᵀ: tiles [n / 16][d / 32] of [16 pairs of d][16 rows of x][2]. */
static void pack_across(const bf16 *x, long n, long d, bf16 *out) {
  uint32_t *to = (uint32_t *)out;
  for (long top = 0; top < up_to(n, 32); top += 16)
    for (long i = 0; i < d / 32; i++, to += 256)
      for (long row = 0; row < 16; row++) {
        const uint32_t *from = (const uint32_t *)(x + (top + row) * d + i * 32);
        for (int pair = 0; pair < 16; pair++) to[pair * 16 + row] = top + row < n ? from[pair] : 0;
      }
}

/* x [n, d] → the second factor of a product with x: tiles [n / 32][d / 16] of [16 pairs of rows][16 of d][2]. */
static void pack_down(const bf16 *x, long n, long d, bf16 *out) {
  static const bf16 none[16];
  uint32_t *to = (uint32_t *)out;
  for (long top = 0; top < n; top += 32)
    for (long i = 0; i < d; i += 16)
      for (long row = top; row < top + 32; row += 2, to += 16) {
        const bf16 *even = row < n ? x + row * d + i : none, *odd = row + 1 < n ? x + (row + 1) * d + i : none;
#pragma omp simd
        for (int c = 0; c < 16; c++) to[c] = even[c] | (uint32_t)odd[c] << 16;
      }
}

/* out [16, keys …] (fp32, `stride` numbers a row) = x [16, d] · packedᵀ for the tiles of 16 keys [first, stop). */
static void scores(const bf16 *x, const bf16 *packed, float *out, long d, long stride, long first, long stop) {
  for (long t = first; t < stop; t += 4) {
    long held = stop - t < 4 ? stop - t : 4;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (long i = 0; i < d / 32; i++) {
      const bf16 *p = packed + (t * (d / 32) + i) * 512;
      long next = d / 32 * 512;
      _tile_loadd(4, x + i * 32, d * 2);
      _tile_loadd(5, p, 64); _tile_dpbf16ps(0, 4, 5);
      if (held > 1) { _tile_loadd(6, p + next, 64); _tile_dpbf16ps(1, 4, 6); }
      if (held > 2) { _tile_loadd(7, p + 2 * next, 64); _tile_dpbf16ps(2, 4, 7); }
      if (held > 3) { _tile_loadd(5, p + 3 * next, 64); _tile_dpbf16ps(3, 4, 5); }
    }
    _tile_stored(0, out + t * 16, stride * 4);
    if (held > 1) _tile_stored(1, out + t * 16 + 16, stride * 4);
    if (held > 2) _tile_stored(2, out + t * 16 + 32, stride * 4);
    if (held > 3) _tile_stored(3, out + t * 16 + 48, stride * 4);
  }
}

/* out [16, d] (fp32) = or += x [16, n] · packed, over the tiles of 32 rows [first, stop) of n; x has `stride` a row. */
static void product(const bf16 *x, const bf16 *packed, float *out, long d, long stride, long first, long stop,
                    int onto) {
  for (long c = 0; c < d / 16; c += 4) {
    long held = d / 16 - c < 4 ? d / 16 - c : 4;
    float *o = out + c * 16;
    if (onto) {
      _tile_loadd(0, o, d * 4);
      if (held > 1) _tile_loadd(1, o + 16, d * 4);
      if (held > 2) _tile_loadd(2, o + 32, d * 4);
      if (held > 3) _tile_loadd(3, o + 48, d * 4);
    } else {
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (long t = first; t < stop; t++) {
      const bf16 *p = packed + (t * (d / 16) + c) * 512;
      _tile_loadd(4, x + t * 32, stride * 2);
      _tile_loadd(5, p, 64); _tile_dpbf16ps(0, 4, 5);
      if (held > 1) { _tile_loadd(6, p + 512, 64); _tile_dpbf16ps(1, 4, 6); }
      if (held > 2) { _tile_loadd(7, p + 1024, 64); _tile_dpbf16ps(2, 4, 7); }
      if (held > 3) { _tile_loadd(5, p + 1536, 64); _tile_dpbf16ps(3, 4, 5); }
    }
    _tile_stored(0, o, d * 4);
    if (held > 1) _tile_stored(1, o + 16, d * 4);
    if (held > 2) _tile_stored(2, o + 32, d * 4);
    if (held > 3) _tile_stored(3, o + 48, d * 4);
  }
}

/* Keys [first, stop) that each of `count` rows from `top` on sees, and the tiles of 32 that hold any of them. */
typedef struct {
  long first[32], stop[32], begin, end;
} view;

static view seen(const int *positions, long period, long top, long count, long rows, long keys, long window) {
  view v = {.begin = keys, .end = 0};
  for (long i = 0; i < count; i++) {
    long at = top + i < rows ? positions[(top + i) % period] : -1;
    v.stop[i] = at + 1 < keys ? at + 1 : keys;
    v.first[i] = window > 0 && at + 1 > window ? at + 1 - window : 0;
    if (v.first[i] > v.stop[i]) v.first[i] = v.stop[i];
    if (v.first[i] < v.stop[i]) {
      v.begin = v.first[i] < v.begin ? v.first[i] : v.begin;
      v.end = v.stop[i] > v.end ? v.stop[i] : v.end;
    }
  }
  v.begin = v.begin < v.end ? v.begin / 32 * 32 : 0;
  v.end = up_to(v.end, 32);
  return v;
}

/* `count` rows of x [rows, d] from `top` on; in `room`, filled up with zeros, where there are fewer. */
static const bf16 *block(const bf16 *x, bf16 *room, long top, long count, long rows, long d) {
  if (top + count <= rows) return x + top * d;
  memset(room, 0, count * d * 2);
  memcpy(room, x + top * d, (rows - top) * d * 2);
  return room;
}

/* q [batch, rows, d], k [batch, keys, d], v [batch, keys, e] → out [batch, rows, e], lse [batch, rows]. d and e are
   multiples of 32. room: batch · up_to(keys, 32) · (d + e) numbers. */
void attend_bf16(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, const int *positions, bf16 *room,
                 long batch, long rows, long keys, long d, long e, long period, long window, float scale) {
  long wide = up_to(keys, 32), blocks = (rows + 15) / 16;
  float factor = scale * LOG2E;
#pragma omp parallel
  {
    float *s = aligned_alloc(64, 16 * wide * 4 + 16 * e * 4 + 16 * wide * 2 + 16 * d * 2);
    float *o = s + 16 * wide;
    bf16 *p = (bf16 *)(o + 16 * e), *padded = p + 16 * wide;
    begin_tiles();
#pragma omp for
    for (long b = 0; b < batch; b++) {
      pack_across(k + b * keys * d, keys, d, room + b * wide * (d + e));
      pack_down(v + b * keys * e, keys, e, room + b * wide * (d + e) + wide * d);
    }
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (long b = 0; b < batch; b++)
      for (long t = 0; t < blocks; t++) {
        const bf16 *packed = room + b * wide * (d + e);
        view see = seen(positions, period, t * 16, 16, rows, keys, window);
        scores(block(q + b * rows * d, padded, t * 16, 16, rows, d), packed, s, d, wide, see.begin / 16, see.end / 16);
        float share[16];
        for (long i = 0; i < 16 && t * 16 + i < rows; i++) {
          float *x = s + i * wide + see.begin, top = -INFINITY, sum = 0;
          bf16 *y = p + i * wide + see.begin;
          int first = see.first[i] - see.begin, stop = see.stop[i] - see.begin, n = see.end - see.begin;
#pragma omp simd reduction(max : top)
          for (int j = 0; j < n; j++) {
            float z = (j >= first) & (j < stop) ? x[j] : -INFINITY;
            top = z > top ? z : top;
          }
          float shift = first < stop ? top * factor : 0.0f;
#pragma omp simd reduction(+ : sum)
          for (int j = 0; j < n; j++) {
            float z = fast_exp2(x[j] * factor - shift);
            z = (j >= first) & (j < stop) ? z : 0.0f;
            sum += z;
            y[j] = narrow(z);
          }
          lse[b * rows + t * 16 + i] = first < stop ? top * scale + logf(sum) : -INFINITY;
          share[i] = first < stop ? 1.0f / sum : 0.0f;
        }
        product(p, packed + wide * d, o, e, wide, see.begin / 32, see.end / 32, 0);
        for (long i = 0; i < 16 && t * 16 + i < rows; i++) {
          bf16 *to = out + (b * rows + t * 16 + i) * e;
#pragma omp simd
          for (long j = 0; j < e; j++) to[j] = narrow(o[i * e + j] * share[i]);
        }
      }
    _tile_release();
    free(s);
  }
}

/* xᵀ of x [32, n] in `stride`, from column `first` to `stop`: out [n, 32]. */
static void turned(const bf16 *x, bf16 *out, long stride, long first, long stop) {
  for (long c = first; c < stop; c += 8)
    for (long r = 0; r < 32; r += 8) transpose_block(x, out, 32, stride, r, c);
}

/* With p = exp(scale·q·kᵀ − lse) and ds = scale · p · (grad·vᵀ − delta): dq = ds·k, dk = dsᵀ·q, dv = pᵀ·grad. */
void attend_backward_bf16(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *grad, const float *lse,
                          const float *delta, bf16 *dq, bf16 *dk, bf16 *dv, const int *positions, long batch, long rows,
                          long keys, long d, long e, long period, long window, float scale) {
  long wide = up_to(keys, 32), most = d > e ? d : e;
  float factor = scale * LOG2E;
#pragma omp parallel
  {
    /* Scores and their gradients; sums for dk and dv; a block of dq; then what is in bf16. */
    float *s = aligned_alloc(64, (64 * wide + wide * (d + e) + 32 * d) * 4 +
                                     (2 * wide * d + wide * e + 4 * 32 * wide + 4 * 32 * most) * 2);
    float *g = s + 32 * wide, *sum_k = g + 32 * wide, *sum_v = sum_k + wide * d, *part = sum_v + wide * e;
    bf16 *k_across = (bf16 *)(part + 32 * d), *k_down = k_across + wide * d, *v_across = k_down + wide * d;
    bf16 *p = v_across + wide * e, *ds = p + 32 * wide, *p_turned = ds + 32 * wide, *ds_turned = p_turned + 32 * wide;
    bf16 *q_room = ds_turned + 32 * wide, *g_room = q_room + 32 * most, *q_down = g_room + 32 * most;
    bf16 *g_down = q_down + 32 * most;
    begin_tiles();
#pragma omp for schedule(dynamic, 1)
    for (long b = 0; b < batch; b++) {
      pack_across(k + b * keys * d, keys, d, k_across);
      pack_down(k + b * keys * d, keys, d, k_down);
      pack_across(v + b * keys * e, keys, e, v_across);
      memset(sum_k, 0, wide * (d + e) * 4);
      for (long t = 0; t < rows; t += 32) {
        view see = seen(positions, period, t, 32, rows, keys, window);
        const bf16 *q_b = block(q + b * rows * d, q_room, t, 32, rows, d);
        const bf16 *g_b = block(grad + b * rows * e, g_room, t, 32, rows, e);
        for (long half = 0; half < 2; half++) {
          scores(q_b + half * 16 * d, k_across, s + half * 16 * wide, d, wide, see.begin / 16, see.end / 16);
          scores(g_b + half * 16 * e, v_across, g + half * 16 * wide, e, wide, see.begin / 16, see.end / 16);
        }
        for (long i = 0; i < 32; i++) {
          const float *x = s + i * wide + see.begin, *y = g + i * wide + see.begin;
          bf16 *to = p + i * wide + see.begin, *to_ds = ds + i * wide + see.begin;
          int first = see.first[i] - see.begin, stop = see.stop[i] - see.begin, n = see.end - see.begin;
          int real = t + i < rows;
          float norm = real ? lse[b * rows + t + i] * LOG2E : 0.0f, mean = real ? delta[b * rows + t + i] : 0.0f;
#pragma omp simd
          for (int j = 0; j < n; j++) {
            float z = fast_exp2(x[j] * factor - norm);
            z = (j >= first) & (j < stop) ? z : 0.0f;
            to[j] = narrow(z);
            to_ds[j] = narrow(scale * z * (y[j] - mean));
          }
        }
        turned(p, p_turned, wide, see.begin, see.end);
        turned(ds, ds_turned, wide, see.begin, see.end);
        pack_down(q_b, 32, d, q_down);
        pack_down(g_b, 32, e, g_down);
        for (long half = 0; half < 2; half++)
          product(ds + half * 16 * wide, k_down, part + half * 16 * d, d, wide, see.begin / 32, see.end / 32, 0);
        for (long i = 0; i < 32 && t + i < rows; i++)
          for (long j = 0; j < d; j++) dq[(b * rows + t + i) * d + j] = narrow(part[i * d + j]);
        for (long at = see.begin; at < see.end; at += 16) {
          product(ds_turned + at * 32, q_down, sum_k + at * d, d, 32, 0, 1, 1);
          product(p_turned + at * 32, g_down, sum_v + at * e, e, 32, 0, 1, 1);
        }
      }
      for (long i = 0; i < keys * d; i++) dk[b * keys * d + i] = narrow(sum_k[i]);
      for (long i = 0; i < keys * e; i++) dv[b * keys * e + i] = narrow(sum_v[i]);
    }
    _tile_release();
    free(s);
  }
}

#else

void attend_bf16(void) {}
void attend_backward_bf16(void) {}

#endif
