// lane_tile and outer_tile: c (m, n) = [c +] a (m, depth) b (depth, n), held against sums in a wider type
// and, where the instruction set fuses, against the one order of rounding that the contract allows.
#include <cstring>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::KernelTable;
using nplora::kernels::kPanelColumns;
using nplora::kernels::Panels;
using nplora::kernels::Products;
using nplora::kernels::Strided;

namespace {

// One product: operands, row-major, and what a kernel may make of them.
template <class T>
struct Product {
  size_t m, n, depth;
  bool accumulate;
  std::vector<T> a, b, c;
  std::vector<T> in_order;                // one rounding a step if fused, else two
  std::vector<Wide<T>> exact, magnitude;  // the sum, and the sum of the absolute values of its terms

  Product(Random& random, size_t m, size_t n, size_t depth, bool accumulate, Data data, bool fused)
      : m(m),
        n(n),
        depth(depth),
        accumulate(accumulate),
        a(draw<T>(random, m * depth, data)),
        b(draw<T>(random, depth * n, data)),
        c(draw<T>(random, m * n, data)),
        in_order(m * n),
        exact(m * n),
        magnitude(m * n) {
    for (size_t i = 0; i < m; ++i)
      for (size_t j = 0; j < n; ++j) {
        T sum = accumulate ? c[i * n + j] : T(0);
        Wide<T> wide = sum, terms = std::abs(sum);
        for (size_t s = 0; s < depth; ++s) {
          const T x = a[i * depth + s], y = b[s * n + j];
          sum = fused ? std::fma(x, y, sum) : x * y + sum;
          const Wide<T> term = Wide<T>(x) * Wide<T>(y);
          wide += term;
          terms += std::abs(term);
        }
        in_order[i * n + j] = sum;
        exact[i * n + j] = wide;
        magnitude[i * n + j] = terms;
      }
  }

