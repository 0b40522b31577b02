// The kernels between the products of a language model, on every length from 0 to 520, or on at least 500
// shapes of matrices.
#include <algorithm>
#include <string>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::Activation;
using nplora::kernels::kActivations;
using nplora::kernels::KernelTable;

namespace {

constexpr double kUnit = kUnitRoundoff<float>;
constexpr double kExpError = 4 * kUnit;           // the relative error of one exponential
constexpr double kSmallest = 0x1p-126 * 0x1p-22;  // below the smallest normal number, rounding is absolute
constexpr size_t kLongest = 520;

using Values = std::vector<float>;

Values scaled(Values values, float factor) {
  for (float& v : values) v *= factor;
  return values;
}

// If exact is not finite, got must be equal to it; otherwise within error.
void expect_near(size_t i, double got, double exact, double error) {
  if (std::isfinite(exact))
    check::expect(std::abs(got - exact) <= error, "element %zu is %.9g, wanted %.9g +- %.2g", i, got, exact,
                  error);
  else
    check::expect(same(got, exact), "element %zu is %g, wanted %g", i, got, exact);
}

// The error of a sum of k products. It is 0 for integers, and if all but a few terms are subnormal.
double sum_error(Data data, size_t k, double terms) {
  return data == Data::kUniform ? gamma<float>(k) * terms : data == Data::kSpecial ? double(k) * 0x1p-149 : 0;
}

// Calls body(n, place) for every length.
template <class Body>
void for_lengths(const std::string& kernel, const Body& body) {
  for (size_t n = 0; n <= kLongest; ++n) {
    if (!check::count_shape(kernel)) continue;
    for (Place place : kPlaces) body(n, place);
  }
}

// ---- exp ----

// Tests exp through exp_sum, element by element, from where it underflows to where it overflows.
void test_exp(const KernelTable& table) {
  for (size_t step = 0; step <= 20000; ++step) {
    const float x = -105 + 195 * float(step) / 20000;
    check::Case one("%s exp(%.9g)", table.isa, double(x));
    float got;
    table.transformer.exp_sum(1, &x, 0, &got);
    const double exact = std::exp(double(x));
    if (exact > std::numeric_limits<float>::max())
      check::expect(std::isinf(got), "is %g", double(got));
    else
      check::expect(std::abs(got - exact) <= 2 * kUnit * exact + 0x1p-149, "is %.9g, wanted %.9g",
                    double(got), exact);
  }
  for (float x :
       {-1e30f, -std::numeric_limits<float>::infinity(), 1e30f, std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN(), 0.0f, -0.0f}) {
    check::Case one("%s exp(%g)", table.isa, double(x));
    float got;
    table.transformer.exp_sum(1, &x, 0, &got);
    check::expect(same(got, std::exp(x)), "is %g", double(got));
  }
}

// ---- sums and elements of a row ----

void test_largest(const KernelTable& table) {
  Random random(31);
  for_lengths("largest", [&](size_t n, Place place) {
    for (Data data : {Data::kIntegers, Data::kUniform, Data::kTiny}) {
      check::Case one("%s largest n %zu, %s, %s", table.isa, n, name_of(data), name_of(place));
      Values values = scaled(draw<float>(random, n, data), -1);
      for (float& v : values) v = -std::abs(v);  // otherwise zeros would win
      float exact = std::numeric_limits<float>::lowest();
      for (float v : values) exact = std::max(exact, v);
      Row<float> x(place, values);
      const float got = table.transformer.largest(n, x.data());
      check::expect(got == exact, "%g, wanted %g", double(got), double(exact));
      check::expect(x.untouched(values), "wrote to x");
    }
  });
}

void test_exp_sum(const KernelTable& table) {
  Random random(32);
  for_lengths("exp_sum", [&](size_t n, Place place) {
    for (bool keep : {false, true}) {
      check::Case one("%s exp_sum n %zu keep %d, %s", table.isa, n, keep, name_of(place));
      const Values values = scaled(draw<float>(random, n, Data::kUniform), 5);
      const float shift = 3;
      Row<float> x(place, values), y(place, n);
      const double got = table.transformer.exp_sum(n, x.data(), shift, keep ? y.data() : nullptr);
      double exact = 0;
      for (size_t i = 0; i < n; ++i) {
        const double e = std::exp(double(values[i] - shift));
        if (keep) expect_near(i, y[i], e, kExpError * e);
        exact += e;
      }
      expect_near(n, got, exact, (kExpError + gamma<float>(n + 1)) * exact);
      check::expect(y.gaps_intact() && (keep || y.untouched(y.values())), "wrote outside y");
      check::expect(x.untouched(values), "wrote to x");
      table.transformer.exp_sum(n, x.data(), shift, x.data());
      for (size_t i = 0; keep && i < n; ++i)
        check::expect(same(x[i], y[i]), "element %zu differs in place", i);
    }
  });
}

void test_scaled(const KernelTable& table) {
  Random random(33);
  for_lengths("scaled", [&](size_t n, Place place) {
    for (Data data : kAllData)
      for (bool accumulate : {false, true}) {
        check::Case one("%s scaled n %zu accumulate %d, %s, %s", table.isa, n, accumulate, name_of(data),
                        name_of(place));
        const Values from = draw<float>(random, n, data), before = draw<float>(random, n, data);
        const float factor = data == Data::kUniform ? 0.3f : 2;
        Row<float> x(place, from), y(place, before);
        table.transformer.scaled(n, factor, x.data(), y.data(), accumulate);
        for (size_t i = 0; i < n; ++i) {
          const double term = double(factor) * from[i], exact = term + (accumulate ? before[i] : 0);
          expect_near(
              i, y[i], exact,
              data == Data::kIntegers ? 0 : 2 * kUnit * (std::abs(term) + std::abs(exact)) + kSmallest);
        }
        check::expect(y.gaps_intact(), "wrote outside y");
        check::expect(x.untouched(from), "wrote to x");
      }
  });
}

void test_dot(const KernelTable& table) {
  Random random(34);
  for_lengths("dot", [&](size_t n, Place place) {
    for (Data data : kAllData) {
      check::Case one("%s dot n %zu, %s, %s", table.isa, n, name_of(data), name_of(place));
      const Values a0 = draw<float>(random, n, data), b0 = draw<float>(random, n, data);
      Row<float> a(place, a0), b(place, b0);
      const float got = table.transformer.dot(n, a.data(), b.data());
      double exact = 0, terms = 0;
      for (size_t i = 0; i < n; ++i) {
        exact += double(a0[i]) * b0[i];
        terms += std::abs(double(a0[i]) * b0[i]);
      }
      expect_near(n, got, exact,
                  sum_error(data, n + 1, terms) + (data == Data::kTiny ? double(n) * kSmallest : 0));
      check::expect(a.untouched(a0) && b.untouched(b0), "wrote to an input");
    }
  });
}

// ---- RMSNorm ----

double mean_square(const Values& x) {
  double sum = 0;
  for (float v : x) sum += double(v) * v;
  return sum / double(x.size());
}

void test_rms_norm(const KernelTable& table) {
  Random random(35);
  const float eps = 0.25f;
  for_lengths("rms_norm", [&](size_t n, Place place) {
    check::Case one("%s rms_norm n %zu, %s", table.isa, n, name_of(place));
    const Values x0 = draw<float>(random, n, Data::kUniform), w0 = draw<float>(random, n, Data::kUniform);
    Row<float> x(place, x0), weight(place, w0), y(place, n);
    table.transformer.rms_norm(n, x.data(), weight.data(), eps, y.data());
    const double r = 1 / std::sqrt(mean_square(x0) + eps);
    for (size_t i = 0; i < n; ++i) {
      const double exact = x0[i] * r * w0[i];
      expect_near(i, y[i], exact, gamma<float>(n + 8) * std::abs(exact));
    }
    check::expect(y.gaps_intact(), "wrote outside y");
    check::expect(x.untouched(x0) && weight.untouched(w0), "wrote to an input");
  });
}

void test_rms_norm_backward(const KernelTable& table) {
  Random random(36);
  const float eps = 0.25f;
  for_lengths("rms_norm_backward", [&](size_t n, Place place) {
    for (bool accumulate : {false, true}) {
      check::Case one("%s rms_norm_backward n %zu accumulate %d, %s", table.isa, n, accumulate,
                      name_of(place));
      const auto row = [&] { return draw<float>(random, n, Data::kUniform); };
      const Values dy0 = row(), x0 = row(), w0 = row(), before = row();
      Row<float> dy(place, dy0), x(place, x0), weight(place, w0), dx(place, before);
      table.transformer.rms_norm_backward(n, dy.data(), x.data(), weight.data(), eps, dx.data(), accumulate);
      const double r = 1 / std::sqrt(mean_square(x0) + eps);
      double mean = 0, size = 0;
      for (size_t i = 0; i < n; ++i) {
        mean += double(dy0[i]) * w0[i] * x0[i] / double(n);
        size += std::abs(double(dy0[i]) * w0[i] * x0[i]) / double(n);
      }
      for (size_t i = 0; i < n; ++i) {
        const double across = double(dy0[i]) * w0[i] * r, along = r * r * r * x0[i],
                     kept = accumulate ? before[i] : 0;
        expect_near(i, dx[i], kept + across - along * mean,
                    gamma<float>(3 * n + 12) * (std::abs(kept) + std::abs(across) + std::abs(along) * size));
      }
      check::expect(dx.gaps_intact(), "wrote outside dx");
      check::expect(dy.untouched(dy0) && x.untouched(x0) && weight.untouched(w0), "wrote to an input");
    }
  });
}

// ---- LayerNorm ----

// The mean and 1 / sqrt(variance + eps) of a row, and the largest distance of an element to the mean.
struct Moments {
  double mean = 0, r = 0, largest = 0;
};
Moments moments(const Values& x, double eps) {
  Moments m;
  double squares = 0;
  for (float v : x) m.mean += double(v) / double(x.size());
  for (float v : x) {
    squares += (v - m.mean) * (v - m.mean) / double(x.size());
    m.largest = std::max(m.largest, std::abs(v - m.mean));
  }
  m.r = 1 / std::sqrt(squares + eps);
  return m;
}

void test_layer_norm(const KernelTable& table) {
  Random random(45);
  const float eps = 0.25f;
  for_lengths("layer_norm", [&](size_t n, Place place) {
    for (bool biased : {false, true}) {
      check::Case one("%s layer_norm n %zu bias %d, %s", table.isa, n, biased, name_of(place));
      const auto row = [&] { return draw<float>(random, n, Data::kUniform); };
      const Values x0 = row(), w0 = row(), b0 = row();
      Row<float> x(place, x0), weight(place, w0), bias(place, b0), y(place, n);
      table.transformer.layer_norm(n, x.data(), weight.data(), biased ? bias.data() : nullptr, eps, y.data());
      const Moments m = moments(x0, eps);
      for (size_t i = 0; i < n; ++i) {
        const double exact = (x0[i] - m.mean) * m.r * w0[i], added = biased ? b0[i] : 0;
        // The mean, below 1, has an error of up to gamma(n).
        expect_near(i, y[i], exact + added,
                    gamma<float>(2 * n + 12) * ((1 + m.largest) * m.r * std::abs(w0[i]) + std::abs(added)));
      }
      check::expect(y.gaps_intact(), "wrote outside y");
      check::expect(x.untouched(x0) && weight.untouched(w0) && bias.untouched(b0), "wrote to an input");
    }
  });
}

void test_layer_norm_backward(const KernelTable& table) {
  Random random(46);
  const float eps = 0.25f;
  for_lengths("layer_norm_backward", [&](size_t n, Place place) {
    for (bool accumulate : {false, true}) {
      check::Case one("%s layer_norm_backward n %zu accumulate %d, %s", table.isa, n, accumulate,
                      name_of(place));
      const auto row = [&] { return draw<float>(random, n, Data::kUniform); };
      const Values dy0 = row(), x0 = row(), w0 = row(), before = row();
      Row<float> dy(place, dy0), x(place, x0), weight(place, w0), dx(place, before);
      const auto backward = table.transformer.layer_norm_backward;
      backward(n, dy.data(), x.data(), weight.data(), eps, dx.data(), accumulate);
      const Moments m = moments(x0, eps);
      double level = 0, along = 0, size = 1;
      for (size_t i = 0; i < n; ++i) {
        const double dn = double(dy0[i]) * w0[i];
        level += dn / double(n);
        along += dn * (x0[i] - m.mean) * m.r / double(n);
        size = std::max(size, std::abs(dn));
      }
      for (size_t i = 0; i < n; ++i) {
        const double dn = double(dy0[i]) * w0[i], xn = (x0[i] - m.mean) * m.r,
                     kept = accumulate ? before[i] : 0;
        const double widest = (1 + m.largest) * m.r;
        expect_near(i, dx[i], kept + m.r * (dn - level - xn * along),
                    gamma<float>(6 * n + 24) * (std::abs(kept) + m.r * size * (2 + widest * widest)));
      }
      check::expect(dx.gaps_intact(), "wrote outside dx");
      check::expect(dy.untouched(dy0) && x.untouched(x0) && weight.untouched(w0), "wrote to an input");
      const Values kept = dx.values();
      backward(n, dy.data(), x.data(), weight.data(), eps, dy.data(), false);
      for (size_t i = 0; !accumulate && i < n; ++i)
        check::expect(same(dy[i], kept[i]), "element %zu differs in place", i);
    }
  });
}

// ---- rotary positions ----

void test_rotate(const KernelTable& table) {
  Random random(37);
  for (size_t half = 1; half <= 42; ++half)
    for (size_t heads : {0, 1, 2, 3, 5, 9, 11, 12, 13, 14, 15, 16})
      for (size_t unrotated : {0, 1, 21}) {  // elements at the end of each head
        const size_t head_dim = 2 * half + unrotated;
        if (!check::count_shape("rotate")) continue;
        for (Data data : {Data::kIntegers, Data::kUniform})
          for (Place place : kPlaces)
            for (bool interleaved : {false, true})
              for (bool inverse : {false, true}) {
                check::Case one("%s rotate heads %zu of %zu half %zu interleaved %d inverse %d, %s, %s",
                                table.isa, heads, head_dim, half, interleaved, inverse, name_of(data),
                                name_of(place));
                const Values before = draw<float>(random, heads * head_dim, data),
                             angles = draw<float>(random, 2 * half, data);
                Row<float> x(place, before), row(place, angles);
                table.transformer.rotate(heads, head_dim, half, row.data(), interleaved, inverse, x.data());
                for (size_t h = 0; h < heads; ++h) {
                  const size_t head = h * head_dim;
                  for (size_t i = 0; i < half; ++i) {
                    const size_t first = head + (interleaved ? 2 * i : i),
                                 second = first + (interleaved ? 1 : half);
                    const double a = before[first], b = before[second], cosine = angles[i],
                                 sine = inverse ? -angles[half + i] : angles[half + i];
                    const double error =
                        data == Data::kIntegers ? 0 : 3 * kUnit * (std::abs(a) + std::abs(b));
                    expect_near(first, x[first], a * cosine - b * sine, error);
                    expect_near(second, x[second], b * cosine + a * sine, error);
                  }
                  for (size_t i = head + 2 * half; i < head + head_dim; ++i)
                    expect_near(i, x[i], before[i], 0);
                }
                check::expect(x.gaps_intact(), "wrote outside x");
                check::expect(row.untouched(angles), "wrote to the table");
              }
      }
}

// ---- gated units ----

// The p of act(g) = g s(p), and its slope.
struct Inner {
  double p, slope;
};

Inner inner_of(size_t act, double g) {
  if (act == size_t(Activation::kSilu)) return {g, 1};
  const double a = 2 * std::sqrt(2 / 3.14159265358979323846), b = a * 0.044715;
  return {g * (a + b * g * g), a + 3 * b * g * g};
}

bool is_exact_gelu(size_t act) {
  return act == size_t(Activation::kGelu);
}

// The factor s of act(g) = g s.
double gate_of(size_t act, double g) {
  if (is_exact_gelu(act)) return std::erfc(-g / std::sqrt(2.0)) / 2;
  return 1 / (1 + std::exp(-inner_of(act, g).p));
}

// The derivative of act, divided by s.
double relative_slope(size_t act, double g) {
  const double s = gate_of(act, g), pi = 3.14159265358979323846;
  if (is_exact_gelu(act)) return 1 + g * std::exp(-g * g / 2) / std::sqrt(2 * pi) / s;
  return 1 + g * inner_of(act, g).slope * (1 - s);
}

// A bound on the relative error of s: that of exp and two operations, plus that of p where exp(-p) dominates.
// For the exact GELU, p is g² / 2, and the polynomial adds an error of 1.2e-7.
double gate_error(size_t act, double g) {
  if (is_exact_gelu(act)) return 2 * kExpError + 16 * kUnit + (g < 0 ? 2 * kUnit * g * g : 0);
  return kExpError + 4 * kUnit + (act && g < 0 ? 4 * kUnit * std::abs(inner_of(act, g).p) : 0);
}

void test_gated(const KernelTable& table, size_t act) {
  Random random(38);
  for_lengths("gated", [&](size_t n, Place place) {
    check::Case one("%s gated %zu n %zu, %s", table.isa, act, n, name_of(place));
    Values g0 = scaled(draw<float>(random, n, Data::kUniform), act ? 4 : 12),
           u0 = draw<float>(random, n, Data::kUniform);
    const size_t poisoned = n ? random.below(n) : 0;  // affects only its own element
    if (n) g0[poisoned] = std::numeric_limits<float>::quiet_NaN();
    Row<float> gate(place, g0), up(place, u0), out(place, n);
    table.transformer.gated[act](n, gate.data(), up.data(), out.data());
    for (size_t i = 0; i < n; ++i) {
      const double exact = g0[i] * gate_of(act, g0[i]) * u0[i];
      expect_near(i, out[i], exact, (gate_error(act, g0[i]) + 2 * kUnit) * std::abs(exact) + kSmallest);
    }
    table.transformer.gated[act](n, gate.data(), nullptr, out.data());
    for (size_t i = 0; i < n; ++i) {
      const double exact = g0[i] * gate_of(act, g0[i]);
      expect_near(i, out[i], exact, (gate_error(act, g0[i]) + 2 * kUnit) * std::abs(exact) + kSmallest);
    }
    check::expect(out.gaps_intact(), "wrote outside out");
    check::expect(gate.untouched(g0) && up.untouched(u0), "wrote to an input");
  });
}

void test_gated_backward(const KernelTable& table, size_t act) {
  Random random(39);
  for_lengths("gated_backward", [&](size_t n, Place place) {
    check::Case one("%s gated_backward %zu n %zu, %s", table.isa, act, n, name_of(place));
    const auto row = [&](float factor) { return scaled(draw<float>(random, n, Data::kUniform), factor); };
    const Values d0 = row(1), g0 = row(act ? 4 : 12), u0 = row(1);
    Row<float> dout(place, d0), gate(place, g0), up(place, u0), dgate(place, n), dup(place, n);
    const auto backward = table.transformer.gated_backward[act];
    backward(n, dout.data(), gate.data(), up.data(), dgate.data(), dup.data());
    for (size_t i = 0; i < n; ++i) {
      const double g = g0[i], s = gate_of(act, g), slope = relative_slope(act, g);
      const double error = gate_error(act, g), size = std::abs(double(d0[i]) * u0[i] * s);
      expect_near(i, dup[i], d0[i] * g * s, (error + 2 * kUnit) * std::abs(d0[i] * g * s) + kSmallest);
      const double steepness =
          is_exact_gelu(act) ? 1 + std::abs(slope) + g * g : std::abs(slope - 1) / (1 - s);
      expect_near(i, dgate[i], double(d0[i]) * u0[i] * s * slope,
                  (error + 4 * kUnit) * size * (2 + 2 * steepness) + kSmallest);
    }
    check::expect(dgate.gaps_intact() && dup.gaps_intact(), "wrote outside its outputs");
    check::expect(dout.untouched(d0) && gate.untouched(g0) && up.untouched(u0), "wrote to an input");
    backward(n, dout.data(), gate.data(), up.data(), gate.data(), up.data());
    for (size_t i = 0; i < n; ++i)
      check::expect(same(gate[i], dgate[i]) && same(up[i], dup[i]), "element %zu differs in place", i);
    Row<float> alone(place, g0);
    backward(n, dout.data(), alone.data(), nullptr, alone.data(), nullptr);
    for (size_t i = 0; i < n; ++i) {
      const double g = g0[i], s = gate_of(act, g), slope = relative_slope(act, g);
      const double steepness =
          is_exact_gelu(act) ? 1 + std::abs(slope) + g * g : std::abs(slope - 1) / (1 - s);
      expect_near(i, alone[i], d0[i] * s * slope,
                  (gate_error(act, g) + 4 * kUnit) * std::abs(d0[i] * s) * (2 + 2 * steepness) + kSmallest);
    }
  });
}

// ---- tiles of attention ----

// Calls body(rows, columns, gap between rows, place) for matrices of every shape up to 34 x 48, in steps.
template <class Body>
void for_matrices(const std::string& kernel, const Body& body) {
  const size_t rows[] = {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64};
  for (size_t m : rows)
    for (size_t n = 0; n <= 48; ++n) {
      if (!check::count_shape(kernel)) continue;
      for (Place place : kPlaces) body(m, n, (m + n) % 3, place);
    }
}

void test_scale_columns(const KernelTable& table) {
  Random random(41);
  for_matrices("scale_columns", [&](size_t rows, size_t cols, size_t gap, Place place) {
    check::Case one("%s scale_columns rows %zu cols %zu gap %zu, %s", table.isa, rows, cols, gap,
                    name_of(place));
    const Values values = draw<float>(random, rows * cols, Data::kSpecial),
                 factors = draw<float>(random, cols, Data::kIntegers);
    Placed<float> x(rows, cols, {cols + gap}, place, values);
    Row<float> factor(place, factors);
    table.transformer.scale_columns(rows, cols, factor.data(), x.data(), cols + gap);
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < cols; ++j)
        check::expect(same(x(i, j), values[i * cols + j] * factors[j]), "element (%zu, %zu) is wrong", i, j);
    check::expect(x.gaps_intact(), "wrote outside x");
    check::expect(factor.untouched(factors), "wrote to the factors");
  });
}

