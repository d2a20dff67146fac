// Block-sparse convolution of a tile. The chunk that comes with it (little endian, each part padded to 16 bytes):
//
//     int32  shift, smallest, largest, output blocks
//     int32  bias[8 * output blocks]
//     uint16 count[output blocks], row[kept blocks]      kept blocks by output block: how many, which input block
//     int8   block[kept blocks][kh][kw][8][8]            input channel, then output channel
//     int32  sum[6]                                      parameters of the addition of a residual
//
// Only kept blocks are there, and only they are multiplied: each is a product of 4x8 by 8x8 for four pixels and a kernel
// position. Four accumulators live at a time, so that one load of weights serves sixteen pixels.
//
// Banks: the design has weights and inputs in buffers of their own; where both lie in one bank of 16 KiB, a load of each
// in the same cycle costs one more.

#include "tile.h"

namespace {

using MMUL = aie::mmul<PIXELS, LANES, LANES, int8, int8>;
constexpr int TAKEN = 4;  // accumulators at a time

struct Chunk {
  const int32_t *head, *bias, *sum;
  const uint16_t *count, *row;
  const int8_t *block;
  int blocks;

  Chunk(const int8_t *at, int taps) {
    head = reinterpret_cast<const int32_t *>(at);
    blocks = head[3];
    bias = head + 4;
    count = reinterpret_cast<const uint16_t *>(bias + LANES * blocks);
    row = count + blocks;
    int kept = 0;
    for (int i = 0; i < blocks; ++i) kept += count[i];
    block = reinterpret_cast<const int8_t *>(count) + (2 * (blocks + kept) + 15) / 16 * 16;
    sum = reinterpret_cast<const int32_t *>(block + kept * taps * LANES * LANES);
  }
};

// What sixteen sums begin with: the bias, or what is there already.
aie::vector<int32, PIXELS * LANES> begun(const int32_t *bias) {
  const aie::vector<int32, LANES> one = aie::load_unaligned_v<LANES>(bias);
  const aie::vector<int32, 2 * LANES> two = aie::concat(one, one);
  return aie::concat(two, two);
}

aie::vector<int32, PIXELS * LANES> kept_sums(const int32_t *sums, int count) {
  aie::vector<int32, PIXELS * LANES> found;
  for (int i = 0; i < count * LANES; ++i) found.set(sums[i], i);
  return found;
}

void keep(int32_t *sums, int count, const aie::vector<int32, PIXELS * LANES> &values) {
  for (int i = 0; i < count * LANES; ++i) sums[i] = values.get(i);
}

void conv(const int8_t *x, const int8_t *residual, const int8_t *packed, int8_t *y, int32_t *sums, Shape in, Shape out,
          const Window &window, bool begin, bool finish) {
  set_modes();
  const int taps = window.kernel[0] * window.kernel[1], pixels = out.rows * out.pixels;
  const Chunk chunk(packed, taps);
  const int shift = chunk.head[0], smallest = chunk.head[1], largest = chunk.head[2];
  const uint16_t *row = chunk.row;
  const int8_t *weights = chunk.block;
  for (int block = 0; block < chunk.blocks; ++block) {
    const int count = chunk.count[block];
    int32_t *part = sums + block * pixels * LANES;
    for (int first = 0; first < pixels; first += TAKEN * PIXELS) {
      const int left = (pixels - first + PIXELS - 1) / PIXELS, taken = left < TAKEN ? left : TAKEN;
      const auto place = [&](int i) { return Places(first + (i < taken ? i : 0) * PIXELS, out); };
      const Places places[TAKEN] = {place(0), place(1), place(2), place(3)};
      const auto seed = [&](int i) {
        return begin ? begun(chunk.bias + block * LANES)
                     : kept_sums(part + (first + (i < taken ? i : 0) * PIXELS) * LANES, places[i].count);
      };
      MMUL acc[TAKEN] = {MMUL(seed(0)), MMUL(seed(1)), MMUL(seed(2)), MMUL(seed(3))};
      const int8_t *from = weights;
      for (int entry = 0; entry < count; ++entry) {
        const int8_t *input = x + row[entry] * LANES;
        for (int ky = 0; ky < window.kernel[0]; ++ky)
          for (int kx = 0; kx < window.kernel[1]; ++kx, from += MMUL::size_B) {
            const auto b = aie::load_unaligned_v<MMUL::size_B>(from, 16);
            for (int i = 0; i < taken; ++i) acc[i].mac(gather(input, in, window, places[i], ky, kx, 0), b);
          }
      }
      for (int i = 0; i < taken; ++i) {
        const int at = first + i * PIXELS;
        if (finish)
          scatter(y + block * LANES, out.channels, at, places[i], requantized(acc[i], shift, smallest, largest));
        else
          keep(part + at * LANES, places[i].count, acc[i].to_vector<int32>());
      }
    }
    row += count;
    weights += count * taps * LANES * LANES;
  }
  if (finish && residual) add_tiles(y, residual, y, chunk.sum, pixels, out.channels, out.channels);
}

}  // namespace

// Buffers come as words with offsets in bytes; then shapes of input and output, the window, and whether sums begin and
// finish here.
#define BSTF_NUMBERS                                                                                                 \
  int32_t rows, int32_t columns, int32_t depth, int32_t out_rows, int32_t out_columns, int32_t out_depth, int32_t kh, \
      int32_t kw, int32_t sh, int32_t sw, int32_t dh, int32_t dw, int32_t top, int32_t left, int32_t begin, int32_t finish
#define BSTF_SHAPES                                                           \
  Shape{rows, columns, depth}, Shape{out_rows, out_columns, out_depth},       \
      Window{{kh, kw}, {sh, sw}, {dh, dw}, {top, left}}, begin != 0, finish != 0
#define BSTF_AT(buffer) reinterpret_cast<int8_t *>(buffer) + buffer##_at

extern "C" {

void bstf_conv(int32_t *x, int32_t x_at, int32_t *chunk, int32_t chunk_at, int32_t *y, int32_t y_at, BSTF_NUMBERS) {
  conv(BSTF_AT(x), nullptr, BSTF_AT(chunk), BSTF_AT(y), nullptr, BSTF_SHAPES);
}

void bstf_conv_add(int32_t *x, int32_t x_at, int32_t *residual, int32_t residual_at, int32_t *chunk, int32_t chunk_at,
                   int32_t *y, int32_t y_at, BSTF_NUMBERS) {
  conv(BSTF_AT(x), BSTF_AT(residual), BSTF_AT(chunk), BSTF_AT(y), nullptr, BSTF_SHAPES);
}

void bstf_conv_part(int32_t *x, int32_t x_at, int32_t *chunk, int32_t chunk_at, int32_t *y, int32_t y_at, int32_t *sums,
                    int32_t sums_at, BSTF_NUMBERS) {
  conv(BSTF_AT(x), nullptr, BSTF_AT(chunk), BSTF_AT(y), sums + sums_at / 4, BSTF_SHAPES);
}

void bstf_conv_part_add(int32_t *x, int32_t x_at, int32_t *residual, int32_t residual_at, int32_t *chunk,
                        int32_t chunk_at, int32_t *y, int32_t y_at, int32_t *sums, int32_t sums_at, BSTF_NUMBERS) {
  conv(BSTF_AT(x), BSTF_AT(residual), BSTF_AT(chunk), BSTF_AT(y), sums + sums_at / 4, BSTF_SHAPES);
}
}