  // got (m, n) is what the kernel wrote.
  void judge(const std::vector<T>& got, Data data, bool fused) const {
    const size_t roundings = fused ? depth : 2 * depth;
    const Wide<T> bound = gamma<T>(roundings), smallest = std::numeric_limits<T>::denorm_min();
    for (size_t i = 0; i < m * n; ++i) {
      if (fused || data == Data::kIntegers || data == Data::kSpecial)
        check::expect(same(got[i], in_order[i]), "element (%zu, %zu) is %.9g, wanted exactly %.9g", i / n,
                      i % n, double(got[i]), double(in_order[i]));
      if (data == Data::kSpecial) continue;
      // A product below the smallest normal number loses at most half of the smallest subnormal at each
      // rounding.
      const Wide<T> limit = bound * magnitude[i] + Wide<T>(roundings) * smallest;
      check::expect(std::abs(Wide<T>(got[i]) - exact[i]) <= limit,
                    "element (%zu, %zu) is %.17g, wanted %.17Lg within %.3Lg", i / n, i % n, double(got[i]),
                    static_cast<long double>(exact[i]), static_cast<long double>(limit));
    }
  }
};

// 0 ... 65 (each rank up to 64, each remainder of a panel), the edges of further panels, and one long sum.
std::vector<size_t> depths() {
  std::vector<size_t> all;
  for (size_t depth = 0; depth <= 65; ++depth) all.push_back(depth);
  for (size_t depth : {95, 96, 97, 143, 144, 145, 625}) all.push_back(depth);
  return all;
}

// The ways in which w (rows, depth) is stored: panels dense, panels apart, row-major with a gap, row-major
// dense.
Layout weight_layout(size_t kind, size_t rows, size_t depth) {
  switch (kind % 4) {
    case 0:
      return {kPanelColumns, 1, kPanelColumns, std::max<size_t>(1, rows) * kPanelColumns};
    case 1:
      return {kPanelColumns, 1, kPanelColumns, (rows + 2) * kPanelColumns + 5};
    case 2:
      return {depth + 3, 1, kPanelColumns, kPanelColumns};
    default:
      return {std::max<size_t>(1, depth), 1, kPanelColumns, kPanelColumns};
  }
}

template <class T>
void run_lane_tile(const KernelTable& table, const Product<T>& p, Data data, Layout layout, Place place) {
  check::Case one(
      "%s lane_tile<%s> lanes %zu rows %zu depth %zu row_stride %zu panel_stride %zu accumulate %d, %s, %s",
      table.isa, type_name<T>(), p.n, p.m, p.depth, layout.row_stride, layout.panel_stride, p.accumulate,
      name_of(data), name_of(place));
  Placed<T> w(p.m, p.depth, layout, place, p.a), xt(p.depth, p.n, {p.n}, place, p.b),
      yt(p.m, p.n, {p.n}, place);
  if (p.accumulate)
    for (size_t i = 0; i < p.m * p.n; ++i) yt.data()[i] = p.c[i];
  table.products<T>().lane_tile(p.n, p.m, p.depth,
                                Panels<T>{w.data(), layout.row_stride, layout.panel_stride}, xt.data(),
                                yt.data(), p.accumulate);
  p.judge(yt.values(), data, fuses(table));
  check::expect(yt.gaps_intact(), "wrote outside yt");
  check::expect(w.untouched(p.a) && xt.untouched(p.b), "wrote to an input");
}

template <class T>
void test_lane_tile(const KernelTable& table) {
  const Products<T>& k = table.products<T>();
  const char* kernel = is_float<T> ? "lane_tile<float>" : "lane_tile<double>";
  Random random(1);
  size_t kind = 0;
  for (size_t lanes : {k.lanes / 2, k.lanes})
    for (size_t rows : {size_t{0}, size_t{1}, size_t{2}, size_t{3}, size_t{5}, k.tile_rows - 1, k.tile_rows,
                        k.tile_rows + 1, 2 * k.tile_rows + 1})
      for (size_t depth : depths()) {
        check::count_shape(kernel);
        ++kind;
        for (Data data : kAllData) {
          const Product<T> p(random, rows, lanes, depth, kind % 3 == 0, data, fuses(table));
          for (Place place : kPlaces) run_lane_tile(table, p, data, weight_layout(kind, rows, depth), place);
        }
      }
}

// The ways in which a (m, depth) is stored: rows with a gap, transposed with a gap, dense, both strides odd.
Layout outer_layout(size_t kind, size_t m, size_t depth) {
  switch (kind % 4) {
    case 0:
      return {depth + 5, 1};
    case 1:
      return {1, m + 3};
    case 2:
      return {std::max<size_t>(1, depth), 1};
    default:
      return {3 * depth + 1, 3};
  }
}

template <class T>
void run_outer_tile(const KernelTable& table, const Product<T>& p, Data data, size_t kind, Place place) {
  const Layout a_layout = outer_layout(kind, p.m, p.depth);
  const size_t w_stride = p.n + kind % 3 * 7, c_stride = p.n + kind % 5;
  check::Case one(
      "%s outer_tile<%s> m %zu n %zu depth %zu a strides %zu %zu w_stride %zu c_stride %zu accumulate %d, "
      "%s, %s",
      table.isa, type_name<T>(), p.m, p.n, p.depth, a_layout.row_stride, a_layout.step, w_stride, c_stride,
      p.accumulate, name_of(data), name_of(place));
  Placed<T> a(p.m, p.depth, a_layout, place, p.a), w(p.depth, p.n, {w_stride}, place, p.b);
  Placed<T> c(p.m, p.n, {c_stride}, place);
  if (p.accumulate)
    for (size_t i = 0; i < p.m; ++i)
      for (size_t j = 0; j < p.n; ++j) c.data()[i * c_stride + j] = p.c[i * p.n + j];
  table.products<T>().outer_tile(p.m, p.n, p.depth, Strided<T>{a.data(), a_layout.row_stride, a_layout.step},
                                 w.data(), w_stride, c.data(), c_stride, p.accumulate);
  p.judge(c.values(), data, fuses(table));
  check::expect(c.gaps_intact(), "wrote outside c");
  check::expect(a.untouched(p.a) && w.untouched(p.b), "wrote to an input");
}

template <class T>
void test_outer_tile(const KernelTable& table) {
  const Products<T>& k = table.products<T>();
  const char* kernel = is_float<T> ? "outer_tile<float>" : "outer_tile<double>";
  const std::vector<size_t> all_depths = depths();
  Random random(2);
  size_t kind = 0;
  for (size_t n = 0; n <= kPanelColumns; ++n)
    for (size_t m : {size_t{0}, size_t{1}, size_t{2}, size_t{3}, size_t{5}, k.tile_tokens - 1, k.tile_tokens,
                     k.tile_tokens + 1, 2 * k.tile_tokens + 1}) {
      // Two of the depths for each (m, n): 31 is coprime to their number, so that all of them come round.
      for (size_t i = 0; i < 2; ++i) {
        check::count_shape(kernel);
        const size_t depth = all_depths[++kind * 31 % all_depths.size()];
        for (Data data : kAllData) {
          const Product<T> p(random, m, n, depth, kind % 3 == 0, data, fuses(table));
          for (Place place : kPlaces) run_outer_tile(table, p, data, kind, place);
        }
      }
    }
}

// ---- the same element has the same bits, whatever the tiles around it ----

// Cuts n into one to four pieces.
std::vector<size_t> cuts(Random& random, size_t n) {
  std::vector<size_t> at = {0, n};
  for (size_t i = random.below(4); i > 0; --i) at.push_back(random.below(n + 1));
  std::sort(at.begin(), at.end());
  return at;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Both kernels compute c (m, n) = a (m, depth) b (depth, n) whole, then in random tiles; all results agree.
template <class T>
void test_blocking(const KernelTable& table) {
  const Products<T>& k = table.products<T>();
  Random random(3);
  for (size_t trial = 0; trial < check::kFewestShapes; ++trial) {
    const size_t n = k.lanes, m = 1 + random.below(30), depth = 1 + random.below(300);
    check::Case one("%s blocking<%s> m %zu depth %zu trial %zu", table.isa, type_name<T>(), m, depth, trial);
    check::count_shape(is_float<T> ? "blocking<float>" : "blocking<double>");
    const std::vector<T> a = draw<T>(random, m * depth, Data::kUniform),
                         b = draw<T>(random, depth * n, Data::kUniform);
    std::vector<T> whole(m * n), outer(m * n), lane(m * n);
    k.lane_tile(n, m, depth, {a.data(), depth, kPanelColumns}, b.data(), whole.data(), false);

    const std::vector<size_t> rows = cuts(random, m), columns = cuts(random, n), steps = cuts(random, depth);
    for (size_t s = 0; s + 1 < steps.size(); ++s)
      for (size_t i = 0; i + 1 < rows.size(); ++i) {
        const T* tile = a.data() + rows[i] * depth + steps[s];
        k.lane_tile(n, rows[i + 1] - rows[i], steps[s + 1] - steps[s], {tile, depth, kPanelColumns},
                    b.data() + steps[s] * n, lane.data() + rows[i] * n, s > 0);
        for (size_t j = 0; j + 1 < columns.size(); ++j)
          k.outer_tile(rows[i + 1] - rows[i], columns[j + 1] - columns[j], steps[s + 1] - steps[s],
                       {tile, depth, 1}, b.data() + steps[s] * n + columns[j], n,
                       outer.data() + rows[i] * n + columns[j], n, s > 0);
      }
    check::expect(same_bits(lane, whole), "lane_tile in tiles differs from lane_tile whole");
    check::expect(same_bits(outer, whole), "outer_tile in tiles differs from lane_tile whole");

    const size_t half = n / 2;  // one vector of tokens at a time
    std::vector<T> part(depth * half), narrow(m * half);
    for (size_t first : {size_t{0}, half}) {
      for (size_t s = 0; s < depth; ++s) std::copy_n(b.data() + s * n + first, half, part.data() + s * half);
      k.lane_tile(half, m, depth, {a.data(), depth, kPanelColumns}, part.data(), narrow.data(), false);
      bool agree = true;
      for (size_t i = 0; i < m; ++i)
        agree &= std::memcmp(narrow.data() + i * half, whole.data() + i * n + first, half * sizeof(T)) == 0;
      check::expect(agree, "lane_tile on %zu lanes differs from lane_tile on %zu", half, n);
    }
  }
}

}  // namespace

void test_products(const KernelTable& table) {
  test_lane_tile<float>(table);
  test_lane_tile<double>(table);
  test_outer_tile<float>(table);
  test_outer_tile<double>(table);
  test_blocking<float>(table);
  test_blocking<double>(table);
}
