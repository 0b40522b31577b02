// adamw, sgd, sum_of_squares and dropout, on every length from 0 to 520 and some longer ones.
#include <array>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"
#include "philox.h"

using nplora::kernels::AdamWCoefficients;
using nplora::kernels::KernelTable;
using nplora::kernels::SgdCoefficients;

namespace {

std::vector<size_t> lengths() {
  std::vector<size_t> all;
  for (size_t n = 0; n <= 520; ++n) all.push_back(n);
  for (size_t n : {625, 1000, 1023, 4099}) all.push_back(n);
  return all;
}

// ---- adamw ----

// Each quantity is rounded fewer times than this, including the roundings of its coefficients.
constexpr size_t kRoundings = 20;

template <class T>
void run_adamw(const KernelTable& table, Random& random, size_t n, const AdamWCoefficients& k, Place place) {
  check::Case one("%s adamw<%s> n %zu lr %g weight_decay %g grad_scale %g bias1 %g, %s", table.isa,
                  type_name<T>(), n, k.lr, k.weight_decay, k.grad_scale, k.bias1, name_of(place));
  const std::vector<T> p0 = draw<T>(random, n, Data::kUniform), m0 = draw<T>(random, n, Data::kUniform);
  std::vector<T> g0 = draw<T>(random, n, Data::kUniform), v0 = draw<T>(random, n, Data::kUniform);
  for (T& v : v0) v = v * v;
  const size_t poisoned = n ? random.below(n) : 0;  // a NaN gradient affects only its own element
  if (n) g0[poisoned] = std::numeric_limits<T>::quiet_NaN();
  Row<T> p(place, p0), g(place, g0), m(place, m0), v(place, v0);
  table.products<T>().adamw(n, p.data(), g.data(), m.data(), v.data(), k);

  using W = Wide<T>;
  const W bound = gamma<T>(kRoundings), smallest = std::numeric_limits<T>::denorm_min();
  for (size_t i = 0; i < n; ++i) {
    if (i == poisoned) {
      check::expect(std::isnan(p[i]) && std::isnan(m[i]) && std::isnan(v[i]),
                    "the NaN of element %zu was lost", i);
      continue;
    }
    const W gi = W(k.grad_scale) * g0[i], from_m = W(k.beta1) * m0[i], from_g = (1 - W(k.beta1)) * gi;
    const W wanted_m = from_m + from_g, wanted_v = W(k.beta2) * v0[i] + (1 - W(k.beta2)) * gi * gi;
    const W rate = W(k.lr) / W(k.bias1) / (std::sqrt(wanted_v / W(k.bias2)) + W(k.eps));
    const W wanted_p = p0[i] * (1 - W(k.lr) * W(k.weight_decay)) - rate * wanted_m;
    // m may cancel, so its error is relative to its two terms. The error of p is relative to p and to the
    // step that these terms give.
    const W terms = std::abs(from_m) + std::abs(from_g);
    check::expect(std::abs(m[i] - wanted_m) <= bound * terms + smallest, "m[%zu] is %g", i, double(m[i]));
    check::expect(std::abs(v[i] - wanted_v) <= bound * wanted_v + smallest, "v[%zu] is %g", i, double(v[i]));
    check::expect(std::abs(p[i] - wanted_p) <= bound * (std::abs(W(p0[i])) + rate * terms) + smallest,
                  "p[%zu] is %.9g, wanted %.9g", i, double(p[i]), double(wanted_p));
  }
  check::expect(p.gaps_intact() && m.gaps_intact() && v.gaps_intact(), "wrote outside its outputs");
  check::expect(g.untouched(g0), "wrote to g");
}

template <class T>
void test_adamw(const KernelTable& table) {
  Random random(11);
  for (size_t n : lengths()) {
    if (!check::count_shape(is_float<T> ? "adamw<float>" : "adamw<double>")) continue;
    const double t = static_cast<double>(1 + n % 7);
    const AdamWCoefficients k{.lr = n % 5 ? 1e-3 : 0,
                              .beta1 = 0.9,
                              .beta2 = 0.999,
                              .eps = 1e-8,
                              .weight_decay = n % 3 ? 0.01 : 0,
                              .bias1 = 1 - std::pow(0.9, t),
                              .bias2 = 1 - std::pow(0.999, t),
                              .grad_scale = n % 2 ? 1 : 0.3};
    for (Place place : kPlaces) run_adamw<T>(table, random, n, k, place);
  }
}

// ---- sgd ----

template <class T>
void run_sgd(const KernelTable& table, const std::vector<T>& p0, const std::vector<T>& g0,
             const std::vector<T>& buf0, bool has_buffer, const SgdCoefficients& k, bool exact, Place place) {
  const size_t n = p0.size();
  check::Case one(
      "%s sgd<%s> n %zu lr %g momentum %g weight_decay %g grad_scale %g nesterov %d buffer %d, %s", table.isa,
      type_name<T>(), n, k.lr, k.momentum, k.weight_decay, k.grad_scale, k.nesterov, has_buffer,
      name_of(place));
  Row<T> p(place, p0), g(place, g0), buf(place, buf0);
  table.products<T>().sgd(n, p.data(), g.data(), has_buffer ? buf.data() : nullptr, k);

  using W = Wide<T>;
  const W bound = exact ? W(0) : gamma<T>(kRoundings);
  for (size_t i = 0; i < n; ++i) {
    const W step = W(k.grad_scale) * g0[i] + W(k.weight_decay) * p0[i];
    const W step_terms = std::abs(W(k.grad_scale) * g0[i]) + std::abs(W(k.weight_decay) * p0[i]);
    const W wanted_buf = W(k.momentum) * buf0[i] + step,
            buf_terms = std::abs(W(k.momentum) * buf0[i]) + step_terms;
    W update = step, terms = step_terms;
    if (has_buffer) {
      update = k.nesterov ? step + W(k.momentum) * wanted_buf : wanted_buf;
      terms = k.nesterov ? step_terms + W(k.momentum) * buf_terms : buf_terms;
      if (std::isfinite(wanted_buf))
        check::expect(std::abs(buf[i] - wanted_buf) <= bound * buf_terms, "buf[%zu] is %g", i,
                      double(buf[i]));
      else
        check::expect(same<T>(buf[i], T(wanted_buf)), "buf[%zu] is %g", i, double(buf[i]));
    }
    const W wanted = p0[i] - W(k.lr) * update;
    if (std::isfinite(wanted))
      check::expect(std::abs(p[i] - wanted) <= bound * (std::abs(W(p0[i])) + W(k.lr) * terms),
                    "p[%zu] is %g, wanted %g", i, double(p[i]), double(wanted));
    else
      check::expect(same<T>(p[i], T(wanted)), "p[%zu] is %g, wanted %g", i, double(p[i]), double(wanted));
  }
  check::expect(p.gaps_intact() && buf.gaps_intact(), "wrote outside its outputs");
  check::expect(g.untouched(g0) && (has_buffer || buf.untouched(buf0)), "wrote to an input");
}

template <class T>
void test_sgd(const KernelTable& table) {
  Random random(12);
  for (size_t n : lengths()) {
    if (!check::count_shape(is_float<T> ? "sgd<float>" : "sgd<double>")) continue;
    const bool has_buffer = n % 4 != 0, nesterov = n % 4 == 3;
    const double momentum = has_buffer ? 0.9 : 0;
    const SgdCoefficients typical{.lr = 0.05,
                                  .momentum = momentum,
                                  .weight_decay = n % 3 ? 0.01 : 0,
                                  .grad_scale = n % 2 ? 1 : 0.3,
                                  .nesterov = nesterov};
    // Powers of two times small integers: nothing is rounded.
    const SgdCoefficients binary{.lr = 0.25,
                                 .momentum = has_buffer ? 0.5 : 0,
                                 .weight_decay = 0.125,
                                 .grad_scale = 2,
                                 .nesterov = nesterov};
    for (Place place : kPlaces) {
      const auto row = [&](Data data) { return draw<T>(random, n, data); };
      run_sgd(table, row(Data::kUniform), row(Data::kUniform), row(Data::kUniform), has_buffer, typical,
              false, place);
      run_sgd(table, row(Data::kIntegers), row(Data::kIntegers), row(Data::kIntegers), has_buffer, binary,
              true, place);
      std::vector<T> g = row(Data::kIntegers);
      if (n) g[random.below(n)] = std::numeric_limits<T>::quiet_NaN();
      if (n) g[random.below(n)] = std::numeric_limits<T>::infinity();
      run_sgd(table, row(Data::kIntegers), g, row(Data::kIntegers), has_buffer, binary, true, place);
    }
  }
}

// ---- sum_of_squares ----

template <class T>
void test_sum_of_squares(const KernelTable& table) {
  Random random(13);
  for (size_t n : lengths()) {
    if (!check::count_shape(is_float<T> ? "sum_of_squares<float>" : "sum_of_squares<double>")) continue;
    for (Data data : kAllData) {
      const std::vector<T> values = draw<T>(random, n, data);
      long double wanted = 0;
      for (T value : values) wanted += static_cast<long double>(value) * value;
      double first_sum = 0;
      for (Place place : kPlaces) {
        check::Case one("%s sum_of_squares<%s> n %zu, %s, %s", table.isa, type_name<T>(), n, name_of(data),
                        name_of(place));
        Row<T> x(place, values);
        const double sum = table.products<T>().sum_of_squares(n, x.data());
        if (data == Data::kIntegers || !std::isfinite(wanted))
          check::expect(same(sum, static_cast<double>(wanted)), "%g, wanted %g", sum, double(wanted));
        else
          check::expect(std::abs(sum - wanted) <= gamma<double>(n + 1) * wanted + (n + 1) * 5e-324L,
                        "%.17g, wanted %.17g", sum, double(wanted));
        if (place == kPlaces[0]) first_sum = sum;
        check::expect(same(sum, first_sum), "the sum depends on the alignment: %.17g and %.17g", first_sum,
                      sum);
        check::expect(x.untouched(values), "wrote to x");
      }
    }
  }
}

// ---- dropout ----

// The known answers of Random123 (kat_vectors). The first one is also compared with the kernel, whose
// counters end in zeros.
void test_known_answers(const KernelTable& table) {
  check::Case one("%s dropout: the known answers of Philox4x32-10", table.isa);
  const Words zeros = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
              ones = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  check::expect(philox({0, 0, 0, 0}, 0, 0) == zeros, "counter 0, key 0");
  check::expect(philox({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u) == ones, "counter and key of ones");
  for (size_t i = 0; i < 4; ++i) {
    const float x[4] = {1, 1, 1, 1};
    float kept[4], dropped[4];
    table.f32.dropout(4, 0, 0, zeros[i], 2, x, kept);
    table.f32.dropout(4, 0, 0, zeros[i] + 1, 2, x, dropped);
    check::expect(kept[i] == 2 && dropped[i] == 0, "word %zu of counter 0 is not %#x", i, zeros[i]);
  }
}

template <class T>
void run_dropout(const KernelTable& table, const std::vector<T>& x0, uint64_t seed, uint64_t first,
                 uint32_t threshold, bool in_place, Place place) {
  const size_t n = x0.size();
  check::Case one("%s dropout<%s> n %zu seed %#llx first %llu threshold %#x in place %d, %s", table.isa,
                  type_name<T>(), n, static_cast<unsigned long long>(seed),
                  static_cast<unsigned long long>(first), threshold, in_place, name_of(place));
  const T factor = T(1.25);
  Row<T> x(place, x0), fresh(place, n);
  Row<T>& out = in_place ? x : fresh;
  table.products<T>().dropout(n, seed, first, threshold, factor, x.data(), out.data());
  for (size_t i = 0; i < n; ++i) {
    const bool dropped = word_of(seed, first + i) < threshold;
    check::expect(same(out[i], dropped ? T(0) : T(x0[i] * factor)), "element %zu is %g, %s", i,
                  double(out[i]), dropped ? "should be dropped" : "should be kept");
  }
  check::expect(out.gaps_intact(), "wrote outside out");
  check::expect(in_place || x.untouched(x0), "wrote to x");
}

template <class T>
void test_dropout(const KernelTable& table) {
  Random random(14);
  // Every position in a block of four, the carry from the low word of the counter to the high word, and the
  // last counters.
  const uint64_t starts[] = {0, 1, 2, 3, 61, 4 * 0x100000000ull - 6, 1ull << 40, ~0ull - 8192};
  const uint32_t thresholds[] = {0, 0x19999999u, 0x80000000u, 0xFFFFFFFFu};
  const uint64_t seeds[] = {0, 1, 0xFFFFFFFFull, 0x0123456789ABCDEFull, ~0ull};
  size_t kind = 0;
  for (size_t n : lengths()) {
    if (!check::count_shape(is_float<T> ? "dropout<float>" : "dropout<double>")) continue;
    for (Place place : kPlaces) {
      ++kind;
      run_dropout(table, draw<T>(random, n, Data::kSpecial), seeds[kind % 5], starts[kind / 3 % 8],
                  thresholds[kind % 4], kind % 3 == 0, place);
    }
  }
}

}  // namespace

void test_elementwise(const KernelTable& table) {
  test_adamw<float>(table);
  test_adamw<double>(table);
  test_sgd<float>(table);
  test_sgd<double>(table);
  test_sum_of_squares<float>(table);
  test_sum_of_squares<double>(table);
  test_known_answers(table);
  test_dropout<float>(table);
  test_dropout<double>(table);
}
