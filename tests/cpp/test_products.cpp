// gemm_tokens_in_lanes, gemm_outputs_in_lanes and merge: c (m, n) = [c +] a (m, depth) b (depth, n). Results
// are compared with sums in a wider type. If the contract allows only one order of rounding, they are also
// compared with that.
#include <cstring>
#include <string>

#include "bfdot.h"
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::Bf16;
using nplora::kernels::Bf16Pair;
using nplora::kernels::Fetch;
using nplora::kernels::KernelTable;
using nplora::kernels::kPanelColumns;
using nplora::kernels::kValuesPerElement;
using nplora::kernels::Panels;
using nplora::kernels::Strided;
using nplora::kernels::Sum;
using nplora::kernels::Tiles;

namespace {

template <class E>
constexpr const char* element_name() {
  return kValuesPerElement<E> == 2 ? "bfloat16" : type_name<Sum<E>>();
}

template <class E>
Pairs pairs(const KernelTable& table) {
  return kValuesPerElement<E> == 2 ? pairs_of(table) : Pairs::kAsFloats;
}

// The element that holds these steps of the depth, exactly: values for pairs are already bfloat16.
template <class E>
E element(Sum<E> value, [[maybe_unused]] Sum<E> next) {
  if constexpr (kValuesPerElement<E> == 1)
    return value;
  else
    return Bf16Pair(std::bit_cast<uint32_t>(value) >> 16 | (std::bit_cast<uint32_t>(next) & 0xFFFF0000u));
}

template <class E>
std::vector<Sum<E>> draw_steps(Random& random, size_t n, Data data) {
  std::vector<Sum<E>> values = draw<Sum<E>>(random, n, data);
  if constexpr (kValuesPerElement<E> == 2)
    for (float& value : values) {
      // Replaces the smallest subnormal of float by that of bfloat16; any other value keeps its upper half.
      if (value == std::numeric_limits<float>::denorm_min()) value = 0x1p-133f;
      value = std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0xFFFF0000u);
    }
  return values;
}

// One product: its row-major operands, and the results that a kernel may give.
template <class E>
struct Product {
  using T = Sum<E>;
  static constexpr size_t kPerElement = kValuesPerElement<E>;

  size_t m, n, depth;  // depth in elements
  bool accumulate;
  std::vector<E> a, b;
  std::vector<T> c;
  std::vector<T> in_order;                // the result if every step (or BFDOT) is rounded in order
  std::vector<Wide<T>> exact, magnitude;  // the sum, and the sum of the absolute values of its terms

  Product(Random& random, size_t m, size_t n, size_t depth, bool accumulate, Data data,
          const KernelTable& table)
      : m(m),
        n(n),
        depth(depth),
        accumulate(accumulate),
        a(m * depth),
        b(depth * n),
        c(draw<T>(random, m * n, data)),
        in_order(m * n),
        exact(m * n),
        magnitude(m * n) {
    const size_t steps = depth * kPerElement;
    const std::vector<T> x = draw_steps<E>(random, m * steps, data),
                         y = draw_steps<E>(random, steps * n, data);
    for (size_t i = 0; i < m; ++i)
      for (size_t s = 0; s < depth; ++s) {
        const T* at = &x[i * steps + s * kPerElement];
        a[i * depth + s] = element<E>(at[0], at[kPerElement - 1]);
      }
    for (size_t s = 0; s < depth; ++s)
      for (size_t j = 0; j < n; ++j) {
        const T* at = &y[s * kPerElement * n + j];
        b[s * n + j] = element<E>(at[0], at[(kPerElement - 1) * n]);
      }
    // A factor as the kernel sees it. If it treats subnormals as zero, then subnormal times infinity is NaN.
    const Pairs how = pairs<E>(table);
    const bool flushed = how != Pairs::kAsFloats, fused = fuses(table);
    const auto seen = [flushed](T value) {
      return flushed && std::abs(value) < std::numeric_limits<T>::min() ? T(0) : value;
    };
    for (size_t i = 0; i < m; ++i)
      for (size_t j = 0; j < n; ++j) {
        T sum = accumulate ? c[i * n + j] : T(0);
        Wide<T> wide = sum, terms = std::abs(sum);
        for (size_t s = 0; s < steps; ++s) {
          const T u = seen(x[i * steps + s]), v = seen(y[s * n + j]);
          if (how != Pairs::kBfdot)
            sum = fused ? std::fma(u, v, sum) : u * v + sum;
          else if (s % 2 == 0)
            sum = bfdot(sum, {float(u), float(x[i * steps + s + 1])}, {float(v), float(y[(s + 1) * n + j])});
          const Wide<T> term = Wide<T>(u) * Wide<T>(v);
          wide += term;
          terms += std::abs(term);
        }
        in_order[i * n + j] = sum;
        exact[i * n + j] = wide;
        magnitude[i * n + j] = terms;
      }
  }

