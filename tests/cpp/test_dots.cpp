// dot_panel and sum_parts: the products of small batches, one vector of partial sums for each output.
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::KernelTable;
using nplora::kernels::kPanelColumns;

namespace {

// Equal numbers, or both NaN: the lanes behind the last column may add a zero, which turns -0 into 0.
template <class T>
bool equal(T a, T b) {
  return a == b || same(a, b);
}

// Lane l of part[t][j] is the sum over the columns c with c % lanes == l of w[j][c] * x[t][c], in order.
template <class T>
void run_dot_panel(const KernelTable& table, Random& random, size_t m, size_t rows, size_t width, size_t kind,
                   Data data, Place place) {
  const size_t lanes = table.products<T>().lanes / 2, w_stride = width + kind % 3 * 5,
               x_stride = width + kind % 4 * 3;
  const bool accumulate = kind % 7 < 3, fused = fuses(table);
  check::Case one("%s dot_panel<%s> m %zu rows %zu width %zu w_stride %zu x_stride %zu accumulate %d, %s, %s",
                  table.isa, type_name<T>(), m, rows, width, w_stride, x_stride, accumulate, name_of(data),
                  name_of(place));
  const std::vector<T> w0 = draw<T>(random, rows * width, data), x0 = draw<T>(random, m * width, data);
  const std::vector<T> part0 = draw<T>(random, m * rows * lanes, data);
  Placed<T> w(rows, width, {w_stride}, place, w0), x(m, width, {x_stride}, place, x0);
  Placed<T> part(m * rows, lanes, {lanes}, place);
  if (accumulate) std::copy(part0.begin(), part0.end(), part.data());
  table.products<T>().dot_panel(m, rows, width, w.data(), w_stride, x.data(), x_stride, part.data(),
                                accumulate);

  const size_t roundings = (fused ? 1 : 2) * ((width + lanes - 1) / lanes);
  const Wide<T> bound = gamma<T>(roundings), smallest = std::numeric_limits<T>::denorm_min();
  for (size_t output = 0; output < m * rows; ++output)
    for (size_t lane = 0; lane < lanes; ++lane) {
      T in_order = accumulate ? part0[output * lanes + lane] : T(0);
      Wide<T> exact = in_order, terms = std::abs(in_order);
      for (size_t c = lane; c < width; c += lanes) {
        const T a = w0[output % rows * width + c], b = x0[output / rows * width + c];
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
  check::expect(w.untouched(w0) && x.untouched(x0), "wrote to an input");
}

template <class T>
void test_dot_panel(const KernelTable& table) {
  Random random(5);
  size_t kind = 0;
  for (size_t width = 0; width <= kPanelColumns; ++width)
    for (size_t m : {0, 1, 2, 3, 4, 5, 9})
      for (size_t rows : {0, 1, 3, 4, 5, 8, 11}) {
        check::count_shape(is_float<T> ? "dot_panel<float>" : "dot_panel<double>");
        ++kind;
        for (Data data : kAllData)
          for (Place place : kPlaces) run_dot_panel<T>(table, random, m, rows, width, kind, data, place);
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
  test_dot_panel<float>(table);
  test_dot_panel<double>(table);
  test_sum_parts<float>(table);
  test_sum_parts<double>(table);
}
