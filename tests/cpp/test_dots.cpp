// dots, interleave and sum_parts: the products of small batches, with interleaved tokens in the lanes.
#include <bit>
#include <string>
#include <type_traits>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::Bf16;
using nplora::kernels::Bf16Pair;
using nplora::kernels::interleave_factor;
using nplora::kernels::KernelTable;
using nplora::kernels::kMostSmallBatch;
using nplora::kernels::kPanelColumns;
using nplora::kernels::kPanelDepth;
using nplora::kernels::kValuesPerElement;
using nplora::kernels::Operand;
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
  if (std::is_same_v<W, Bf16>) return "bfloat16";
  return std::is_same_v<W, Bf16Pair> ? "pairs of bfloat16" : type_name<Sum<W>>();
}

template <class T>
size_t vector_lanes(const KernelTable& table) {
  return table.products<T>().lanes / 2;
}

template <class T>
size_t small_batch(const KernelTable& table) {
  return std::min(kMostSmallBatch, vector_lanes<T>(table));
}

// Values that W stores without rounding.
template <class W>
std::vector<Sum<W>> draw_exact(Random& random, size_t n, Data data) {
  std::vector<Sum<W>> values = draw<Sum<W>>(random, n, data);
  if constexpr (sizeof(W) == 2 || kValuesPerElement<W> == 2)
    for (float& value : values) value = std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xFFFF0000u);
  return values;
}

template <class E>
E as_element(const Sum<E>* steps) {
  if constexpr (std::is_same_v<E, Bf16>)
    return Bf16(std::bit_cast<uint32_t>(steps[0]) >> 16);
  else if constexpr (kValuesPerElement<E> == 2)
    return Bf16Pair(std::bit_cast<uint32_t>(steps[0]) >> 16 |
                    (std::bit_cast<uint32_t>(steps[1]) & 0xFFFF0000u));
  else
    return steps[0];
}

template <class E>
std::vector<E> as_elements(const std::vector<Sum<E>>& values) {
  std::vector<E> out;
  for (size_t i = 0; i < values.size(); i += kValuesPerElement<E>) out.push_back(as_element<E>(&values[i]));
  return out;
}

