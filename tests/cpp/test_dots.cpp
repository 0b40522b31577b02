// dots, interleave and sum_parts: the products of small batches, one vector of partial sums for each output.
#include <bit>
#include <string>
#include <type_traits>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::Bf16;
using nplora::kernels::KernelTable;
using nplora::kernels::kPanelColumns;
using nplora::kernels::Panels;
using nplora::kernels::Sum;

namespace {

// Equal numbers, or both NaN: the lanes behind the last column may add a zero, which turns -0 into 0.
template <class T>
bool equal(T a, T b) {
  return a == b || same(a, b);
}

template <class W>
Sum<W> widened(W x) {
  if constexpr (std::is_same_v<W, Bf16>)
    return std::bit_cast<float>(uint32_t(x) << 16);
  else
    return x;
}

template <class W>
std::vector<W> stored(const std::vector<Sum<W>>& values) {
  std::vector<W> out;
  for (Sum<W> x : values)
    if constexpr (std::is_same_v<W, Bf16>)
      out.push_back(Bf16(std::bit_cast<uint32_t>(x) >> 16));
    else
      out.push_back(x);
  return out;
}

template <class W>
const char* element() {
  return std::is_same_v<W, Bf16> ? "bfloat16" : type_name<Sum<W>>();
}

// Lane l of part[t][j] is the sum over the columns c with c % lanes == l of w[j][c] * x[t][c], in order. w lies in panels
// (kind 0: of one row stride), or row-major.
template <class W>
void run_dots(const KernelTable& table, Random& random, size_t m, size_t rows, size_t depth, size_t kind,
              Data data, Place place) {
  using T = Sum<W>;
  const size_t lanes = table.products<T>().lanes / 2, vectors = (depth + lanes - 1) / lanes;
  const bool accumulate = kind % 7 < 3, fused = fuses(table), panels = kind % 2 && depth % kPanelColumns == 0;
  check::Case one("%s dots<%s> m %zu rows %zu depth %zu %s accumulate %d, %s, %s", table.isa, element<W>(), m,
                  rows, depth, panels ? "in panels" : "row-major", accumulate, name_of(data), name_of(place));
  const std::vector<W> w0 = stored<W>(draw<T>(random, rows * depth, data));
  const std::vector<T> x0 = draw<T>(random, m * depth, data), part0 = draw<T>(random, m * rows * lanes, data);
  const size_t gap = panels ? 0 : kind % 3 * 5;
  const auto place_of = [&](size_t j, size_t c) {
    return panels ? (c / kPanelColumns * rows + j) * kPanelColumns + c % kPanelColumns : j * depth + c;
  };
  std::vector<W> in_memory(rows * depth);
  for (size_t j = 0; j < rows; ++j)
    for (size_t c = 0; c < depth; ++c) in_memory[place_of(j, c)] = w0[j * depth + c];
  const size_t w_rows = panels ? 1 : rows, w_cols = panels ? rows * depth : depth;
  Placed<W> w(w_rows, w_cols, {w_cols + gap}, place, in_memory);
  std::vector<T> interleaved(vectors * m * lanes);
  for (size_t t = 0; t < m; ++t)
    for (size_t c = 0; c < depth; ++c)
      interleaved[(c / lanes * m + t) * lanes + c % lanes] = x0[t * depth + c];
  Row<T> x(place, interleaved);
  Placed<T> part(m * rows, lanes, {lanes}, place);
  if (accumulate) std::copy(part0.begin(), part0.end(), part.data());
  table.small<W>().dots(m, rows, depth,
                        panels ? Panels<W>{w.data(), kPanelColumns, rows * kPanelColumns}
                               : Panels<W>{w.data(), depth + gap, kPanelColumns},
                        x.data(), part.data(), accumulate);

  const size_t roundings = (fused ? 1 : 2) * vectors;
  const Wide<T> bound = gamma<T>(roundings), smallest = std::numeric_limits<T>::denorm_min();
  for (size_t output = 0; output < m * rows; ++output)
    for (size_t lane = 0; lane < lanes; ++lane) {
      T in_order = accumulate ? part0[output * lanes + lane] : T(0);
      Wide<T> exact = in_order, terms = std::abs(in_order);
      for (size_t c = lane; c < depth; c += lanes) {
        const T a = widened(w0[output % rows * depth + c]), b = x0[output / rows * depth + c];
        in_order = fused ? std::fma(a, b, in_order) : a * b + in_order;
        exact += Wide<T>(a) * Wide<T>(b);
        terms += std::abs(Wide<T>(a) * Wide<T>(b));
      }
      const T got = part(output, lane);
      if (fused || data == Data::kIntegers || data == Data::kSpecial)
        check::expect(equal(got, in_order), "lane %zu of output %zu is %.9g, wanted exactly %.9g", lane,
                      output, double(got), double(in_order));
      if (data != Data::kSpecial)
        check::expect(std::abs(got - exact) <= bound * terms + Wide<T>(roundings) * smallest,
                      "lane %zu of output %zu is %.17g, wanted %.17Lg", lane, output, double(got),
                      static_cast<long double>(exact));
    }
  check::expect(part.gaps_intact(), "wrote outside part");
  check::expect(w.untouched(in_memory) && x.untouched(interleaved), "wrote to an input");
}

template <class W>
void test_dots_of(const KernelTable& table) {
  Random random(5);
  size_t kind = 0;
  const std::string kernel = std::string("dots of ") + element<W>();
  for (size_t depth : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 96, 101, 144})
    for (size_t m : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17})
      for (size_t rows : {0, 1, 3, 4, 5, 8, 11}) {
        check::count_shape(kernel);
        ++kind;
        for (Data data : kAllData)
          for (Place place : kPlaces) run_dots<W>(table, random, m, rows, depth, kind, data, place);
      }
}

