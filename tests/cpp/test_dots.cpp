// dots, sum_parts and add_dots: the products of small batches.
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
using nplora::kernels::kSmallBatch;
using nplora::kernels::Panels;
using nplora::kernels::Sum;

namespace {

// Whether two numbers are equal, or both NaN. Zeros in the lanes turn -0 into 0.
template <class T>
bool equal(T a, T b) {
  return a == b || same(a, b);
}

template <class W>
const char* element() {
  return std::is_same_v<W, Bf16> ? "bfloat16" : type_name<Sum<W>>();
}

template <class T>
size_t vector_lanes(const KernelTable& table) {
  return table.products<T>().lanes / 2;
}

// Values that W stores without rounding.
template <class W>
std::vector<Sum<W>> draw_exact(Random& random, size_t n, Data data) {
  std::vector<Sum<W>> values = draw<Sum<W>>(random, n, data);
  if constexpr (sizeof(W) == 2)
    for (float& value : values) value = std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xFFFF0000u);
  return values;
}

template <class E>
std::vector<E> as_elements(const std::vector<Sum<E>>& values) {
  if constexpr (std::is_same_v<E, Bf16>) {
    std::vector<E> out;
    for (float value : values) out.push_back(Bf16(std::bit_cast<uint32_t>(value) >> 16));
    return out;
  } else {
    return values;
  }
}

// Lane i of token t and row j is the sum of w[j][k] x[t][k] over the k with k % lanes == i. w is in panels if
// `kind` is odd, else row-major.
template <class W>
void run_dots(const KernelTable& table, Random& random, size_t m, size_t rows, size_t depth, size_t kind,
              Data data, Place place) {
  using T = Sum<W>;
  constexpr size_t kPanel = kPanelColumns;
  const size_t lanes = vector_lanes<T>(table), all = rows * lanes;
  const bool accumulate = kind % 7 < 3, panels = kind % 2 && depth % kPanel == 0;
  check::Case one("%s dots of %s, m %zu rows %zu depth %zu %s accumulate %d, %s, %s", table.isa, element<W>(),
                  m, rows, depth, panels ? "in panels" : "row-major", accumulate, name_of(data),
                  name_of(place));
  const std::vector<T> w0 = draw_exact<W>(random, rows * depth, data), x0 = draw<T>(random, m * depth, data),
                       part0 = draw<T>(random, m * all, data);
  const std::vector<W> w_elements = as_elements<W>(w0);
  const auto stored = [&](bool in_panels) {
    std::vector<W> out(rows * depth + 1);  // at least one, so that there is an address
    for (size_t j = 0; j < rows; ++j)
      for (size_t k = 0; k < depth; ++k)
        out[in_panels ? (k / kPanel * rows + j) * kPanel + k % kPanel : j * depth + k] =
            w_elements[j * depth + k];
    return out;
  };

  std::vector<W> in_memory = stored(panels);
  in_memory.pop_back();
  const size_t gap = panels ? 0 : kind % 3 * 5;
  const size_t w_rows = panels ? 1 : rows, w_cols = panels ? rows * depth : depth;
  Placed<W> w(w_rows, w_cols, {w_cols + gap}, place, in_memory);
  Placed<T> x(m, depth, {depth + kind % 4}, place, x0);
  Row<T> part(place, m * all);
  if (accumulate) std::copy(part0.begin(), part0.end(), part.data());
  table.small<W>().dots(
      m, rows, depth,
      panels ? Panels<W>{w.data(), kPanel, rows * kPanel} : Panels<W>{w.data(), depth + gap, kPanel},
      x.data(), depth + kind % 4, part.data(), accumulate);

  const size_t roundings = 2 * (depth / lanes + 1) + 4;
  for (size_t i = 0; i < m * all; ++i) {
    const size_t t = i / all, j = i % all / lanes, lane = i % lanes;
    Wide<T> exact = accumulate ? part0[i] : T(0), terms = std::abs(exact);
    for (size_t k = lane; k < depth; k += lanes) {
      const Wide<T> term = Wide<T>(w0[j * depth + k]) * x0[t * depth + k];
      exact += term;
      terms += std::abs(term);
    }
    const T got = part(0, i);
    if (data == Data::kIntegers || !std::isfinite(exact))
      check::expect(equal(got, T(exact)), "token %zu row %zu lane %zu is %.9g, wanted exactly %.9g", t, j,
                    lane, double(got), double(exact));
    else
      check::expect(std::abs(got - exact) <= gamma<T>(roundings) * terms +
                                                 Wide<T>(roundings) * std::numeric_limits<T>::denorm_min(),
                    "token %zu row %zu lane %zu is %.17g, wanted %.17Lg", t, j, lane, double(got),
                    static_cast<long double>(exact));
  }
  check::expect(part.gaps_intact(), "wrote outside part");
  check::expect(w.untouched(in_memory) && x.untouched(x0), "wrote to an input");

  // A token has the same bits alone, and in the other layout.
  const bool other_panels = depth % kPanel == 0 ? !panels : panels;
  const std::vector<W> other = stored(other_panels);
  for (size_t t = 0; t < m; ++t) {
    std::vector<T> again(all);
    if (accumulate) std::copy_n(part0.begin() + std::ptrdiff_t(t * all), all, again.begin());
    table.small<W>().dots(1, rows, depth,
                          other_panels ? Panels<W>{other.data(), kPanel, rows * kPanel}
                                       : Panels<W>{other.data(), depth, kPanel},
                          x0.data() + t * depth, depth, again.data(), accumulate);
    for (size_t i = 0; i < all; ++i)
      check::expect(same(again[i], part(0, t * all + i)), "token %zu row %zu lane %zu differs alone", t,
                    i / lanes, i % lanes);
  }
}