// Some scores are -Inf, like masked ones: in column 0 all of them. In the last column, one is NaN.
Values draw_scores(Random& random, size_t rows, size_t cols, bool special) {
  Values s = scaled(draw<float>(random, rows * cols, Data::kUniform), 8);
  for (size_t i = 0; special && i < s.size(); ++i)
    if (i % cols == 0 || random.below(5) == 0) s[i] = -std::numeric_limits<float>::infinity();
  if (special && cols > 1 && rows > 0) s[cols - 1] = std::numeric_limits<float>::quiet_NaN();
  return s;
}

void test_softmax_step(const KernelTable& table) {
  Random random(42);
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  for_matrices("softmax_step", [&](size_t rows, size_t cols, size_t gap, Place place) {
    for (bool first : {false, true})
      for (bool special : {false, true}) {
        check::Case one("%s softmax_step rows %zu cols %zu gap %zu first %d special %d, %s", table.isa, rows,
                        cols, gap, first, special, name_of(place));
        const Values s0 = draw_scores(random, rows, cols, special);
        Values largest0 = scaled(draw<float>(random, cols, Data::kUniform), 8),
               sum0 = draw<float>(random, cols, Data::kUniform);
        for (size_t j = 0; j < cols; ++j) {
          if (first) largest0[j] = kLowest;
          sum0[j] = first ? 0 : std::abs(sum0[j]);
        }
        Placed<float> s(rows, cols, {cols + gap}, place, s0);
        Row<float> largest(place, largest0), sum(place, sum0), factor(place, cols);
        table.transformer.softmax_step(rows, cols, s.data(), cols + gap, largest.data(), sum.data(),
                                       factor.data());
        for (size_t j = 0; j < cols; ++j) {
          float now = largest0[j];
          bool poisoned = false;
          for (size_t i = 0; i < rows; ++i) {
            now = std::max(now, s0[i * cols + j]);  // keeps `now` if the score is NaN
            poisoned |= std::isnan(s0[i * cols + j]);
          }
          if (poisoned) {
            check::expect(std::isnan(sum[j]), "the NaN of column %zu was lost", j);
            continue;
          }
          check::expect(largest[j] == now, "largest[%zu] is %g, wanted %g", j, double(largest[j]),
                        double(now));
          double exact = 0;
          for (size_t i = 0; i < rows; ++i) {
            const double p = std::exp(double(s0[i * cols + j] - now));
            expect_near(i * cols + j, s(i, j), p, kExpError * p);
            exact += p;
          }
          const double shrunk = std::exp(double(largest0[j] - now));
          expect_near(j, factor[j], shrunk, kExpError * shrunk);
          exact += shrunk * sum0[j];
          expect_near(j, sum[j], exact, (kExpError + gamma<float>(rows + 3)) * exact);
        }
        check::expect(s.gaps_intact() && largest.gaps_intact() && sum.gaps_intact() && factor.gaps_intact(),
                      "wrote outside its outputs");
      }
  });
}

