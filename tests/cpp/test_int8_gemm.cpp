// The kernels of int8 products with many rows. Codes and integer sums must be exact; the float sums of groups
// are compared with double.
#include <cfenv>
#include <cstdint>
#include <string>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"
#include "philox.h"

using nplora::kernels::Bf16;
using nplora::kernels::Int8Quad;
using nplora::kernels::KernelTable;
using nplora::kernels::kInt8PanelColumns;
using nplora::kernels::kPanelColumns;

namespace {

size_t up_to_four(size_t n) {
  return (n + 3) / 4 * 4;
}

// x * inverse, rounded to float, and then to the nearest whole number, ties to even.
int code_of(float x, float inverse) {
  volatile float product = x * inverse;  // not part of a multiply-add
  return static_cast<int>(std::nearbyint(double(product)));
}

// The offset of W's codes.
uint8_t offset_of(const KernelTable& table) {
  const float zero = 0, one = 1;
  uint8_t code = 77;
  table.int8_gemm.encode(1, 1, &zero, 1, &one, &code, 1);
  check::expect(code == table.int8_gemm.code_offset, "the code of 0 is %d, not the offset %zu", code,
                table.int8_gemm.code_offset);
  return code;
}

// ---- x to int8 ----

struct Rounding {
  bool dithers = false;
  uint64_t seed = 0, first = 0;
};

// The random bits of element i of a dithered row, as kernel_table.h defines them.
uint32_t random_bits(const Rounding& r, size_t i) {
  const uint64_t e = r.first + i, counter = e / 64 * 16 + e % 16;
  const Words words = philox({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0},
                             static_cast<uint32_t>(r.seed), static_cast<uint32_t>(r.seed >> 32));
  return words[e / 16 % 4] & 0x7FFFFF;
}

// x * inverse, rounded to float, and then up or down by a random fraction.
int dithered(float x, float inverse, uint32_t bits) {
  volatile float product = x * inverse;
  const double fixed = std::trunc(double(product) * 0x1p23), most = 127 * 0x1p23;
  return static_cast<int>(std::floor((std::min(std::max(fixed, -most), most) + bits) * 0x1p-23));
}

void run_quantize(const KernelTable& table, size_t n, size_t group, bool folds, Data data,
                  const Rounding& rounding, Random& random, Place place) {
  check::Case one("%s int8 %s %zu by %zu%s %s, %s", table.isa, rounding.dithers ? "dither" : "quantize", n,
                  group, folds ? " folded" : "", name_of(data), name_of(place));
  std::vector<float> values = draw<float>(random, n, data), factors = draw<float>(random, n, Data::kUniform);
  if (n > group && random.below(4) == 0)
    std::fill_n(values.begin(), group, random.below(2) ? 0.0f : 0x1p-125f);
  const size_t groups = (n + group - 1) / group;
  Row<float> x(place, values), factor_row(place, factors), scales(place, groups);
  Row<int8_t> codes(place, up_to_four(n));
  Row<int32_t> corrections(place, groups);
  const float* folded = folds ? factor_row.data() : nullptr;
  if (rounding.dithers)
    table.int8_gemm.dither_groups(n, group, rounding.seed, rounding.first, x.data(), folded, codes.data(),
                                  scales.data(), corrections.data());
  else
    table.int8_gemm.quantize_groups(n, group, x.data(), folded, codes.data(), scales.data(),
                                    corrections.data());
  if (folds)
    for (size_t i = 0; i < n; ++i) {
      volatile float product = values[i] * factors[i];
      values[i] = product;
    }
  for (size_t g = 0; g < groups; ++g) {
    const size_t first = g * group, end = std::min(n, first + group);
    float largest = 0;
    for (size_t i = first; i < end; ++i)
      largest = std::isnan(values[i]) || std::isnan(largest) ? NAN : std::max(largest, std::abs(values[i]));
    const bool finite = std::isfinite(largest), zero = largest < 0x1p-119f;
    const float scale = !finite ? NAN : zero ? 0 : largest / 127.0f;
    check::expect(same(scales[g], scale), "scale %zu is %.9g, wanted %.9g", g, double(scales[g]),
                  double(scale));
    int64_t sum = 0;
    for (size_t i = first; i < end; ++i) {
      const int wanted = !finite || zero    ? 0
                         : rounding.dithers ? dithered(values[i], 1 / scale, random_bits(rounding, i))
                                            : code_of(values[i], 1 / scale);
      check::expect(codes[i] == wanted && std::abs(wanted) <= 127, "code %zu is %d, wanted %d", i, codes[i],
                    wanted);
      sum += wanted;
    }
    const int64_t correction = -int64_t{offset_of(table)} * sum;
    check::expect(corrections[g] == correction, "correction %zu is %d, wanted %d", g, corrections[g],
                  int(correction));
  }
  for (size_t i = n; i < up_to_four(n); ++i) check::expect(codes[i] == 0, "code %zu is not 0", i);
  check::expect(codes.gaps_intact() && scales.gaps_intact() && corrections.gaps_intact(),
                "wrote outside its outputs");
}

void test_quantize(const KernelTable& table) {
  Random random(510);
  for (size_t n = 0; n <= 210; n += 1 + n / 40)
    for (size_t group : {size_t{64}, size_t{192}, size_t{4032}})
      for (Data data : kAllData) {
        if (!check::count_shape("int8 quantize_groups")) continue;
        for (Place place : kPlaces) {
          run_quantize(table, n, group, random.below(2) == 0, data, {}, random, place);
          const Rounding dithered{true, uint64_t{random.bits()} << 32 | random.bits(), 64 * random.below(9)};
          run_quantize(table, n, group, random.below(2) == 0, data, dithered, random, place);
        }
      }
}

// The mean code of an element must be the element. Rounded to nearest, these elements would all become 0.
void test_mean_of_dithered(const KernelTable& table) {
  check::Case one("%s int8 dither, mean", table.isa);
  constexpr size_t kRows = 4000, kSmall = 63;
  std::vector<float> x(kSmall + 1, 0.3f / 127);
  x[kSmall] = 1;
  double sum = 0;
  for (size_t row = 0; row < kRows; ++row) {
    int8_t codes[kSmall + 1];
    float scale;
    int32_t correction;
    table.int8_gemm.dither_groups(kSmall + 1, 64, 7, 64 * row, x.data(), nullptr, codes, &scale, &correction);
    for (size_t i = 0; i < kSmall; ++i) sum += codes[i];
  }
  const double n = kRows * kSmall, deviation = std::sqrt(0.3 * 0.7 / n);
  check::expect(std::abs(sum / n - 0.3) < 5 * deviation, "the mean is %.5f, wanted 0.3", sum / n);
}

// ---- W to int8 ----

// For each row of `values` (rows, cols), 127 divided by the largest magnitude.
std::vector<float> inverses_of(const std::vector<float>& values, size_t rows, size_t cols) {
  std::vector<float> inverses(rows);
  for (size_t i = 0; i < rows; ++i) {
    float largest = 0;
    for (size_t j = 0; j < cols; ++j) largest = std::max(largest, std::abs(values[i * cols + j]));
    inverses[i] = largest > 0 ? 127 / largest : 0;
  }
  return inverses;
}

void expect_codes(const KernelTable& table, Placed<uint8_t>& codes, size_t rows, size_t cols,
                  const std::vector<float>& values, const std::vector<float>& inverses) {
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < cols; ++j) {
      const int wanted = code_of(values[i * cols + j], inverses[i]);
      const auto got = static_cast<int8_t>(codes(i, j) - offset_of(table));
      check::expect(got == wanted, "code (%zu, %zu) is %d, wanted %d", i, j, got, wanted);
    }
  check::expect(codes.gaps_intact(), "wrote outside the codes");
}

