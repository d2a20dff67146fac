// Sum or difference of two tiles. Chunk: int32 left shifts of both, 1 or -1 times the second, then shift, smallest,
// largest.

#include "tile.h"

extern "C" void bstf_add(int32_t *a, int32_t a_at, int32_t *b, int32_t b_at, int32_t *chunk, int32_t chunk_at, int32_t *y,
                         int32_t y_at, int32_t pixels, int32_t channels, int32_t step) {
  set_modes();
  add_tiles(reinterpret_cast<int8_t *>(a) + a_at, reinterpret_cast<int8_t *>(b) + b_at,
            reinterpret_cast<int8_t *>(y) + y_at, chunk + chunk_at / 4, pixels, channels, step);
}