  // Judges got (m, n), the output of the kernel.
  void judge(const std::vector<T>& got, Data data, const KernelTable& table) const {
    const Pairs how = pairs<E>(table);
    const bool flushed = how != Pairs::kAsFloats,
               ordered = fuses(table) && how != Pairs::kVdpbf16ps && how != Pairs::kTiles;
    // A term of BFDOT is rounded with the sum of its pair, and again with every later accumulation. The
    // product itself is not rounded, because it has 16 bits. Rounding to odd errs by less than a unit in the
    // last place, twice as much as rounding to nearest. A tile adds its two sums, and then adds the result to
    // the others.
    const size_t in_turn = (fuses(table) ? 1 : 2) * kPerElement * depth;
    const size_t roundings = how == Pairs::kBfdot   ? 2 * (depth + 1)
                             : how == Pairs::kTiles ? in_turn + 2
                                                    : in_turn;
    // Below the smallest normal number, a rounding loses at most half of the smallest subnormal, or
    // everything if it flushes. BFDOT flushes two products and two sums for each element, and also a
    // subnormal accumulator.
    using Limits = std::numeric_limits<T>;
    const size_t losses = how == Pairs::kBfdot ? 4 * depth + 1 : roundings;
    const Wide<T> loss = Wide<T>(losses) * (flushed ? Limits::min() : Limits::denorm_min());
    for (size_t i = 0; i < m * n; ++i) {
      if (ordered || data == Data::kIntegers || !std::isfinite(exact[i]) ||
          (data == Data::kSpecial && !flushed))
        check::expect(same(got[i], in_order[i]), "element (%zu, %zu) is %.9g, wanted exactly %.9g", i / n,
                      i % n, double(got[i]), double(in_order[i]));
      if (!std::isfinite(exact[i])) continue;
      const Wide<T> limit = gamma<T>(roundings) * magnitude[i] + loss;
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
  for (size_t depth : {71, 72, 73, 95, 96, 97, 143, 144, 145, 625}) all.push_back(depth);
  return all;
}

// The layouts of w (rows, depth): dense panels, separate panels, row-major with a gap, row-major dense.
template <class E>
Layout weight_layout(size_t kind, size_t rows, size_t depth) {
  constexpr size_t kPanel = kPanelColumns / kValuesPerElement<E>;
  switch (kind % 4) {
    case 0:
      return {kPanel, 1, kPanel, std::max<size_t>(1, rows) * kPanel};
    case 1:
      return {kPanel, 1, kPanel, (rows + 2) * kPanel + 5};
    case 2:
      return {depth + 3, 1, kPanel, kPanel};
    default:
      return {std::max<size_t>(1, depth), 1, kPanel, kPanel};
  }
}

template <class E>
void run_gemm_tokens_in_lanes(const KernelTable& table, const Product<E>& p, Data data, Layout layout,
                              Place place) {
  check::Case one(
      "%s gemm_tokens_in_lanes<%s> lanes %zu rows %zu depth %zu row_stride %zu panel_stride %zu accumulate "
      "%d, %s, %s",
      table.isa, element_name<E>(), p.n, p.m, p.depth, layout.row_stride, layout.panel_stride, p.accumulate,
      name_of(data), name_of(place));
  Placed<E> w(p.m, p.depth, layout, place, p.a), xt(p.depth, p.n, {p.n}, place, p.b);
  Placed<Sum<E>> yt(p.m, p.n, {p.n}, place);
  if (p.accumulate) std::copy(p.c.begin(), p.c.end(), yt.data());
  table.tiles<E>().gemm_tokens_in_lanes(p.n, p.m, p.depth,
                                        Panels<E>{w.data(), layout.row_stride, layout.panel_stride},
                                        xt.data(), yt.data(), p.accumulate);
  p.judge(yt.values(), data, table);
  check::expect(yt.gaps_intact(), "wrote outside yt");
  check::expect(w.untouched(p.a) && xt.untouched(p.b), "wrote to an input");
}

template <class E>
void test_gemm_tokens_in_lanes(const KernelTable& table) {
  const Tiles<E>& k = table.tiles<E>();
  const std::string kernel = std::string("gemm_tokens_in_lanes of ") + element_name<E>();
  Random random(1);
  size_t kind = 0;
  for (size_t lanes : {k.lanes / 2, k.lanes})
    for (size_t rows : {size_t{0}, size_t{1}, size_t{2}, size_t{3}, size_t{5}, k.tile_rows - 1, k.tile_rows,
                        k.tile_rows + 1, 2 * k.tile_rows + 1})
      for (size_t depth : depths()) {
        if (!check::count_shape(kernel)) continue;
        ++kind;
        for (Data data : kAllData) {
          const Product<E> p(random, rows, lanes, depth, kind % 7 < 3, data, table);
          for (Place place : kPlaces)
            run_gemm_tokens_in_lanes(table, p, data, weight_layout<E>(kind, rows, depth), place);
        }
      }
}

// The layouts of a (m, depth): rows with a gap, transposed with a gap, dense, both strides odd.
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

template <class E>
void run_gemm_outputs_in_lanes(const KernelTable& table, const Product<E>& p, Data data, size_t kind,
                               Place place) {
  const Layout a_layout = outer_layout(kind, p.m, p.depth);
  const size_t w_stride = p.n + kind % 3 * 7, c_stride = p.n + kind % 5;
  check::Case one(
      "%s gemm_outputs_in_lanes<%s> m %zu n %zu depth %zu a strides %zu %zu w_stride %zu c_stride %zu "
      "accumulate %d, "
      "%s, %s",
      table.isa, element_name<E>(), p.m, p.n, p.depth, a_layout.row_stride, a_layout.step, w_stride, c_stride,
      p.accumulate, name_of(data), name_of(place));
  Placed<E> a(p.m, p.depth, a_layout, place, p.a), w(p.depth, p.n, {w_stride}, place, p.b);
  Placed<Sum<E>> c(p.m, p.n, {c_stride}, place);
  if (p.accumulate)
    for (size_t i = 0; i < p.m; ++i)
      for (size_t j = 0; j < p.n; ++j) c.data()[i * c_stride + j] = p.c[i * p.n + j];
  table.tiles<E>().gemm_outputs_in_lanes(
      p.m, p.n, p.depth, Strided<E>{a.data(), a_layout.row_stride, a_layout.step}, w.data(), w_stride,
      c.data(), c_stride, p.accumulate,
      kind % 2 ? Fetch::none() : Fetch::memory(w.data(), kind % 9 * 20, 1 + kind % 3));
  p.judge(c.values(), data, table);
  check::expect(c.gaps_intact(), "wrote outside c");
  check::expect(a.untouched(p.a) && w.untouched(p.b), "wrote to an input");
}

template <class E>
void test_gemm_outputs_in_lanes(const KernelTable& table) {
  const Tiles<E>& k = table.tiles<E>();
  const std::string kernel = std::string("gemm_outputs_in_lanes of ") + element_name<E>();
  const std::vector<size_t> all_depths = depths();
  Random random(2);
  size_t kind = 0;
  for (size_t n = 0; n <= kPanelColumns; ++n)
    for (size_t m : {size_t{0}, size_t{1}, size_t{2}, size_t{3}, size_t{5}, k.tile_tokens - 1, k.tile_tokens,
                     k.tile_tokens + 1, 2 * k.tile_tokens + 1})
      // Two of the depths for each (m, n). 31 is coprime to their number, so that all of them are used in
      // turn.
      for (size_t i = 0; i < 2; ++i) {
        if (!check::count_shape(kernel)) continue;
        const size_t depth = all_depths[++kind * 31 % all_depths.size()];
        for (Data data : kAllData) {
          const Product<E> p(random, m, n, depth, kind % 7 < 3, data, table);
          for (Place place : kPlaces) run_gemm_outputs_in_lanes(table, p, data, kind, place);
        }
      }
}

// w (depth, n) in panels of kPanelColumns columns, each dense.
template <class T>
std::vector<T> in_dense_panels(const std::vector<T>& w, size_t depth, size_t n) {
  std::vector<T> panels;
  for (size_t j = 0; j < n; j += kPanelColumns)
    for (size_t s = 0; s < depth; ++s)
      for (size_t k = j; k < std::min(j + kPanelColumns, n); ++k) panels.push_back(w[s * n + k]);
  return panels;
}

template <class T>
void test_merge(const KernelTable& table) {
  const auto& k = table.products<T>();
  const std::string kernel = std::string("merge of ") + type_name<T>();
  const std::vector<size_t> all_depths = depths();
  Random random(6);
  size_t kind = 0;
  // Each remainder of a panel, and up to ten full panels, more than are fetched ahead, with and without one
  // more column.
  for (size_t n = 0; n <= 10 * kPanelColumns + 1;
       n += n < kPanelColumns || n % 2 == 0 ? 1 : kPanelColumns - 1)
    for (size_t m : {size_t{0}, size_t{1}, size_t{2}, size_t{3}, size_t{5}, k.tile_tokens - 1, k.tile_tokens,
                     k.tile_tokens + 1, 2 * k.tile_tokens + 1}) {
      if (!check::count_shape(kernel)) continue;
      const size_t depth = all_depths[++kind * 31 % all_depths.size()], c_stride = n + kind % 5;
      const bool streams = kind % 2 != 0;
      for (Data data : kAllData) {
        const Product<T> p(random, m, n, depth, true, data, table);
        const std::vector<T> panels = in_dense_panels(p.b, depth, n);
        for (Place place : kPlaces) {
          check::Case one("%s merge<%s> m %zu n %zu depth %zu c_stride %zu streams %d, %s, %s", table.isa,
                          type_name<T>(), m, n, depth, c_stride, streams, name_of(data), name_of(place));
          Placed<T> a(m, depth, {depth}, place, p.a), w(1, panels.size(), {panels.size()}, place, panels);
          Placed<T> c(m, n, {c_stride}, place);
          for (size_t i = 0; i < m; ++i)
            for (size_t j = 0; j < n; ++j) c.data()[i * c_stride + j] = p.c[i * n + j];
          k.merge(m, n, depth, a.data(), w.data(), c.data(), c_stride, streams);
          p.judge(c.values(), data, table);
          check::expect(c.gaps_intact(), "wrote outside c");
          check::expect(a.untouched(p.a) && w.untouched(panels), "wrote to an input");
        }
      }
    }
}

// If bfloat16 is widened in registers, the result has the same bits as with these values as floats.
void test_widening_gemm_outputs_in_lanes(const KernelTable& table) {
  Random random(4);
  size_t kind = 0;
  for (size_t n = 0; n <= kPanelColumns; ++n)
    for (size_t m : {0, 1, 2, 3, 5, 8, 9})
      for (size_t depth : {0, 1, 7, 515}) {  // more than one L1 block
        if (!check::count_shape("gemm_outputs_in_lanes of widened bfloat16")) continue;
        const size_t w_stride = n + ++kind % 3 * 7;
        check::Case one("%s gemm_outputs_in_lanes of widened bfloat16 m %zu n %zu depth %zu w_stride %zu",
                        table.isa, m, n, depth, w_stride);
        const std::vector<float> a = draw<float>(random, m * depth, Data::kUniform);
        std::vector<float> values = draw<float>(random, depth * n, Data::kSpecial);
        std::vector<Bf16> bits;
        for (float& value : values) {
          const uint32_t upper = std::bit_cast<uint32_t>(value) >> 16;
          value = std::bit_cast<float>(upper << 16);
          bits.push_back(Bf16(upper));
        }
        for (Place place : kPlaces) {
          Placed<Bf16> w(depth, n, {w_stride}, place, bits);
          Placed<float> c(m, n, {n + 3}, place), wanted(m, n, {n + 3}, place);
          table.small<Bf16>().gemm_outputs_in_lanes(m, n, depth, {a.data(), depth, 1}, w.data(), w_stride,
                                                    c.data(), n + 3, false, Fetch::none());
          table.tiles<float>().gemm_outputs_in_lanes(m, n, depth, {a.data(), depth, 1}, values.data(), n,
                                                     wanted.data(), n + 3, false, Fetch::none());
          const auto got = c.values(), want = wanted.values();
          for (size_t i = 0; i < got.size(); ++i)
            check::expect(same(got[i], want[i]), "element %zu is %g, wanted %g", i, double(got[i]),
                          double(want[i]));
          check::expect(c.gaps_intact() && w.untouched(bits), "wrote outside c");
        }
      }
}

// If gemm_outputs_in_lanes pairs rows of bfloat16, the result has the same bits as with pairs in memory.
void test_pairing_gemm_outputs_in_lanes(const KernelTable& table) {
  Random random(8);
  size_t kind = 0;
  for (size_t n = 0; n <= kPanelColumns; ++n)
    for (size_t m : {0, 1, 2, 5, 8, 9})
      for (size_t depth : {0, 1, 2, 13, 515}) {
        if (!check::count_shape("gemm_outputs_in_lanes of paired bfloat16")) continue;
        const size_t w_stride = n + ++kind % 3 * 7, pairs = (depth + 1) / 2;
        check::Case one("%s gemm_outputs_in_lanes of paired bfloat16 m %zu n %zu depth %zu w_stride %zu",
                        table.isa, m, n, depth, w_stride);
        const Product<Bf16Pair> p(random, m, n, pairs, false, Data::kUniform, table);
        std::vector<Bf16> rows(depth * n);
        std::vector<Bf16Pair> paired = p.b;
        for (size_t i = 0; i < depth; ++i)
          for (size_t j = 0; j < n; ++j) rows[i * n + j] = Bf16(uint32_t(p.b[i / 2 * n + j]) >> (i % 2 * 16));
        if (depth % 2)
          for (size_t j = 0; j < n; ++j)
            paired[depth / 2 * n + j] = Bf16Pair(uint32_t(paired[depth / 2 * n + j]) & 0xFFFF);
        for (Place place : kPlaces) {
          Placed<Bf16> w(depth, n, {w_stride}, place, rows);
          Placed<float> c(m, n, {n + 3}, place), wanted(m, n, {n + 3}, place);
          table.small<Bf16Pair>().gemm_outputs_in_lanes(m, n, depth, {p.a.data(), pairs, 1}, w.data(),
                                                        w_stride, c.data(), n + 3, false, Fetch::none());
          table.tiles<Bf16Pair>().gemm_outputs_in_lanes(m, n, pairs, {p.a.data(), pairs, 1}, paired.data(), n,
                                                        wanted.data(), n + 3, false, Fetch::none());
          const auto got = c.values(), want = wanted.values();
          for (size_t i = 0; i < got.size(); ++i)
            check::expect(same(got[i], want[i]), "element %zu is %g, wanted %g", i, double(got[i]),
                          double(want[i]));
          check::expect(c.gaps_intact() && w.untouched(rows), "wrote outside c");
        }
      }
}

// ---- an element has the same bits, whatever tile it is in ----

// Cuts n into one to four pieces, at multiples of unit.
std::vector<size_t> cuts(Random& random, size_t n, size_t unit = 1) {
  std::vector<size_t> at = {0, n};
  for (size_t i = random.below(4); i > 0; --i) at.push_back(random.below(n / unit + 1) * unit);
  std::sort(at.begin(), at.end());
  return at;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Dense rows of w may be taken in L1 blocks. They give the same bits as rows with gaps, whatever is fetched
// meanwhile.
template <class W>
void test_dense_panels(const KernelTable& table) {
  using T = Sum<W>;
  const std::string kernel =
      std::string("gemm_outputs_in_lanes of dense ") + (sizeof(W) == 2 ? "bfloat16" : type_name<T>());
  static const char memory[100 * 64] = {};
  Random random(9);
  size_t kind = 0;
  for (size_t n : {size_t{20}, size_t{32}, size_t{43}, kPanelColumns})
    for (size_t m : {1, 2, 3, 4, 5, 6, 8, 13})
      for (size_t depth : {0, 1, 64, 128, 129, 300, 515})
        for (const Fetch& next : {Fetch::none(), Fetch::rows_ahead(), Fetch::memory(memory, 100, 2)}) {
          const bool accumulate = ++kind % 2;
          if (!check::count_shape(kernel)) continue;
          check::Case one("%s %s m %zu n %zu depth %zu fetch %zu %zu accumulate %d", table.isa,
                          kernel.c_str(), m, n, depth, next.lines, next.each, accumulate);
          const std::vector<T> a = draw<T>(random, m * depth, Data::kUniform),
                               sums = draw<T>(random, m * n, Data::kUniform);
          std::vector<W> rows;
          for (T value : draw<T>(random, depth * n, Data::kUniform)) {
            if constexpr (sizeof(W) == 2)
              rows.push_back(W(std::bit_cast<uint32_t>(value) >> 16));
            else
              rows.push_back(value);
          }
          const auto product = [&](size_t w_stride) {
            const Place place = kPlaces[kind / 2 % std::size(kPlaces)];
            Placed<W> w(depth, n, {w_stride}, place, rows);
            Placed<T> c(m, n, {n + 3}, place, sums);
            table.small<W>().gemm_outputs_in_lanes(m, n, depth, {a.data(), depth, 1}, w.data(), w_stride,
                                                   c.data(), n + 3, accumulate, next);
            check::expect(c.gaps_intact() && w.untouched(rows), "wrote outside c");
            return c.values();
          };
          check::expect(same_bits(product(n), product(n + 1)), "differs from rows that lie apart");
        }
}

// Both kernels compute c (m, n) = a (m, depth) b (depth, n), first whole and then in random tiles. All
// results must be equal.
template <class E>
void test_blocking(const KernelTable& table) {
  constexpr size_t kPanel = kPanelColumns / kValuesPerElement<E>;
  const Tiles<E>& k = table.tiles<E>();
  const std::string kernel = std::string("blocking of ") + element_name<E>();
  Random random(3);
  for (size_t trial = 0; trial < check::kFewestShapes; ++trial) {
    const size_t n = k.lanes, m = 1 + random.below(30), depth = 1 + random.below(300);
    check::Case one("%s %s m %zu depth %zu trial %zu", table.isa, kernel.c_str(), m, depth, trial);
    if (!check::count_shape(kernel)) continue;
    const Product<E> p(random, m, n, depth, false, Data::kUniform, table);
    std::vector<Sum<E>> whole(m * n), outer(m * n), lane(m * n);
    k.gemm_tokens_in_lanes(n, m, depth, {p.a.data(), depth, kPanel}, p.b.data(), whole.data(), false);

    const std::vector<size_t> rows = cuts(random, m), columns = cuts(random, n),
                              steps = cuts(random, depth, k.depth_unit);
    for (size_t s = 0; s + 1 < steps.size(); ++s)
      for (size_t i = 0; i + 1 < rows.size(); ++i) {
        const E* tile = p.a.data() + rows[i] * depth + steps[s];
        const E* from = p.b.data() + steps[s] * n;
        k.gemm_tokens_in_lanes(n, rows[i + 1] - rows[i], steps[s + 1] - steps[s], {tile, depth, kPanel}, from,
                               lane.data() + rows[i] * n, s > 0);
        for (size_t j = 0; j + 1 < columns.size(); ++j)
          k.gemm_outputs_in_lanes(rows[i + 1] - rows[i], columns[j + 1] - columns[j], steps[s + 1] - steps[s],
                                  {tile, depth, 1}, from + columns[j], n,
                                  outer.data() + rows[i] * n + columns[j], n, s > 0, Fetch::none());
      }
    check::expect(same_bits(lane, whole),
                  "gemm_tokens_in_lanes in tiles differs from gemm_tokens_in_lanes whole");
    check::expect(same_bits(outer, whole),
                  "gemm_outputs_in_lanes in tiles differs from gemm_tokens_in_lanes whole");

    std::vector<E> panels((depth + kPanel - 1) / kPanel * m * kPanel);
    for (size_t i = 0; i < m; ++i)
      for (size_t s = 0; s < depth; ++s)
        panels[(s / kPanel * m + i) * kPanel + s % kPanel] = p.a[i * depth + s];
    k.gemm_tokens_in_lanes(n, m, depth, {panels.data(), kPanel, m * kPanel}, p.b.data(), lane.data(), false);
    check::expect(same_bits(lane, whole),
                  "gemm_tokens_in_lanes over panels differs from gemm_tokens_in_lanes over rows");

    const size_t half = n / 2;  // one vector of tokens at a time
    std::vector<E> part(depth * half);
    std::vector<Sum<E>> narrow(m * half);
    for (size_t first : {size_t{0}, half}) {
      for (size_t s = 0; s < depth; ++s)
        std::copy_n(p.b.data() + s * n + first, half, part.data() + s * half);
      k.gemm_tokens_in_lanes(half, m, depth, {p.a.data(), depth, kPanel}, part.data(), narrow.data(), false);
      for (size_t i = 0; i < m; ++i)
        check::expect(std::memcmp(&narrow[i * half], &whole[i * n + first], half * sizeof(Sum<E>)) == 0,
                      "gemm_tokens_in_lanes on %zu lanes differs from gemm_tokens_in_lanes on %zu", half, n);
    }
  }
}

template <class E>
void test_tiles(const KernelTable& table) {
  test_gemm_tokens_in_lanes<E>(table);
  test_gemm_outputs_in_lanes<E>(table);
  test_blocking<E>(table);
}

}  // namespace

void test_products(const KernelTable& table) {
  test_tiles<float>(table);
  test_tiles<double>(table);
  test_tiles<Bf16Pair>(table);
  test_merge<float>(table);
  test_merge<double>(table);
  test_widening_gemm_outputs_in_lanes(table);
  test_pairing_gemm_outputs_in_lanes(table);
  test_dense_panels<float>(table);
  test_dense_panels<double>(table);
  test_dense_panels<Bf16>(table);
}