void test_softmax_backward(const KernelTable& table) {
  Random random(43);
  for_matrices("softmax_backward", [&](size_t rows, size_t cols, size_t gap, Place place) {
    for (bool special : {false, true}) {
      check::Case one("%s softmax_backward rows %zu cols %zu gap %zu special %d, %s", table.isa, rows, cols,
                      gap, special, name_of(place));
      const Values s0 = draw_scores(random, rows, cols, special),
                   dp0 = draw<float>(random, rows * cols, Data::kUniform),
                   lse0 = scaled(draw<float>(random, cols, Data::kUniform), 8),
                   delta0 = draw<float>(random, cols, Data::kUniform);
      Placed<float> s(rows, cols, {cols + gap}, place, s0), dp(rows, cols, {cols + gap}, place, dp0);
      Row<float> lse(place, lse0), delta(place, delta0);
      table.transformer.softmax_backward(rows, cols, lse.data(), delta.data(), s.data(), dp.data(),
                                         cols + gap);
      for (size_t i = 0; i < rows; ++i)
        for (size_t j = 0; j < cols; ++j) {
          const size_t at = i * cols + j;
          const double above = double(s0[at] - lse0[j]), slope = double(dp0[at]) - delta0[j];
          const double p = std::exp(above > 0 ? 0 : above);
          expect_near(at, s(i, j), p, kExpError * p);
          expect_near(at, dp(i, j), p * slope, (kExpError + 3 * kUnit) * p * std::abs(slope));
        }
      check::expect(s.gaps_intact() && dp.gaps_intact(), "wrote outside its outputs");
      check::expect(lse.untouched(lse0) && delta.untouched(delta0), "wrote to an input");
    }
  });
}

