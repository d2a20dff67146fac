// Maximum and average over windows of a tile, four pixels of eight channels at a time.
//
// Chunk of a maximum: int32 value of padded pixels. Of an average: int32 shift, smallest, largest, rows and columns of
// the table, then the table of numerators by how many rows and columns of the window lie inside; 1 x 1 serves all.

#include "tile.h"

namespace {

// The kernel positions [first, last) of a window from `start` on that lie in [0, limit).
struct Inside {
  int first, last;

  Inside(int start, int step, int size, int limit) {
    first = start < 0 ? (-start + step - 1) / step : 0;
    last = start < limit ? (limit - 1 - start) / step + 1 : 0;
    if (last > size) last = size;
    if (last < first) last = first;
  }
};

void maxpool(const int8_t *x, const int32_t *chunk, int8_t *y, Shape in, Shape out, const Window &window) {
  const int8_t fill = static_cast<int8_t>(chunk[0]);
  const int pixels = out.rows * out.pixels;
  for (int block = 0; block < out.channels; block += LANES)
    for (int first = 0; first < pixels; first += PIXELS) {
      const Places places(first, out);
      Quad best = aie::broadcast<int8, PIXELS * LANES>(static_cast<int8>(-128));
      for (int ky = 0; ky < window.kernel[0]; ++ky)
        for (int kx = 0; kx < window.kernel[1]; ++kx)
          best = aie::max(best, gather(x + block, in, window, places, ky, kx, fill));
      scatter(y + block, out.channels, first, places, best);
    }
}

void averagepool(const int8_t *x, const int32_t *chunk, int8_t *y, Shape in, Shape out, const Window &window) {
  set_modes();
  const int pixels = out.rows * out.pixels, columns = chunk[4];
  for (int block = 0; block < out.channels; block += LANES)
    for (int first = 0; first < pixels; first += PIXELS) {
      const Places places(first, out);
      aie::accum<acc32, PIXELS * LANES> sums;
      sums.from_vector(aie::broadcast<int8, PIXELS * LANES>(0));
      for (int ky = 0; ky < window.kernel[0]; ++ky)
        for (int kx = 0; kx < window.kernel[1]; ++kx) {
          aie::accum<acc32, PIXELS * LANES> more;
          more.from_vector(gather(x + block, in, window, places, ky, kx, 0));
          sums = aie::add(sums, more);
        }
      const auto totals = sums.to_vector<int32>();
      Quad values;
      for (int i = 0; i < PIXELS; ++i) {
        const Inside down(places.row[i] * window.strides[0] - window.before[0], window.dilation[0], window.kernel[0],
                          in.rows);
        const Inside across(places.pixel[i] * window.strides[1] - window.before[1], window.dilation[1],
                            window.kernel[1], in.pixels);
        const int row = chunk[3] > 1 && down.last > down.first ? down.last - down.first - 1 : 0;
        const int column = columns > 1 && across.last > across.first ? across.last - across.first - 1 : 0;
        const int64_t factor = chunk[5 + row * columns + column];
        for (int lane = i * LANES; lane < (i + 1) * LANES; ++lane)
          values.set(requantized(totals.get(lane) * factor, chunk[0], chunk[1], chunk[2]), lane);
      }
      scatter(y + block, out.channels, first, places, values);
    }
}

}  // namespace

// Buffers come as words with offsets in bytes; then shapes of input and output, and the window.
#define BSTF_POOL(name)                                                                                               \
  void bstf_##name(int32_t *x, int32_t x_at, int32_t *chunk, int32_t chunk_at, int32_t *y, int32_t y_at, int32_t rows, \
                   int32_t columns, int32_t depth, int32_t out_rows, int32_t out_columns, int32_t out_depth,          \
                   int32_t kh, int32_t kw, int32_t sh, int32_t sw, int32_t dh, int32_t dw, int32_t top, int32_t left) { \
    name(reinterpret_cast<int8_t *>(x) + x_at, chunk + chunk_at / 4, reinterpret_cast<int8_t *>(y) + y_at,            \
         Shape{rows, columns, depth}, Shape{out_rows, out_columns, out_depth},                                        \
         Window{{kh, kw}, {sh, sw}, {dh, dw}, {top, left}});                                                          \
  }

extern "C" {
BSTF_POOL(maxpool)
BSTF_POOL(averagepool)
}
