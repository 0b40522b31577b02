// to_lanes, from_lanes and transpose, to and from the SIMD lanes: exact to the bit.
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::KernelTable;

namespace {

// Every width up to more than two vectors, the edges of panels, and one long row.
std::vector<size_t> widths() {
  std::vector<size_t> all;
  for (size_t width = 0; width <= 65; ++width) all.push_back(width);
  for (size_t width : {95, 96, 97, 625}) all.push_back(width);
  return all;
}

template <class T>
void run_to_lanes(const KernelTable& table, Random& random, size_t lanes, size_t rows, size_t cols,
                  size_t gap, Place place) {
  check::Case one("%s to_lanes<%s> lanes %zu rows %zu cols %zu stride %zu, %s", table.isa, type_name<T>(),
                  lanes, rows, cols, cols + gap, name_of(place));
  const std::vector<T> values = draw<T>(random, rows * cols, Data::kSpecial);
  Placed<T> x(rows, cols, {cols + gap}, place, values), xt(cols, lanes, {lanes}, place);
  table.products<T>().to_lanes(lanes, rows, cols, x.data(), cols + gap, xt.data());
  for (size_t c = 0; c < cols; ++c)
    for (size_t lane = 0; lane < lanes; ++lane)
      check::expect(same(xt(c, lane), lane < rows ? values[lane * cols + c] : T(0)),
                    "lane %zu of column %zu is %g", lane, c, double(xt(c, lane)));
  check::expect(xt.gaps_intact(), "wrote outside xt");
  check::expect(x.untouched(values), "wrote to x");
}

template <class T>
void run_from_lanes(const KernelTable& table, Random& random, size_t lanes, size_t rows, size_t cols,
                    size_t gap, bool with_bias, Place place) {
  check::Case one("%s from_lanes<%s> lanes %zu rows %zu cols %zu stride %zu bias %d, %s", table.isa,
                  type_name<T>(), lanes, rows, cols, cols + gap, with_bias, name_of(place));
  const std::vector<T> values = draw<T>(random, cols * lanes, Data::kSpecial);
  const std::vector<T> offsets = draw<T>(random, cols, Data::kUniform);
  Placed<T> yt(cols, lanes, {lanes}, place, values), bias(1, cols, {cols}, place, offsets);
  Placed<T> y(rows, cols, {cols + gap}, place);
  table.products<T>().from_lanes(lanes, rows, cols, yt.data(), with_bias ? bias.data() : nullptr, y.data(),
                                 cols + gap);
  for (size_t i = 0; i < rows; ++i)
    for (size_t c = 0; c < cols; ++c) {
      const T value = values[c * lanes + i];
      check::expect(same(y(i, c), with_bias ? T(value + offsets[c]) : value), "element (%zu, %zu) is %g", i,
                    c, double(y(i, c)));
    }
  check::expect(y.gaps_intact(), "wrote outside y");
  check::expect(yt.untouched(values) && bias.untouched(offsets), "wrote to an input");
}

template <class T>
void run_transpose(const KernelTable& table, Random& random, size_t rows, size_t cols, size_t gap,
                   Place place) {
  check::Case one("%s transpose<%s> rows %zu cols %zu gap %zu, %s", table.isa, type_name<T>(), rows, cols,
                  gap, name_of(place));
  const std::vector<T> values = draw<T>(random, rows * cols, Data::kSpecial);
  Placed<T> x(rows, cols, {cols + gap}, place, values), xt(cols, rows, {rows + 2 * gap}, place);
  table.products<T>().transpose(rows, cols, x.data(), cols + gap, xt.data(), rows + 2 * gap);
  for (size_t i = 0; i < rows; ++i)
    for (size_t j = 0; j < cols; ++j)
      check::expect(same(xt(j, i), values[i * cols + j]), "element (%zu, %zu) is wrong", j, i);
  check::expect(xt.gaps_intact(), "wrote outside xt");
  check::expect(x.untouched(values), "wrote to x");
}

template <class T>
void test_transposes(const KernelTable& table) {
  const size_t most = table.products<T>().lanes;
  Random random(4);
  for (size_t lanes : {most / 2, most})
    for (size_t rows = 0; rows <= lanes; ++rows)
      for (size_t cols : widths()) {
        if (!check::count_shape(is_float<T> ? "to_lanes<float>" : "to_lanes<double>") |
            !check::count_shape(is_float<T> ? "from_lanes<float>" : "from_lanes<double>"))
          continue;
        for (Place place : kPlaces) {
          run_to_lanes<T>(table, random, lanes, rows, cols, (rows + cols) % 3, place);
          for (bool with_bias : {false, true})
            run_from_lanes<T>(table, random, lanes, rows, cols, (rows + cols) % 3, with_bias, place);
        }
      }
  for (size_t rows : {0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64})
    for (size_t cols = 0; cols <= 48; ++cols) {
      if (!check::count_shape(is_float<T> ? "transpose<float>" : "transpose<double>")) continue;
      for (Place place : kPlaces) run_transpose<T>(table, random, rows, cols, (rows + cols) % 3, place);
    }
}

}  // namespace

void test_lanes(const KernelTable& table) {
  test_transposes<float>(table);
  test_transposes<double>(table);
}