void run_encode(const KernelTable& table, size_t rows, size_t cols, size_t gap, Random& random, Place place) {
  check::Case one("%s int8 encode %zu x %zu, gap %zu, %s", table.isa, rows, cols, gap, name_of(place));
  const std::vector<float> values = draw<float>(random, rows * cols, Data::kUniform);
  Placed<float> w(rows, cols, {cols + gap}, place, values);
  std::vector<float> wanted_largest(rows);
  for (float& least : wanted_largest) least = float(random.below(2)) / 2;
  const std::vector<float> inverse_values = inverses_of(values, rows, cols);
  Row<float> largest(place, wanted_largest), inverses(place, inverse_values);
  table.int8_gemm.largest(rows, cols, w.data(), cols + gap, largest.data());
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < cols; ++j)
      wanted_largest[i] = std::max(wanted_largest[i], std::abs(values[i * cols + j]));
    check::expect(largest[i] == wanted_largest[i], "the largest of row %zu is %.9g, wanted %.9g", i,
                  double(largest[i]), double(wanted_largest[i]));
  }
  Placed<uint8_t> codes(rows, cols, {cols + gap}, place);
  table.int8_gemm.encode(rows, cols, w.data(), cols + gap, inverses.data(), codes.data(), cols + gap);
  expect_codes(table, codes, rows, cols, values, inverse_values);
  check::expect(largest.gaps_intact() && w.untouched(values), "wrote outside its outputs");
}