void test_whole_softmax_backward(const KernelTable& table) {
  Random random(44);
  for_matrices("whole_softmax_backward", [&](size_t rows, size_t cols, size_t gap, Place place) {
    for (bool special : {false, true}) {
      check::Case one("%s whole_softmax_backward rows %zu cols %zu gap %zu special %d, %s", table.isa, rows,
                      cols, gap, special, name_of(place));
      const Values s0 = draw_scores(random, rows, cols, special),
                   dp0 = draw<float>(random, rows * cols, Data::kUniform);
      Placed<float> s(rows, cols, {cols + gap}, place, s0), dp(rows, cols, {cols + gap}, place, dp0);
      table.transformer.whole_softmax_backward(rows, cols, s.data(), dp.data(), cols + gap);
      for (size_t j = 0; j < cols; ++j) {
        double top = std::numeric_limits<float>::lowest(), sum = 0, products = 0, magnitude = 0;
        bool poisoned = false;
        for (size_t i = 0; i < rows; ++i) {
          top = std::max(top, double(s0[i * cols + j]));
          poisoned |= std::isnan(s0[i * cols + j]);
        }
        const auto exact = [&](size_t i) { return std::exp(double(float(s0[i * cols + j] - float(top)))); };
        for (size_t i = 0; i < rows; ++i) {
          sum += exact(i);
          products += exact(i) * dp0[i * cols + j];
          magnitude += exact(i) * std::abs(dp0[i * cols + j]);
        }
        const double off = 2 * kExpError + gamma<float>(rows + 3);  // of p
        for (size_t i = 0; i < rows; ++i) {
          if (poisoned) {
            check::expect(std::isnan(s(i, j)) && std::isnan(dp(i, j)), "the NaN of column %zu was lost", j);
            continue;
          }
          if (rows == 1 && s0[j] > -1e30f) check::expect(dp(i, j) == 0, "a single row has a gradient");
          const double p = sum > 0 ? exact(i) / sum : 0, delta = sum > 0 ? products / sum : 0,
                       slope = dp0[i * cols + j] - delta;
          const double error = (off + 2 * kUnit) * p * std::abs(slope) +
                               p * (sum > 0 ? (2 * off + 2 * kUnit) * magnitude / sum : 0);
          expect_near(i * cols + j, s(i, j), p, off * p);
          expect_near(i * cols + j, dp(i, j), p * slope, error);
        }
      }
      check::expect(s.gaps_intact() && dp.gaps_intact(), "wrote outside its outputs");
    }
  });
}