template <class T>
void run_interleave(const KernelTable& table, Random& random, size_t m, size_t cols, size_t gap,
                    Place place) {
  const size_t lanes = table.products<T>().lanes / 2, vectors = (cols + lanes - 1) / lanes;
  check::Case one("%s interleave<%s> m %zu cols %zu stride %zu, %s", table.isa, type_name<T>(), m, cols,
                  cols + gap, name_of(place));
  const std::vector<T> x0 = draw<T>(random, m * cols, Data::kSpecial);
  Placed<T> x(m, cols, {cols + gap}, place, x0), out(vectors * m, lanes, {lanes}, place);
  table.products<T>().interleave(m, cols, x.data(), cols + gap, out.data());
  for (size_t i = 0; i < vectors * m; ++i)
    for (size_t lane = 0; lane < lanes; ++lane) {
      const size_t c = i / m * lanes + lane;
      const T want = c < cols ? x0[i % m * cols + c] : T(0);
      check::expect(same(out(i, lane), want), "lane %zu of vector %zu is wrong", lane, i);
    }
  check::expect(out.gaps_intact(), "wrote outside out");
  check::expect(x.untouched(x0), "wrote to x");
}

template <class T>
void test_interleave(const KernelTable& table) {
  Random random(7);
  for (size_t cols = 0; cols <= 100; ++cols)
    for (size_t m : {0, 1, 2, 5, 8}) {
      check::count_shape(std::string("interleave of ") + type_name<T>());
      for (Place place : kPlaces) run_interleave<T>(table, random, m, cols, (cols + m) % 3, place);
    }
}

template <class T>
void run_sum_parts(const KernelTable& table, Random& random, size_t m, size_t rows, size_t gap,
                   bool with_bias, Data data, Place place) {
  const size_t lanes = table.products<T>().lanes / 2;
  check::Case one("%s sum_parts<%s> m %zu rows %zu stride %zu bias %d, %s, %s", table.isa, type_name<T>(), m,
                  rows, rows + gap, with_bias, name_of(data), name_of(place));
  const std::vector<T> values = draw<T>(random, m * rows * lanes, data),
                       offsets = draw<T>(random, rows, data);
  Placed<T> part(m * rows, lanes, {lanes}, place, values), y(m, rows, {rows + gap}, place);
  Row<T> bias(place, offsets);
  table.products<T>().sum_parts(m, rows, part.data(), with_bias ? bias.data() : nullptr, y.data(),
                                rows + gap);
  const Wide<T> bound = gamma<T>(lanes);
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < rows; ++j) {
      Wide<T> exact = with_bias ? offsets[j] : T(0), terms = std::abs(exact);
      for (size_t lane = 0; lane < lanes; ++lane) {
        exact += values[(i * rows + j) * lanes + lane];
        terms += std::abs(Wide<T>(values[(i * rows + j) * lanes + lane]));
      }
      if (data == Data::kIntegers || !std::isfinite(exact))
        check::expect(equal(y(i, j), T(exact)), "element (%zu, %zu) is %g, wanted %g", i, j, double(y(i, j)),
                      double(exact));
      else
        check::expect(std::abs(y(i, j) - exact) <= bound * terms, "element (%zu, %zu) is %.9g, wanted %.9g",
                      i, j, double(y(i, j)), double(exact));
    }
  check::expect(y.gaps_intact(), "wrote outside y");
  check::expect(part.untouched(values) && bias.untouched(offsets), "wrote to an input");
}

template <class T>
void test_sum_parts(const KernelTable& table) {
  Random random(6);
  for (size_t rows = 0; rows <= 130; ++rows)
    for (size_t m : {0, 1, 2, 5}) {
      check::count_shape(is_float<T> ? "sum_parts<float>" : "sum_parts<double>");
      for (Data data : kAllData)
        for (Place place : kPlaces)
          for (bool with_bias : {false, true})
            run_sum_parts<T>(table, random, m, rows, (rows + m) % 3, with_bias, data, place);
    }
}

}  // namespace

void test_dots(const KernelTable& table) {
  test_dots_of<float>(table);
  test_dots_of<double>(table);
  test_dots_of<Bf16>(table);
  test_interleave<float>(table);
  test_interleave<double>(table);
  test_sum_parts<float>(table);
  test_sum_parts<double>(table);
}