void run_encode_bf16(const KernelTable& table, size_t rows, size_t cols, size_t gap, Random& random,
                     Place place) {
  check::Case one("%s int8 encode_bf16 %zu x %zu, gap %zu, %s", table.isa, rows, cols, gap, name_of(place));
  std::vector<float> values = draw<float>(random, rows * cols, Data::kUniform);
  std::vector<Bf16> stored;
  for (float& value : values) {
    const uint32_t upper = __builtin_bit_cast(uint32_t, value) >> 16;
    stored.push_back(static_cast<Bf16>(upper));
    value = __builtin_bit_cast(float, upper << 16);
  }
  const std::vector<float> inverse_values = inverses_of(values, rows, cols);
  Row<float> inverses(place, inverse_values);
  Placed<Bf16> w(rows, cols, {cols + gap}, place, stored);
  Placed<uint8_t> codes(rows, cols, {cols + gap}, place);
  table.int8_gemm.encode_bf16(rows, cols, w.data(), cols + gap, inverses.data(), codes.data(), cols + gap);
  expect_codes(table, codes, rows, cols, values, inverse_values);
  check::expect(w.untouched(stored), "wrote to its input");
}

void run_quad_rows(const KernelTable& table, size_t rows, size_t cols, size_t gap, Random& random,
                   Place place) {
  check::Case one("%s int8 quad_rows %zu x %zu, gap %zu, %s", table.isa, rows, cols, gap, name_of(place));
  std::vector<uint8_t> values(rows * cols);
  for (uint8_t& value : values) value = static_cast<uint8_t>(random.bits());
  Placed<uint8_t> codes(rows, cols, {cols + gap}, place, values);
  const size_t quads = up_to_four(rows) / 4;
  Placed<Int8Quad> out(quads, cols, {cols + gap}, place);
  table.int8_gemm.quad_rows(rows, cols, codes.data(), cols + gap, out.data(), cols + gap);
  for (size_t i = 0; i < 4 * quads; ++i)
    for (size_t j = 0; j < cols; ++j) {
      const auto got = static_cast<uint8_t>(static_cast<uint32_t>(out(i / 4, j)) >> 8 * (i % 4));
      const uint8_t wanted = i < rows ? values[i * cols + j] : 0;
      check::expect(got == wanted, "row %zu of column %zu is %d, wanted %d", i, j, got, wanted);
    }
  check::expect(out.gaps_intact() && codes.untouched(values), "wrote outside its output");
}

void run_turn_quads(const KernelTable& table, size_t rows, size_t quads, size_t gap, Random& random,
                    Place place) {
  check::Case one("%s int8 turn_quads %zu x %zu, gap %zu, %s", table.isa, rows, quads, gap, name_of(place));
  const size_t read = up_to_four(rows);
  std::vector<Int8Quad> values(quads * read);
  for (Int8Quad& value : values) value = Int8Quad(static_cast<uint32_t>(random.bits()));
  Placed<Int8Quad> w(quads, read, {read + gap}, place, values);
  Placed<Int8Quad> out(read / 4, 4 * quads, {4 * quads + gap}, place);
  table.int8_gemm.turn_quads(rows, quads, w.data(), read + gap, out.data(), 4 * quads + gap);
  const auto code = [](Int8Quad quad, size_t i) {
    return static_cast<uint8_t>(static_cast<uint32_t>(quad) >> 8 * i);
  };
  for (size_t i = 0; i < read; ++i)
    for (size_t j = 0; j < 4 * quads; ++j) {
      const uint8_t got = code(out(i / 4, j), i % 4), wanted = code(values[j / 4 * read + i], j % 4);
      check::expect(got == wanted, "row %zu of column %zu is %d, wanted %d", i, j, got, wanted);
    }
  check::expect(out.gaps_intact() && w.untouched(values), "wrote outside its output");
}

void test_packing(const KernelTable& table) {
  Random random(520);
  for (size_t rows = 0; rows <= 17; ++rows)
    for (size_t cols = 0; cols <= 100; cols += 1 + cols / 16)
      for (Place place : kPlaces) {
        const size_t gap = random.below(3);
        if (check::count_shape("int8 encode")) run_encode(table, rows, cols, gap, random, place);
        if (check::count_shape("int8 encode_bf16")) run_encode_bf16(table, rows, cols, gap, random, place);
        if (check::count_shape("int8 quad_rows")) run_quad_rows(table, rows, cols, gap, random, place);
        if (cols <= 24 && check::count_shape("int8 turn_quads"))
          run_turn_quads(table, rows, cols, gap, random, place);
      }
}

// ---- products ----

struct Product {
  size_t m, n, depth, group, columns;
  bool extreme, scaled, accumulate;
};

