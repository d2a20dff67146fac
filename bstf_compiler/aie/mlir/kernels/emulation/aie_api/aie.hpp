// What the kernels use of AMD's AIE API (UG1529), in plain C++, to run them without the part: the same names, lane for
// lane the same results, not its speed. Aligned loads and stores check their alignment.
#ifndef BSTF_EMULATED_AIE_HPP
#define BSTF_EMULATED_AIE_HPP

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

using int8 = std::int8_t;
using int32 = std::int32_t;
struct acc32 {};

namespace aie {

enum class rounding_mode { floor, positive_inf };
enum class saturation_mode { none, saturate };

namespace emulation {
inline rounding_mode rounding = rounding_mode::floor;
inline saturation_mode saturation = saturation_mode::none;
inline int live = 0, most_live = 0;  // accumulators at a time

inline void require_aligned(const void *place, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(place) % std::min<std::size_t>(bytes, 32)) {
    std::fprintf(stderr, "an aligned access of %zu bytes at %p\n", bytes, place);
    std::abort();
  }
}

// An accumulator's lane as the shift-round-saturate unit moves it to a register.
template <typename T>
T moved(std::int64_t value, int shift) {
  if (shift > 0)
    value = (value + (rounding == rounding_mode::positive_inf ? std::int64_t{1} << (shift - 1) : 0)) >> shift;
  if (saturation == saturation_mode::saturate)
    value = std::clamp<std::int64_t>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  return static_cast<T>(value);
}
}  // namespace emulation

inline void set_rounding(rounding_mode mode) { emulation::rounding = mode; }
inline void set_saturation(saturation_mode mode) { emulation::saturation = mode; }

template <typename T, unsigned N>
class vector {
  static_assert(sizeof(T) * N >= 16 && sizeof(T) * N <= 128, "a vector has 128 to 1024 bits");
  T lanes_[N]{};

 public:
  T get(unsigned lane) const { return lanes_[lane]; }
  void set(T value, unsigned lane) { lanes_[lane] = value; }
  template <typename U>
  vector<U, N * sizeof(T) / sizeof(U)> cast_to() const {
    vector<U, N * sizeof(T) / sizeof(U)> found;
    std::memcpy(static_cast<void *>(&found), lanes_, sizeof lanes_);
    return found;
  }
};

template <typename T, unsigned N>
vector<T, 2 * N> concat(const vector<T, N> &one, const vector<T, N> &two) {
  vector<T, 2 * N> found;
  for (unsigned i = 0; i < N; ++i) found.set(one.get(i), i), found.set(two.get(i), N + i);
  return found;
}

template <typename T, unsigned N>
vector<T, N> broadcast(T value) {
  vector<T, N> found;
  for (unsigned i = 0; i < N; ++i) found.set(value, i);
  return found;
}

template <unsigned N, typename T>
vector<std::remove_const_t<T>, N> load_unaligned_v(T *place, unsigned = 1) {
  vector<std::remove_const_t<T>, N> found;
  std::memcpy(static_cast<void *>(&found), place, sizeof found);
  return found;
}

template <unsigned N, typename T>
vector<std::remove_const_t<T>, N> load_v(T *place) {
  emulation::require_aligned(place, N * sizeof(T));
  return load_unaligned_v<N>(place);
}

template <typename T, unsigned N>
void store_unaligned_v(T *place, const vector<T, N> &values, unsigned = 1) {
  std::memcpy(place, &values, sizeof values);
}

template <typename T, unsigned N>
vector<T, N> max(const vector<T, N> &one, const vector<T, N> &two) {
  vector<T, N> found;
  for (unsigned i = 0; i < N; ++i) found.set(std::max(one.get(i), two.get(i)), i);
  return found;
}

template <typename T, unsigned N>
vector<T, N> min(const vector<T, N> &one, const vector<T, N> &two) {
  vector<T, N> found;
  for (unsigned i = 0; i < N; ++i) found.set(std::min(one.get(i), two.get(i)), i);
  return found;
}

// Lanes of 32 bits, which wrap.
template <typename Tag, unsigned N>
class accum {
  static_assert(std::is_same_v<Tag, acc32>, "accumulators of 32-bit lanes only");
  std::int32_t lanes_[N]{};

 public:
  accum() { emulation::most_live = std::max(emulation::most_live, ++emulation::live); }
  accum(const accum &other) : accum() { std::memcpy(lanes_, other.lanes_, sizeof lanes_); }
  accum &operator=(const accum &) = default;
  ~accum() { --emulation::live; }

  std::int32_t lane(unsigned i) const { return lanes_[i]; }
  void add(unsigned i, std::int64_t value) { lanes_[i] = static_cast<std::int32_t>(lanes_[i] + value); }
  template <typename T>
  void from_vector(const vector<T, N> &values, int shift = 0) {
    for (unsigned i = 0; i < N; ++i) lanes_[i] = static_cast<std::int32_t>(std::int64_t{values.get(i)} << shift);
  }
  template <typename T>
  vector<T, N> to_vector(int shift = 0) const {
    vector<T, N> found;
    for (unsigned i = 0; i < N; ++i) found.set(emulation::moved<T>(lanes_[i], shift), i);
    return found;
  }
};

template <typename Tag, unsigned N>
accum<Tag, N> add(const accum<Tag, N> &one, const accum<Tag, N> &two) {
  accum<Tag, N> found(one);
  for (unsigned i = 0; i < N; ++i) found.add(i, two.lane(i));
  return found;
}

template <typename Tag, unsigned N>
accum<Tag, N> sub(const accum<Tag, N> &one, const accum<Tag, N> &two) {
  accum<Tag, N> found(one);
  for (unsigned i = 0; i < N; ++i) found.add(i, -std::int64_t{two.lane(i)});
  return found;
}

// C (M x N) += A (M x K) * B (K x N), all row by row.
template <unsigned M, unsigned K, unsigned N, typename A, typename B>
class mmul {
  accum<acc32, M * N> sums_;

 public:
  static constexpr unsigned size_A = M * K, size_B = K * N, size_C = M * N;
  mmul() = default;
  explicit mmul(const vector<std::int32_t, M * N> &seed) { sums_.from_vector(seed); }

  void mac(const vector<A, M * K> &a, const vector<B, K * N> &b) {
    for (unsigned m = 0; m < M; ++m)
      for (unsigned n = 0; n < N; ++n) {
        std::int64_t sum = 0;
        for (unsigned k = 0; k < K; ++k) sum += int{a.get(m * K + k)} * int{b.get(k * N + n)};
        sums_.add(m * N + n, sum);
      }
  }
  template <typename T>
  vector<T, M * N> to_vector(int shift = 0) const {
    return sums_.template to_vector<T>(shift);
  }
};

}  // namespace aie

#endif