// ---- single queries ----

// Few rows and many, groups of one and of several, head dimensions around the width of vectors.
template <class Body>
void for_heads(const std::string& kernel, const Body& body) {
  for (size_t rows : {0, 1, 3, 4, 5, 8, 15, 16, 17, 35})
    for (size_t dim : {1, 2, 7, 8, 15, 16, 17, 33, 48, 64})
      for (size_t kv_heads : {1, 2})
        for (size_t group : {1, 3, 4}) {
          if (!check::count_shape(kernel)) continue;
          for (Data data : {Data::kIntegers, Data::kUniform, Data::kSpecial})
            for (Place place : kPlaces) body(rows, dim, kv_heads, group, (rows + dim) % 3, data, place);
        }
}

void test_key_dots(const KernelTable& table) {
  Random random(44);
  for_heads("key_dots", [&](size_t rows, size_t dim, size_t kv_heads, size_t group, size_t gap, Data data,
                            Place place) {
    check::Case one("%s key_dots rows %zu dim %zu kv_heads %zu group %zu gap %zu, %s, %s", table.isa, rows,
                    dim, kv_heads, group, gap, name_of(data), name_of(place));
    const size_t heads = kv_heads * group, width = kv_heads * dim;
    const Values q0 = draw<float>(random, heads * dim, data), k0 = draw<float>(random, rows * width, data);
    Row<float> q(place, q0);
    Placed<float> k(rows, width, {width + gap}, place, k0), scores(heads, rows, {rows + gap}, place);
    table.transformer.key_dots(rows, heads, group, dim, q.data(), k.data(), width + gap, scores.data(),
                               rows + gap);
    for (size_t h = 0; h < heads; ++h)
      for (size_t r = 0; r < rows; ++r) {
        double exact = 0, terms = 0;
        for (size_t i = 0; i < dim; ++i) {
          const double term = double(q0[h * dim + i]) * k0[r * width + h / group * dim + i];
          exact += term;
          terms += std::abs(term);
        }
        expect_near(h * rows + r, scores(h, r), exact, sum_error(data, dim + 1, terms));
      }
    check::expect(scores.gaps_intact(), "wrote outside the scores");
    check::expect(q.untouched(q0) && k.untouched(k0), "wrote to an input");
  });
}