template <class W>
void test_dots_of(const KernelTable& table) {
  Random random(5);
  size_t kind = 0;
  const std::string kernel = std::string("dots of ") + element<W>();
  for (size_t depth : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 96, 101, 144})
    for (size_t m = 1; m <= kSmallBatch; ++m)
      for (size_t rows : {0, 1, 2, 3, 4, 5, 8, 11, 131}) {
        if (rows > 11 && depth != 96) continue;  // enough that a panel is processed in two parts
        ++kind;
        if (!check::count_shape(kernel)) continue;
        for (Data data : kAllData)
          for (Place place : kPlaces) run_dots<W>(table, random, m, rows, depth, kind, data, place);
      }
}

template <class T>
void run_sum_parts(const KernelTable& table, Random& random, size_t rows, bool with_bias, Data data,
                   Place place) {
  const size_t lanes = vector_lanes<T>(table);
  check::Case one("%s sum_parts<%s> rows %zu bias %d, %s, %s", table.isa, type_name<T>(), rows, with_bias,
                  name_of(data), name_of(place));
  const std::vector<T> values = draw<T>(random, rows * lanes, data), offsets = draw<T>(random, rows, data);
  Placed<T> part(rows, lanes, {lanes}, place, values);
  Row<T> bias(place, offsets), y(place, rows);
  table.products<T>().sum_parts(rows, part.data(), with_bias ? bias.data() : nullptr, y.data());
  for (size_t j = 0; j < rows; ++j) {
    Wide<T> exact = with_bias ? offsets[j] : T(0), terms = std::abs(exact);
    for (size_t p = 0; p < lanes; ++p) {
      exact += values[j * lanes + p];
      terms += std::abs(Wide<T>(values[j * lanes + p]));
    }
    if (data == Data::kIntegers || !std::isfinite(exact))
      check::expect(equal(y(0, j), T(exact)), "row %zu is %g, wanted %g", j, double(y(0, j)), double(exact));
    else
      check::expect(std::abs(y(0, j) - exact) <= gamma<T>(lanes) * terms, "row %zu is %.9g, wanted %.9g", j,
                    double(y(0, j)), double(exact));
  }
  check::expect(y.gaps_intact(), "wrote outside y");
  check::expect(part.untouched(values) && bias.untouched(offsets), "wrote to an input");
}

