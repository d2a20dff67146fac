// A tile on another grid. Chunk: int32 shift, smallest, largest.

#include "tile.h"

extern "C" void bstf_requantize(int32_t *x, int32_t x_at, int32_t *chunk, int32_t chunk_at, int32_t *y, int32_t y_at,
                                int32_t size) {
  set_modes();
  constexpr int WIDTH = PIXELS * LANES;
  const int8_t *from = reinterpret_cast<int8_t *>(x) + x_at;
  int8_t *to = reinterpret_cast<int8_t *>(y) + y_at;
  const int32_t *head = chunk + chunk_at / 4;
  const int vectors = size / WIDTH;
  for (int i = 0; i < vectors; ++i) {
    aie::accum<acc32, WIDTH> values;
    values.from_vector(aie::load_unaligned_v<WIDTH>(from + i * WIDTH));
    aie::store_unaligned_v(to + i * WIDTH, requantized(values, head[0], head[1], head[2]));
  }
  for (int i = vectors * WIDTH; i < size; ++i) to[i] = requantized(int64_t{from[i]}, head[0], head[1], head[2]);
}
