/* Shared by the kernels: bf16 as 16 bits, widened and rounded by integer arithmetic that vectorises. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

typedef uint16_t bf16;

static inline float widen(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

/* To nearest, ties to even; a NaN may become another NaN or, with a tiny payload, infinity. */
static inline bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* exp(x) in fp32 within 2 units in the last place; 0 below −87, where the result would be subnormal.
   x = n·ln 2 + r with |r| ≤ ln 2 / 2, ln 2 in two parts so that r keeps its digits; then a series in r. */
static inline float fast_exp(float x) {
  float n = nearbyintf(x * 1.442695041f);
  n = n < -127.0f ? -127.0f : (n > 127.0f ? 127.0f : n);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return x < -87.0f ? 0.0f : p * scale;
}

/* 2^t for t ≤ 127; what lies below −126 is taken as −126, next to nothing but not 0. A third fewer instructions than
   fast_exp: the caller folds log2 e into a factor it has anyway. Its relative error grows with |t|, as that of the
   product does. */
static inline float fast_exp2(float t) {
  t = t < -126.0f ? -126.0f : t;
  float n = nearbyintf(t), f = t - n;
  float p = 1.535336188e-4f;
  p = p * f + 1.339887440e-3f;
  p = p * f + 9.618437357e-3f;
  p = p * f + 5.550332548e-2f;
  p = p * f + 2.402264791e-1f;
  p = p * f + 6.931472028e-1f;
  p = p * f + 1.0f;
  int32_t bits;
  memcpy(&bits, &p, 4);
  bits += (int32_t)n << 23;
  memcpy(&p, &bits, 4);
  return p;
}

#define LOG2E 1.44269504088896341f

/* The 8 × 8 block at (r, c) of x [rows, cols], 16-bit numbers, to out [cols, rows]: through registers. */
static inline void transpose_block(const uint16_t *x, uint16_t *out, long rows, long cols, long r, long c) {
#ifdef __SSE2__
  if (r + 8 <= rows && c + 8 <= cols) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128((const __m128i *)(x + (r + i) * cols + c));
    for (int i = 0; i < 4; i++) {
      b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
      b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) {
        a[4 * i + 2 * j] = _mm_unpacklo_epi32(b[4 * i + j], b[4 * i + 2 + j]);
        a[4 * i + 2 * j + 1] = _mm_unpackhi_epi32(b[4 * i + j], b[4 * i + 2 + j]);
      }
    for (int j = 0; j < 4; j++) {
      _mm_storeu_si128((__m128i *)(out + (c + 2 * j) * rows + r), _mm_unpacklo_epi64(a[j], a[4 + j]));
      _mm_storeu_si128((__m128i *)(out + (c + 2 * j + 1) * rows + r), _mm_unpackhi_epi64(a[j], a[4 + j]));
    }
    return;
  }
#endif
  for (long i = r; i < r + 8 && i < rows; i++)
    for (long j = c; j < c + 8 && j < cols; j++) out[j * rows + i] = x[i * cols + j];
}