// Lane (t * factor + i) of row j is the sum of w[j][k] x[t][k] over the k with k % factor == i. w is in
// panels if `kind` is odd, else row-major. depth counts elements.
template <class W>
void run_dots(const KernelTable& table, Random& random, size_t m, size_t rows, size_t depth, size_t kind,
              Data data, Place place) {
  using T = Sum<W>;
  using X = Operand<W>;
  constexpr size_t kPanel = kPanelDepth<W>, kPerElement = kValuesPerElement<W>;
  const size_t lanes = vector_lanes<T>(table);
  size_t factor = interleave_factor(m, lanes);
  if (kPanel % factor != 0) factor /= 2;  // pairs need a factor of at most 8
  const size_t tokens = lanes / factor, groups = (depth + factor - 1) / factor, steps = depth * kPerElement;
  const bool accumulate = kind % 7 < 3, panels = kind % 2 && depth % kPanel == 0;
  check::Case one("%s dots of %s, m %zu interleave %zu rows %zu depth %zu %s accumulate %d, %s, %s",
                  table.isa, element<W>(), m, factor, rows, depth, panels ? "in panels" : "row-major",
                  accumulate, name_of(data), name_of(place));
  const std::vector<T> w0 = draw_exact<W>(random, rows * steps, data),
                       x0 = draw_exact<X>(random, m * steps, data),
                       part0 = draw<T>(random, rows * lanes, data);
  const std::vector<W> w_elements = as_elements<W>(w0);
  const std::vector<X> x_elements = as_elements<X>(x0);

  const size_t gap = panels ? 0 : kind % 3 * 5;
  std::vector<W> in_memory(rows * depth);
  for (size_t j = 0; j < rows; ++j)
    for (size_t k = 0; k < depth; ++k)
      in_memory[panels ? (k / kPanel * rows + j) * kPanel + k % kPanel : j * depth + k] =
          w_elements[j * depth + k];
  const size_t w_rows = panels ? 1 : rows, w_cols = panels ? rows * depth : depth;
  Placed<W> w(w_rows, w_cols, {w_cols + gap}, place, in_memory);
  std::vector<X> by_token(groups * lanes, X(0));
  for (size_t t = 0; t < m; ++t)
    for (size_t k = 0; k < depth; ++k)
      by_token[k / factor * lanes + t * factor + k % factor] = x_elements[t * depth + k];
  Row<X> xs(place, by_token);
  Placed<T> part(rows, lanes, {lanes}, place);
  if (accumulate) std::copy(part0.begin(), part0.end(), part.data());
  table.small<W>().dots(
      factor, rows, depth,
      panels ? Panels<W>{w.data(), kPanel, rows * kPanel} : Panels<W>{w.data(), depth + gap, kPanel},
      xs.data(), part.data(), accumulate);

  // An instruction for pairs treats subnormals as zero. Four errors are allowed for each pair. vdpbf16ps
  // makes two roundings. BFDOT makes two roundings to odd, with an error of two units each, and flushes two
  // products and two sums.
  const bool flushes = kPerElement == 2 && pairs_of(table) != Pairs::kAsFloats;
  const auto seen = [flushes](T v) {
    return flushes && std::abs(v) < std::numeric_limits<T>::min() ? T(0) : v;
  };
  const size_t roundings = 2 * groups * kPerElement + 4;
  const Wide<T> loss = flushes ? std::numeric_limits<T>::min() : std::numeric_limits<T>::denorm_min();
  for (size_t j = 0; j < rows; ++j)
    for (size_t lane = 0; lane < m * factor && lane < tokens * factor; ++lane) {
      Wide<T> exact = accumulate ? part0[j * lanes + lane] : T(0), terms = std::abs(exact);
      for (size_t k = lane % factor; k < depth; k += factor)
        for (size_t i = k * kPerElement; i < (k + 1) * kPerElement; ++i) {
          const Wide<T> term = Wide<T>(seen(w0[j * steps + i])) * seen(x0[lane / factor * steps + i]);
          exact += term;
          terms += std::abs(term);
        }
      const T got = part(j, lane);
      if (data == Data::kIntegers || !std::isfinite(exact))
        check::expect(equal(got, T(exact)), "lane %zu of row %zu is %.9g, wanted exactly %.9g", lane, j,
                      double(got), double(exact));
      else
        check::expect(std::abs(got - exact) <= gamma<T>(roundings) * terms + Wide<T>(roundings) * loss,
                      "lane %zu of row %zu is %.17g, wanted %.17Lg", lane, j, double(got),
                      static_cast<long double>(exact));
    }
  check::expect(part.gaps_intact(), "wrote outside part");
  check::expect(w.untouched(in_memory) && xs.untouched(by_token), "wrote to an input");
  if (depth % kPanel != 0) return;

  std::vector<W> other(rows * depth + 1);  // at least one, so that there is an address
  for (size_t j = 0; j < rows; ++j)
    for (size_t k = 0; k < depth; ++k)
      other[panels ? j * depth + k : (k / kPanel * rows + j) * kPanel + k % kPanel] =
          w_elements[j * depth + k];
  std::vector<T> again = accumulate ? part0 : std::vector<T>(rows * lanes);
  table.small<W>().dots(
      factor, rows, depth,
      panels ? Panels<W>{other.data(), depth, kPanel} : Panels<W>{other.data(), kPanel, rows * kPanel},
      xs.data(), again.data(), accumulate);
  for (size_t i = 0; i < again.size(); ++i)
    check::expect(same(again[i], part(i / lanes, i % lanes)),
                  "lane %zu of row %zu differs in the other layout", i % lanes, i / lanes);
}

template <class W>
void test_dots_of(const KernelTable& table) {
  Random random(5);
  size_t kind = 0;
  const std::string kernel = std::string("dots of ") + element<W>();
  for (size_t depth : {0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 96, 101, 144})
    for (size_t m = 1; m <= small_batch<Sum<W>>(table); ++m)
      for (size_t rows : {0, 1, 2, 3, 4, 5, 8, 11, 131}) {
        if (rows > 11 && depth != 96) continue;  // enough that a panel is processed in two parts
        ++kind;
        for (size_t again = 0; again < kMostSmallBatch / small_batch<Sum<W>>(table); ++again) {
          if (!check::count_shape(kernel)) continue;
          for (Data data : kAllData)
            for (Place place : kPlaces) run_dots<W>(table, random, m, rows, depth, kind + again, data, place);
        }
      }
}

