// The building blocks of the quantisers' searches: grids of numbers, and the error of values that are rounded
// to a grid.
#pragma once

#include <cstddef>

namespace nplora {

// A grid: the numbers d * q + m, where the codes q are the integers from CodeRange::first to CodeRange::last.
struct CodeGrid {
  float d, m = 0;
};
struct CodeRange {
  float first, last;
};

// Rounds x to the nearest integer, and to the even one in a tie. |x| must be below 2^22. The function rounds
// by an addition and a subtraction, because every compiler can vectorise these operations.
inline float nearest_integer(float x) {
  constexpr float kShift = 0x1.8p23f;
  return (x + kShift) - kShift;
}

// Maps x to the code of the nearest number on a grid.
class Encoder {
 public:
  Encoder(CodeGrid grid, CodeRange codes)
      : grid_(grid), inverse_(grid.d == 0 ? 0 : 1 / grid.d), codes_(codes) {}

  float operator()(float x) const {
    const float q = (x - grid_.m) * inverse_;
    const float raised = q < codes_.first ? codes_.first : q;
    return nearest_integer(raised > codes_.last ? codes_.last : raised);
  }

 private:
  CodeGrid grid_;
  float inverse_;
  CodeRange codes_;
};

// The sum of term(i) for i = 0 to n - 1, where n is a multiple of eight. Partial sum j contains the terms j,
// j + 8, j + 16 and so on. With eight partial sums, the order of the additions, and so the result, is the
// same for SIMD vectors of any width up to eight floats.
template <size_t n, class Term>
float sum(const Term& term) {
  float parts[8] = {};
  for (size_t i = 0; i < n; i += 8)
    for (size_t j = 0; j < 8; ++j) parts[j] += term(i + j);
  return ((parts[0] + parts[4]) + (parts[2] + parts[6])) + ((parts[1] + parts[5]) + (parts[3] + parts[7]));
}

template <size_t n>
float squared_error(const float* x, CodeGrid grid, CodeRange codes) {
  const Encoder code(grid, codes);
  return sum<n>([&](size_t i) {
    const float error = x[i] - (grid.d * code(x[i]) + grid.m);
    return error * error;
  });
}

// For n values x with codes q: the number n, and the sums of x, q, x * q and q * q over all values.
struct Moments {
  double n, x, q, xq, qq;
};
template <size_t n>
Moments moments(const float* x, CodeGrid grid, CodeRange codes) {
  const Encoder code(grid, codes);
  float q[n];
  for (size_t i = 0; i < n; ++i) q[i] = code(x[i]);
  return {double(n), sum<n>([&](size_t i) { return x[i]; }), sum<n>([&](size_t i) { return q[i]; }),
          sum<n>([&](size_t i) { return x[i] * q[i]; }), sum<n>([&](size_t i) { return q[i] * q[i]; })};
}

// These functions fit a grid to values with given codes, by least squares. fitted_scale returns the best d
// with m = 0, and `fitted` returns the best d and m. If the codes do not determine a grid, for example if all
// codes are 0, both functions return `otherwise`.
inline CodeGrid fitted_scale(const Moments& s, CodeGrid otherwise) {
  return s.qq > 0 ? CodeGrid{float(s.xq / s.qq)} : otherwise;
}
inline CodeGrid fitted(const Moments& s, CodeGrid otherwise) {
  const double determinant = s.n * s.qq - s.q * s.q;
  if (!(determinant > 0)) return otherwise;
  const double d = (s.n * s.xq - s.x * s.q) / determinant;
  return {float(d), float((s.x - d * s.q) / s.n)};
}

// A grid that spans exactly the range of the values usually does not give the smallest error, so kTries other
// grids are tried. In try i, the range of the values has codes_of_try(i) more steps than the range of the
// codes. If this number is negative, the values do not use all codes. If it is positive, the extreme values
// are clipped.
inline constexpr int kTries = 8;
inline float codes_of_try(int i) {
  constexpr float kFewest = -1.5f, kMost = 1.5f;
  return kFewest + (kMost - kFewest) * float(i) / float(kTries - 1);
}

}  // namespace nplora
