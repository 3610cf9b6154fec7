/* The matrix unit (AMX) for bf16: eight tiles of 16 rows of 64 bytes. A product C += A·B takes A [16, 32] as it lies and
   B [32, 16] with pairs of its rows side by side. */
#pragma once
#include "common.h"

#ifdef __AMX_BF16__
#include <immintrin.h>

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
} tile_config;

static inline void begin_tiles(void) {
  tile_config config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes_per_row[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
}
#endif
