/* out [cols, rows] = the transpose of x [rows, cols], both of 16-bit numbers. Blocks of 8 × 8 through registers. */
#include "common.h"

void transpose_bf16(const uint16_t *x, uint16_t *out, long rows, long cols) {
  /* Strips of 32 rows: each line of out is then written in whole cache lines. */
#pragma omp parallel for
  for (long top = 0; top < rows; top += 32)
    for (long c = 0; c < cols; c += 8)
      for (long r = top; r < top + 32 && r < rows; r += 8) transpose_block(x, out, rows, cols, r, c);
}