void test_add_values(const KernelTable& table) {
  Random random(45);
  for_heads("add_values", [&](size_t rows, size_t dim, size_t kv_heads, size_t group, size_t gap, Data data,
                              Place place) {
    check::Case one("%s add_values rows %zu dim %zu kv_heads %zu group %zu gap %zu, %s, %s", table.isa, rows,
                    dim, kv_heads, group, gap, name_of(data), name_of(place));
    const size_t heads = kv_heads * group, width = kv_heads * dim;
    const Values w0 = draw<float>(random, heads * rows, data), v0 = draw<float>(random, rows * width, data),
                 before = draw<float>(random, heads * dim, data);
    Placed<float> weights(heads, rows, {rows + gap}, place, w0), v(rows, width, {width + gap}, place, v0);
    Row<float> out(place, before);
    table.transformer.add_values(rows, heads, group, dim, weights.data(), rows + gap, v.data(), width + gap,
                                 out.data());
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = 0; i < dim; ++i) {
        double exact = before[h * dim + i], terms = std::abs(exact);
        for (size_t r = 0; r < rows; ++r) {
          const double term = double(w0[h * rows + r]) * v0[r * width + h / group * dim + i];
          exact += term;
          terms += std::abs(term);
        }
        expect_near(h * dim + i, out[h * dim + i], exact, sum_error(data, 2 * rows + 1, terms));
      }
    check::expect(out.gaps_intact(), "wrote outside out");
    check::expect(weights.untouched(w0) && v.untouched(v0), "wrote to an input");
  });
}