template <class T>
void run_interleave(const KernelTable& table, Random& random, size_t m, size_t cols, size_t gap,
                    Place place) {
  const size_t lanes = vector_lanes<T>(table), factor = interleave_factor(m, lanes),
               groups = (cols + factor - 1) / factor;
  check::Case one("%s interleave<%s> m %zu interleave %zu cols %zu stride %zu, %s", table.isa, type_name<T>(),
                  m, factor, cols, cols + gap, name_of(place));
  const std::vector<T> x0 = draw<T>(random, m * cols, Data::kSpecial);
  Placed<T> x(m, cols, {cols + gap}, place, x0), out(groups, lanes, {lanes}, place);
  table.products<T>().interleave(m, factor, cols, x.data(), cols + gap, out.data());
  for (size_t g = 0; g < groups; ++g)
    for (size_t lane = 0; lane < lanes; ++lane) {
      const size_t t = lane / factor, c = g * factor + lane % factor;
      const T want = t < m && c < cols ? x0[t * cols + c] : T(0);
      check::expect(same(out(g, lane), want), "lane %zu of group %zu is wrong", lane, g);
    }
  check::expect(out.gaps_intact(), "wrote outside out");
  check::expect(x.untouched(x0), "wrote to x");
}

template <class T>
void test_interleave(const KernelTable& table) {
  Random random(7);
  const size_t most = small_batch<T>(table);
  for (size_t m = 1; m <= most; ++m)
    for (size_t cols = 0; cols <= 2 * check::kFewestShapes / most / most + 70; ++cols)
      for (size_t gap = 0; gap < kMostSmallBatch / most; ++gap) {
        if (!check::count_shape(std::string("interleave of ") + type_name<T>())) continue;
        for (Place place : kPlaces) run_interleave<T>(table, random, m, cols, (cols + m) % 3 + gap, place);
      }
}

template <class T>
void run_sum_parts(const KernelTable& table, Random& random, size_t m, size_t rows, size_t gap,
                   bool with_bias, Data data, Place place) {
  const size_t lanes = vector_lanes<T>(table), factor = interleave_factor(m, lanes);
  check::Case one("%s sum_parts<%s> m %zu interleave %zu rows %zu stride %zu bias %d, %s, %s", table.isa,
                  type_name<T>(), m, factor, rows, rows + gap, with_bias, name_of(data), name_of(place));
  const std::vector<T> values = draw<T>(random, rows * lanes, data), offsets = draw<T>(random, rows, data);
  Placed<T> part(rows, lanes, {lanes}, place, values), y(m, rows, {rows + gap}, place);
  Row<T> bias(place, offsets);
  table.products<T>().sum_parts(m, factor, rows, part.data(), with_bias ? bias.data() : nullptr, y.data(),
                                rows + gap);
  const Wide<T> bound = gamma<T>(factor);
  for (size_t i = 0; i < m; ++i)
    for (size_t j = 0; j < rows; ++j) {
      Wide<T> exact = with_bias ? offsets[j] : T(0), terms = std::abs(exact);
      for (size_t p = 0; p < factor; ++p) {
        exact += values[j * lanes + i * factor + p];
        terms += std::abs(Wide<T>(values[j * lanes + i * factor + p]));
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
  const size_t most = small_batch<T>(table);
  for (size_t m = 1; m <= most; ++m)
    for (size_t rows = 0; rows <= check::kFewestShapes / most; ++rows) {
      if (!check::count_shape(std::string("sum_parts of ") + type_name<T>())) continue;
      for (Data data : kAllData)
        for (Place place : kPlaces)
          for (bool with_bias : {false, true})
            run_sum_parts<T>(table, random, m, rows, (rows + m) % 3, with_bias, data, place);
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
  table.products<T>().add_dots(m, rows, depth, a.data(), z.data(), depth + gap, y.data(), rows + gap);
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
  test_dots_of<Bf16Pair>(table);
  test_interleave<float>(table);
  test_interleave<double>(table);
  test_sum_parts<float>(table);
  test_sum_parts<double>(table);
  test_add_dots<float>(table);
  test_add_dots<double>(table);
}