void run_multiply(const KernelTable& table, const Product& p, Random& random, Place place) {
  check::Case one("%s int8 multiply %zu x %zu, depth %zu by %zu, %zu columns%s%s%s, %s", table.isa, p.m, p.n,
                  p.depth, p.group, p.columns, p.extreme ? ", extreme" : "", p.scaled ? ", scaled" : "",
                  p.accumulate ? ", added" : "", name_of(place));
  const size_t stride = up_to_four(p.depth) + 4 * random.below(3), quads = up_to_four(p.depth) / 4;
  const size_t groups = std::max<size_t>(1, (p.depth + p.group - 1) / p.group);
  const auto code = [&] {
    return p.extreme ? (random.below(50) ? 127 : -127) : static_cast<int>(random.below(255)) - 127;
  };
  std::vector<int8_t> a_values(p.m * up_to_four(p.depth));
  std::vector<float> scale_values = draw<float>(random, p.m * groups, Data::kUniform);
  std::vector<int32_t> correction_values(p.m * groups);
  const uint8_t offset = offset_of(table);
  for (size_t t = 0; t < p.m; ++t)
    for (size_t k = 0; k < p.depth; ++k) {
      a_values[t * up_to_four(p.depth) + k] = static_cast<int8_t>(code());
      correction_values[t * groups + k / p.group] -= offset * a_values[t * up_to_four(p.depth) + k];
    }
  std::vector<int> w_values(p.depth * p.n);
  for (int& value : w_values) value = code();
  std::vector<Int8Quad> quad_values(quads * p.columns);
  for (size_t q = 0; q < quads; ++q)
    for (size_t j = 0; j < p.columns; ++j) {
      uint32_t quad = 0;
      for (size_t i = 0; i < 4; ++i) {
        const int value = j < p.n && 4 * q + i < p.depth ? w_values[(4 * q + i) * p.n + j] : code();
        quad |= uint32_t{static_cast<uint8_t>(value + offset)} << 8 * i;
      }
      quad_values[q * p.columns + j] = Int8Quad(quad);
    }
  const std::vector<float> factor_values = draw<float>(random, p.n, Data::kUniform),
                           c_values = draw<float>(random, p.m * p.n, Data::kUniform);
  Placed<int8_t> a(p.m, up_to_four(p.depth), {stride}, place, a_values);
  Row<float> scales(place, scale_values), factors(place, factor_values);
  Row<int32_t> corrections(place, correction_values);
  Row<Int8Quad> w(place, quad_values);
  Placed<float> c(p.m, p.n, {p.n + 2}, place, c_values);
  table.int8_gemm.multiply(p.m, p.n, p.depth,
                           {a.data(), stride, scales.data(), corrections.data(), p.group, groups}, w.data(),
                           p.columns, p.scaled ? factors.data() : nullptr, c.data(), p.n + 2, p.accumulate);
  for (size_t t = 0; t < p.m; ++t)
    for (size_t j = 0; j < p.n; ++j) {
      double sum = 0, magnitude = 0;
      for (size_t k = 0; k < p.depth; k += p.group) {
        int64_t products = 0;
        for (size_t i = k; i < std::min(p.depth, k + p.group); ++i)
          products += int64_t{a_values[t * up_to_four(p.depth) + i]} * w_values[i * p.n + j];
        const double part = double(products) * double(scale_values[t * groups + k / p.group]);
        sum += part;
        magnitude += std::abs(part);
      }
      const double factor = p.scaled ? double(factor_values[j]) : 1,
                   before = p.accumulate ? double(c_values[t * p.n + j]) : 0;
      const double wanted = before + sum * factor;
      magnitude = magnitude * std::abs(factor) + std::abs(before);
      check::expect(std::abs(double(c(t, j)) - wanted) <= gamma<float>(2 * groups + 4) * magnitude,
                    "token %zu column %zu is %.9g, wanted %.9g", t, j, double(c(t, j)), wanted);
    }
  check::expect(c.gaps_intact() && a.untouched(a_values) && w.untouched(quad_values),
                "wrote outside its output");
}

void test_multiply(const KernelTable& table) {
  Random random(530);
  for (size_t m : {0u, 1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u, 9u, 10u, 17u, 23u})
    for (size_t n : {1u, 4u, 7u, 8u, 15u, 16u, 17u, 31u, 32u, 40u, 47u, 48u})
      for (size_t depth : {0u, 1u, 4u, 63u, 64u, 65u, 200u}) {
        if (!check::count_shape("int8 multiply")) continue;
        for (Place place : kPlaces)
          run_multiply(table,
                       {m, n, depth, random.below(2) ? size_t{64} : size_t{192},
                        n <= kInt8PanelColumns && random.below(2) ? kInt8PanelColumns : kPanelColumns,
                        random.below(3) == 0, random.below(2) == 0, random.below(2) == 0},
                       random, place);
      }
  for (size_t group : {size_t{64}, nplora::kernels::kInt8Depth})  // the largest sums
    run_multiply(table, {2, 48, nplora::kernels::kInt8Depth, group, kPanelColumns, true, true, false}, random,
                 Place::kEnd);
}

}  // namespace

void test_int8_gemm(const KernelTable& table) {
  test_quantize(table);
  test_mean_of_dithered(table);
  test_packing(table);
  test_multiply(table);
}