// ---- unlikely words ----

void test_select(const KernelTable& table) {
  using nplora::kernels::kSelected;
  Random random(46);
  for_lengths("select", [&](size_t n, Place place) {
    for (size_t limit : {size_t{0}, size_t{3}, n / 4, n}) {
      check::Case one("%s select n %zu limit %zu, %s", table.isa, n, limit, name_of(place));
      Values values = draw<float>(random, n, Data::kIntegers);
      if (n > 5) values[5] = std::numeric_limits<float>::quiet_NaN();
      const float least = 4;
      std::vector<int32_t> exact;
      for (size_t i = 0; i < n; ++i)
        if (values[i] >= least) exact.push_back(int32_t(i));
      Row<float> x(place, values), found(place, limit + kSelected);
      const Guarded<int32_t> ids(limit + kSelected, place);
      const size_t count = table.transformer.select(n, x.data(), least, limit, ids.data(), found.data());
      check::expect(count == std::min(exact.size(), limit + 1), "found %zu of %zu", count, exact.size());
      for (size_t i = 0; count <= limit && i < count; ++i)
        check::expect(ids.data()[i] == exact[i] && found[i] == values[size_t(exact[i])],
                      "element %zu differs", i);
      check::expect(x.untouched(values) && found.gaps_intact(), "wrote outside the results");
    }
  });
}

