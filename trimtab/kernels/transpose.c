/* out [cols, rows] = the transpose of x [rows, cols], both of 16-bit numbers. Blocks of 8 × 8 through registers. */
#include <stdint.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static void block(const uint16_t *x, uint16_t *out, long rows, long cols, long r, long c) {
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

void transpose_bf16(const uint16_t *x, uint16_t *out, long rows, long cols) {
  /* Strips of 32 rows: each line of out is then written in whole cache lines. */
#pragma omp parallel for
  for (long top = 0; top < rows; top += 32)
    for (long c = 0; c < cols; c += 8)
      for (long r = top; r < top + 32 && r < rows; r += 8) block(x, out, rows, cols, r, c);
}