template <class T>
void test_sum_parts(const KernelTable& table) {
  Random random(6);
  for (size_t rows = 0; rows <= check::kFewestShapes; ++rows) {
    if (!check::count_shape(std::string("sum_parts of ") + type_name<T>())) continue;
    for (Data data : kAllData)
      for (Place place : kPlaces)
        for (bool with_bias : {false, true}) run_sum_parts<T>(table, random, rows, with_bias, data, place);
  }
}

template <class T>
void run_add_dots(const KernelTable& table, Random& random, size_t m, size_t rows, size_t depth, size_t gap,
                  Data data, Place place) {
  check::Case one("%s add_dots<%s> m %zu rows %zu depth %zu strides + %zu, %s, %s", table.isa, type_name<T>(),
                  m, rows, depth, gap, name_of(data), name_of(place));
  const std::vector<T> a0 = draw<T>(random, rows * depth, data), z0 = draw<T>(random, m * depth, data),
                       y0 = draw<T>(random, m * rows, data);
  Row<T> a(place, a0);
  Placed<T> z(m, depth, {depth + gap}, place, z0), y(m, rows, {rows + gap}, place, y0);
  table.small<T>().add_dots(m, rows, depth, a.data(), z.data(), depth + gap, y.data(), rows + gap);
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < rows; ++j) {
      Wide<T> exact = y0[i * rows + j], terms = std::abs(exact);
      for (size_t k = 0; k < depth; ++k) {
        const Wide<T> term = Wide<T>(z0[i * depth + k]) * a0[j * depth + k];
        exact += term;
        terms += std::abs(term);
      }
      if (data == Data::kIntegers || !std::isfinite(exact))
        check::expect(equal(y(i, j), T(exact)), "element (%zu, %zu) is %g, wanted %g", i, j, double(y(i, j)),
                      double(exact));
      else
        check::expect(
            std::abs(y(i, j) - exact) <=
                gamma<T>(2 * depth + 2) * terms + Wide<T>(2 * depth) * std::numeric_limits<T>::denorm_min(),
            "element (%zu, %zu) is %.9g, wanted %.9g", i, j, double(y(i, j)), double(exact));
    }
  check::expect(y.gaps_intact(), "wrote outside y");
  check::expect(a.untouched(a0) && z.untouched(z0), "wrote to an input");
  for (size_t i = 0; i < m; ++i) {
    std::vector<T> alone(y0.begin() + std::ptrdiff_t(i * rows), y0.begin() + std::ptrdiff_t((i + 1) * rows));
    table.small<T>().add_dots(1, rows, depth, a0.data(), z0.data() + i * depth, depth, alone.data(), rows);
    for (size_t j = 0; j < rows; ++j)
      check::expect(same(alone[j], y(i, j)), "element (%zu, %zu) differs alone", i, j);
  }
}

template <class T>
void test_add_dots(const KernelTable& table) {
  Random random(8);
  for (size_t depth : {0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 64})
    for (size_t m : {1, 2, 3, 8})
      for (size_t rows : {0, 1, 2, 7, 8, 15, 16, 17, 50}) {
        if (!check::count_shape(std::string("add_dots of ") + type_name<T>())) continue;
        for (Data data : kAllData)
          for (Place place : kPlaces)
            run_add_dots<T>(table, random, m, rows, depth, (rows + depth) % 3, data, place);
      }
}

}  // namespace

void test_dots(const KernelTable& table) {
  test_dots_of<float>(table);
  test_dots_of<double>(table);
  test_dots_of<Bf16>(table);
  test_sum_parts<float>(table);
  test_sum_parts<double>(table);
  test_add_dots<float>(table);
  test_add_dots<double>(table);
}