void test_add_rows(const KernelTable& table) {
  using nplora::kernels::kPanelColumns;
  Random random(47);
  constexpr size_t kRows = 5;
  for (size_t n = 0; n <= 250; ++n)
    for (size_t count : {0, 1, 7}) {
      if (!check::count_shape("add_rows")) continue;
      for (Data data : {Data::kIntegers, Data::kUniform})
        for (Place place : kPlaces)
          for (bool in_panels : {false, true}) {
            if (in_panels && n % kPanelColumns != 0) continue;
            check::Case one("%s add_rows n %zu count %zu panels %d, %s, %s", table.isa, n, count, in_panels,
                            name_of(data), name_of(place));
            const Values w0 = draw<float>(random, count, data), rows0 = draw<float>(random, kRows * n, data),
                         before = draw<float>(random, n, data);
            std::vector<uint8_t> ids(count);
            for (size_t i = 0; i < count; ++i) ids[i] = uint8_t(3 * i % kRows);
            const size_t row_stride = in_panels ? kPanelColumns : n,
                         panel_stride = in_panels ? kRows * kPanelColumns : kPanelColumns;
            Row<float> weights(place, w0), rows(place, rows0), out(place, before);
            table.transformer.add_rows(count, n, ids.data(), weights.data(),
                                       {rows.data(), row_stride, panel_stride}, out.data());
            for (size_t j = 0; j < n; ++j) {
              double exact = before[j], terms = std::abs(exact);
              for (size_t i = 0; i < count; ++i) {
                const double term =
                    double(w0[i]) *
                    rows0[j / kPanelColumns * panel_stride + ids[i] * row_stride + j % kPanelColumns];
                exact += term;
                terms += std::abs(term);
              }
              expect_near(j, out[j], exact, sum_error(data, 2 * count + 1, terms));
            }
            check::expect(out.gaps_intact(), "wrote outside out");
            check::expect(weights.untouched(w0) && rows.untouched(rows0), "wrote to an input");
          }
    }
}

}  // namespace

void test_transformer(const KernelTable& table) {
  test_exp(table);
  test_largest(table);
  test_exp_sum(table);
  test_scaled(table);
  test_dot(table);
  test_rms_norm(table);
  test_rms_norm_backward(table);
  test_layer_norm(table);
  test_layer_norm_backward(table);
  test_rotate(table);
  for (size_t act = 0; act < kActivations; ++act) {
    test_gated(table, act);
    test_gated_backward(table, act);
  }
  test_scale_columns(table);
  test_softmax_step(table);
  test_softmax_backward(table);
  test_whole_softmax_backward(table);
  test_key_dots(table);
  test_add_values(table);
  test_select(table);
  test_add_rows(table);
}
