// What all kernels share: four pixels of eight channels as one vector, and the step from sums to int8.
//
// A tile lies in memory as (rows, pixels, channels) of int8, channels a multiple of eight, addresses of four bytes. Eight
// channels of a pixel are two words: the vector of four pixels is put together word by word.
#ifndef BSTF_TILE_H
#define BSTF_TILE_H

#include <aie_api/aie.hpp>
#include <stdint.h>

constexpr int LANES = 8;                       // channels of a block
constexpr int PIXELS = 4;                      // of a vector
using Quad = aie::vector<int8, PIXELS * LANES>;

struct Shape {
  int rows, pixels, channels;
};

// Kernel, strides, dilation, and rows and pixels of the window's reach that lie before the tile; each down and across.
struct Window {
  int kernel[2], strides[2], dilation[2], before[2];
};

// Four output pixels from number `first` on: which rows and pixels they are. Beyond the last one it is repeated, and
// `count` says how many are real.
struct Places {
  int row[PIXELS], pixel[PIXELS], count;

  Places(int first, Shape out) {
    const int all = out.rows * out.pixels;
    count = all - first < PIXELS ? all - first : PIXELS;
    for (int i = 0; i < PIXELS; ++i) {
      const int number = first + (i < count ? i : count - 1);
      row[i] = number / out.pixels;
      pixel[i] = number % out.pixels;
    }
  }
};

// The inputs that four output pixels meet at kernel position (ky, kx), of the block at `x`; `fill` outside of the tile.
inline Quad gather(const int8_t *x, Shape in, const Window &window, const Places &places, int ky, int kx, int8_t fill) {
  aie::vector<int32, 2 * PIXELS> words = aie::broadcast<int8, PIXELS * LANES>(fill).cast_to<int32>();
  for (int i = 0; i < PIXELS; ++i) {
    const int row = places.row[i] * window.strides[0] + ky * window.dilation[0] - window.before[0];
    const int pixel = places.pixel[i] * window.strides[1] + kx * window.dilation[1] - window.before[1];
    if (row < 0 || row >= in.rows || pixel < 0 || pixel >= in.pixels) continue;
    const int32_t *from = reinterpret_cast<const int32_t *>(x + (row * in.pixels + pixel) * in.channels);
    words.set(from[0], 2 * i);
    words.set(from[1], 2 * i + 1);
  }
  return words.cast_to<int8>();
}

// Writes the real ones of four pixels, from number `first` on, of the block at `y`.
inline void scatter(int8_t *y, int channels, int first, const Places &places, const Quad &values) {
  const aie::vector<int32, 2 * PIXELS> words = values.cast_to<int32>();
  for (int i = 0; i < places.count; ++i) {
    int32_t *to = reinterpret_cast<int32_t *>(y + (first + i) * channels);
    to[0] = words.get(2 * i);
    to[1] = words.get(2 * i + 1);
  }
}

// The part's rounding and saturation: floor(x + 1/2), then the nearest int8.
inline void set_modes() {
  aie::set_rounding(aie::rounding_mode::positive_inf);
  aie::set_saturation(aie::saturation_mode::saturate);
}

inline Quad clamped(const Quad &values, int smallest, int largest) {
  const Quad low = aie::broadcast<int8, PIXELS * LANES>(static_cast<int8>(smallest));
  const Quad high = aie::broadcast<int8, PIXELS * LANES>(static_cast<int8>(largest));
  return aie::max(aie::min(values, high), low);
}

// clip(floor(sums / 2**shift + 1/2), smallest, largest) of anything with to_vector. A shift to the left comes after the
// first saturation, for what int8 can't hold it can't hold then either.
template <typename Sums>
Quad requantized(const Sums &sums, int shift, int smallest, int largest) {
  const Quad values = sums.template to_vector<int8>(shift > 0 ? shift : 0);
  if (shift >= 0) return clamped(values, smallest, largest);
  aie::accum<acc32, PIXELS * LANES> wide;
  wide.from_vector(values, -shift < LANES ? -shift : LANES);
  return clamped(wide.to_vector<int8>(0), smallest, largest);
}

// The same of one number, of 64 bits.
inline int8_t requantized(int64_t value, int shift, int smallest, int largest) {
  if (shift > 0)
    value = (value + (int64_t{1} << (shift - 1))) >> shift;
  else
    value = value * (int64_t{1} << -shift);
  return static_cast<int8_t>(value < smallest ? smallest : value > largest ? largest : value);
}

// Sum or difference of `size` values on the finer of two grids; the second ones start again every `channels`, `step`
// bytes further. Parameters: left shifts of both, 1 or -1, then shift, smallest, largest.
inline void add_tiles(const int8_t *a, const int8_t *b, int8_t *y, const int32_t *parameters, int pixels, int channels,
                      int step) {
  const int shift = parameters[0], shift2 = parameters[1], sign = parameters[2], cut = parameters[3];
  const int smallest = parameters[4], largest = parameters[5];
  constexpr int WIDTH = PIXELS * LANES;
  constexpr int MOST = 22;  // further to the left two int8 leave 32 bits
  const int size = pixels * channels;
  const bool whole = step == channels && shift <= MOST && shift2 <= MOST && cut <= 30;
  const int vectors = whole ? size / WIDTH : 0;
  for (int i = 0; i < vectors; ++i) {
    aie::accum<acc32, WIDTH> one, two;
    one.from_vector(aie::load_unaligned_v<WIDTH>(a + i * WIDTH), shift);
    two.from_vector(aie::load_unaligned_v<WIDTH>(b + i * WIDTH), shift2);
    const auto sum = sign > 0 ? aie::add(one, two) : aie::sub(one, two);
    aie::store_unaligned_v(y + i * WIDTH, requantized(sum, cut, smallest, largest));
  }
  for (int i = vectors * WIDTH; i < size; ++i) {
    const int64_t one = int64_t{a[i]} * (int64_t{1} << shift);
    const int64_t two = int64_t{b[i / channels * step + i % channels]} * (int64_t{1} << shift2);
    y[i] = requantized(one + sign * two, cut, smallest, largest);
  }
}

#endif
