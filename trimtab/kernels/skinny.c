/* out [m, n] = x [m, k] · w [n, k]ᵀ + bias [n] in bf16 with fp32 sums, for few rows x: a decode step.

   Such a product is as slow as its weights are read. PyTorch's reorders them into the shape of its matrix unit's
   second operand at every call; here they are the first operand, which that unit (AMX) takes as they lie, and the few
   rows of x are reordered instead. A row's result does not depend on how many rows there are. */
#include "tiles.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

enum { ROWS = 16, DEPTH = 32, BLOCKS = 4 }; /* of w, of k, and blocks of 16 rows of x that are held at once */

int skinny_available(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

/* One strip of 16 rows of w against `blocks` blocks of x; sums [block][row of w][row of x]. */
#define STEP(b, tile) \
  _tile_loadd(tile, packed + ((long)(b) * depth + i) * 512, 64); \
  _tile_dpbf16ps(b, 6, tile);

static void strip(const bf16 *w, const bf16 *packed, float *sums, long k, long depth, long blocks) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long i = 0; i < depth; i++) {
    _tile_loadd(6, w + i * DEPTH, k * 2);
    STEP(0, 4)
    if (blocks > 1) { STEP(1, 5) }
    if (blocks > 2) { STEP(2, 7) }
    if (blocks > 3) { STEP(3, 4) }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

/* sums [16 rows of w, 16 rows of x] → out [rows of x, n], rounded, with the bias added. */
static void across(const float *sums, const bf16 *bias, bf16 *out, long rows, long n) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = _mm512_load_ps(sums + 16 * i);
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 2; j++) {
      __m512d low = _mm512_castps_pd(b[4 * i + j]), high = _mm512_castps_pd(b[4 * i + j + 2]);
      a[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  /* a[4i + c]: rows 4i … 4i + 3 of columns c, c + 4, c + 8 and c + 12, each four numbers wide. */
  for (int c = 0; c < 4; c++) {
    __m512 even = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xDD);
    __m512 even2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    __m512 odd2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xDD);
    b[c] = _mm512_shuffle_f32x4(even, even2, 0x88);
    b[c + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    b[c + 8] = _mm512_shuffle_f32x4(even, even2, 0xDD);
    b[c + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xDD);
  }
  __m512 add = _mm512_setzero_ps();
  if (bias) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)bias));
    add = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  for (long i = 0; i < rows; i++) {
    __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(b[i], add));
    memcpy(out + i * n, &rounded, 32);
  }
}

/* packed: room for ceil(m / 16) · 16 · k numbers. n must be a multiple of 16 and k of 32; bias may be null. */
void skinny_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, bf16 *packed, long m, long n, long k) {
  long blocks = (m + 15) / 16, depth = k / DEPTH;
#pragma omp parallel
  {
    /* Pairs of neighbouring k side by side, rows of x across: [block][k / 2][16 rows][2]. */
    uint32_t *to = (uint32_t *)packed;
#pragma omp for collapse(2)
    for (long b = 0; b < blocks; b++)
      for (long i = 0; i < depth; i++)
        for (long row = 0; row < 16; row++) {
          const uint32_t *from = (const uint32_t *)(x + (b * 16 + row) * k + i * DEPTH);
          uint32_t *tile = to + (b * depth + i) * 256 + row;
          for (int pair = 0; pair < 16; pair++) tile[pair * 16] = b * 16 + row < m ? from[pair] : 0;
        }
    float sums[BLOCKS * 256] __attribute__((aligned(64)));
    begin_tiles();
#pragma omp for schedule(static)
    for (long top = 0; top < n; top += ROWS)
      for (long first = 0; first < blocks; first += BLOCKS) {
        long held = blocks - first < BLOCKS ? blocks - first : BLOCKS;
        strip(w + top * k, packed + first * depth * 512, sums, k, depth, held);
        for (long b = 0; b < held; b++) {
          long row = (first + b) * 16;
          across(sums + b * 256, bias ? bias + top : NULL, out + row * n + top, m - row < 16 ? m - row : 16, n);
        }
      }
    _tile_release();
  }
}

#else

int skinny_available(void) { return 0; }
void skinny_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, bf16 *packed, long m, long n, long k) {}

#endif
