// Test inputs, wider types for exact results, and error bounds of floating-point sums.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

// SplitMix64 (Steele, Lea & Flood 2014): the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t n) { return static_cast<size_t>(bits() % n); }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }  // in [-1, 1)

 private:
  uint64_t state_;
};

// Oracles for float compute in double, oracles for double in long double.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

template <class T>
constexpr bool is_float = std::is_same_v<T, float>;

template <class T>
constexpr const char* type_name() {
  return is_float<T> ? "float" : "double";
}

template <class T>
constexpr T kUnitRoundoff = std::numeric_limits<T>::epsilon() / 2;

// Higham 2002, section 3.1: k roundings give a relative error of at most gamma_k.
template <class T>
Wide<T> gamma(size_t k) {
  const Wide<T> ku = static_cast<Wide<T>>(k) * kUnitRoundoff<T>;
  return ku / (1 - ku);
}

// kIntegers: -4 ... 4, exact in every sum. kUniform: [-1, 1). kTiny: the product of two is subnormal.
// kSpecial: integers mixed with NaN, infinities, subnormals and -0.
enum class Data { kIntegers, kUniform, kTiny, kSpecial };
inline constexpr Data kAllData[] = {Data::kIntegers, Data::kUniform, Data::kTiny, Data::kSpecial};
inline constexpr const char* kDataNames[] = {"integers", "uniform", "tiny", "special"};
inline const char* name_of(Data data) {
  return kDataNames[static_cast<size_t>(data)];
}

template <class T>
std::vector<T> draw(Random& random, size_t n, Data data) {
  using Limits = std::numeric_limits<T>;
  const T specials[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity(), Limits::denorm_min(),
                        T(-0.0)};
  const T tiny = std::sqrt(Limits::min()) / 16;
  std::vector<T> values(n);
  for (T& value : values) {
    value = T(static_cast<int>(random.below(9)) - 4);
    if (data == Data::kUniform) value = T(random.uniform());
    if (data == Data::kTiny) value = T(random.uniform()) * tiny;
    if (data == Data::kSpecial && random.below(60) == 0) value = specials[random.below(std::size(specials))];
  }
  return values;
}

// Whether two numbers have the same bits. Any NaN equals any other NaN.
template <class T>
bool same(T a, T b) {
  using Bits = std::conditional_t<is_float<T>, uint32_t, uint64_t>;
  return (std::isnan(a) && std::isnan(b)) || std::bit_cast<Bits>(a) == std::bit_cast<Bits>(b);
}
