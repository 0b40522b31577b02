// bfloat16 and float16: all 65,536 patterns are widened. Floats are narrowed at and around every number at
// which rounding changes.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <string>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"
#include "philox.h"

using nplora::kernels::Bf16Pair;
using nplora::kernels::KernelTable;

namespace {

// A 16-bit format, from its definition: 1 sign bit, then the exponent, then the fraction.
struct Format {
  const char* name;
  int fraction_bits, largest_exponent;

  int smallest_exponent() const { return 1 - largest_exponent; }

  double value(uint16_t bits) const {
    const int fraction = bits & ((1 << fraction_bits) - 1), exponent = (bits & 0x7FFF) >> fraction_bits;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == 0x7FFF >> fraction_bits) return fraction ? NAN : sign * INFINITY;
    const int scale = std::max(exponent, 1) - largest_exponent - fraction_bits;
    return sign * std::ldexp(fraction + (exponent ? 1 << fraction_bits : 0), scale);
  }

  // The nearest pattern, ties to even. Infinity from half a last place beyond the largest number.
  uint16_t nearest(float x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const int infinity = 0x7FFF & ~((1 << fraction_bits) - 1);
    if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
    if (x == 0) return sign;
    const int exponent = std::max(std::ilogb(x), smallest_exponent());
    const int units =
        static_cast<int>(std::nearbyint(std::ldexp(std::abs(double(x)), fraction_bits - exponent)));
    // For a normal number, units >= 2^fraction_bits: adding it carries into the exponent's field.
    const int bits = ((exponent - smallest_exponent()) << fraction_bits) + units;
    return static_cast<uint16_t>(sign | std::min(bits, infinity));
  }
};

constexpr Format kBfloat16 = {"bfloat16", 7, 127}, kFloat16 = {"float16", 10, 15};

bool is_nan(const Format& format, uint16_t bits) {
  return std::isnan(format.value(bits));
}

using Widen = void (*)(size_t, const uint16_t*, float*);
using Narrow = void (*)(size_t, const float*, uint16_t*);

// Odd, so that every pattern is in a vector in some chunk and in a tail in another.
constexpr size_t kChunk = 1021;

void run_widen(const char* isa, const Format& format, Widen widen, const std::vector<uint16_t>& patterns,
               Place place) {
  check::Case one("%s widen_%s n %zu from %#x, %s", isa, format.name, patterns.size(),
                  patterns.empty() ? 0u : unsigned{patterns[0]}, name_of(place));
  const size_t n = patterns.size();
  Row<uint16_t> from(place, patterns);
  Row<float> to(place, n);
  widen(n, from.data(), to.data());
  for (size_t i = 0; i < n; ++i) {
    const float wanted = static_cast<float>(format.value(patterns[i]));
    check::expect(same(to[i], wanted), "%#x became %.9g, wanted %.9g", patterns[i], double(to[i]),
                  double(wanted));
    check::expect(std::signbit(to[i]) == ((patterns[i] & 0x8000) != 0), "%#x lost its sign", patterns[i]);
  }
  check::expect(to.gaps_intact() && from.untouched(patterns), "wrote outside its output");
}

void run_narrow(const char* isa, const Format& format, Narrow narrow, const std::vector<float>& values,
                Place place) {
  check::Case one("%s narrow_%s n %zu from %g, %s", isa, format.name, values.size(),
                  values.empty() ? 0.0 : double(values[0]), name_of(place));
  const size_t n = values.size();
  Row<float> from(place, values);
  Row<uint16_t> to(place, n);
  narrow(n, from.data(), to.data());
  for (size_t i = 0; i < n; ++i) {
    const bool sign_kept = ((to[i] & 0x8000) != 0) == std::signbit(values[i]);
    if (std::isnan(values[i]))
      check::expect(is_nan(format, to[i]) && sign_kept, "NaN became %#x", to[i]);
    else
      check::expect(to[i] == format.nearest(values[i]), "%.9g (%a) became %#x, wanted %#x", double(values[i]),
                    double(values[i]), to[i], format.nearest(values[i]));
  }
  check::expect(to.gaps_intact() && from.untouched(values), "wrote outside its output");
}

// While this object exists, the processor treats subnormal floats as 0, as in a program that loaded a library
// built with -ffast-math.
class FlushedSubnormals {
 public:
#if defined(__SSE2__)
  FlushedSubnormals() { _mm_setcsr(before_ | 0x8040); }  // FTZ and DAZ
  ~FlushedSubnormals() { _mm_setcsr(before_); }

 private:
  const unsigned before_ = _mm_getcsr();
#elif defined(__aarch64__)
  FlushedSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
    set(before_ | 1u << 24);
  }
  ~FlushedSubnormals() { set(before_); }

 private:
  static void set(uint64_t fpcr) { __asm__ volatile("msr fpcr, %0" : : "r"(fpcr)); }
  uint64_t before_;
#endif
};

// Subnormal float16 values are normal floats, so they must be kept.
void test_widening_while_flushing(const char* isa, Widen widen) {
  std::vector<uint16_t> patterns;
  for (uint16_t bits = 0; bits < 1024; ++bits)
    patterns.insert(patterns.end(), {bits, uint16_t(bits | 0x8000)});
  std::vector<float> to(patterns.size());
  {
    const FlushedSubnormals flushed;
    widen(to.size() - 3, patterns.data(), to.data());
    for (size_t i = to.size() - 3; i < to.size(); ++i) widen(1, &patterns[i], &to[i]);
  }
  check::Case one("%s widen_float16 where subnormal floats are 0", isa);
  for (size_t i = 0; i < to.size(); ++i)
    check::expect(same(to[i], float(kFloat16.value(patterns[i]))), "%#x became %.9g", patterns[i],
                  double(to[i]));
}

float of_bits(uint32_t bits) {
  return std::bit_cast<float>(bits);
}

// Subnormal bfloat16 values are subnormal floats, and must be kept.
void test_narrowing_while_flushing(const KernelTable& table) {
  std::vector<float> numbers;
  std::vector<uint16_t> patterns;
  for (uint16_t bits = 1; bits < 128; ++bits)
    for (uint16_t sign : {0, 0x8000}) {
      patterns.push_back(bits | sign);
      numbers.push_back(of_bits(uint32_t(patterns.back()) << 16));
    }
  const size_t n = patterns.size();
  std::vector<uint16_t> narrowed(n);
  std::vector<Bf16Pair> paired(n / 2);
  {
    const FlushedSubnormals flushed;
    table.convert.narrow_bfloat16(n, numbers.data(), narrowed.data());
    table.convert.pair_rows(2, n / 2, numbers.data(), n / 2, paired.data());
  }
  {
    check::Case one("%s narrow_bfloat16 where subnormal floats are 0", table.isa);
    check::expect(narrowed == patterns, "lost some");
  }
  check::Case one("%s pair_rows where subnormal floats are 0", table.isa);
  for (size_t i = 0; i < n / 2; ++i)
    check::expect(uint32_t(paired[i]) == (patterns[i] | uint32_t(patterns[n / 2 + i]) << 16), "made %#x",
                  uint32_t(paired[i]));
}

// The numbers at which rounding changes: each number of the format, the midpoint to the next one, and the
// floats next to all of them. Also every kind of NaN, numbers far outside the range, and random patterns.
std::vector<float> turning_points(const Format& format) {
  std::vector<float> all;
  const auto with_neighbours = [&](float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    for (uint32_t b : {bits - 1, bits, bits + 1}) all.push_back(of_bits(b));
  };
  for (unsigned pattern = 0; pattern < 0x8000; ++pattern) {
    const double value = format.value(static_cast<uint16_t>(pattern));
    if (!std::isfinite(value)) continue;
    const double next = format.value(static_cast<uint16_t>(pattern + 1));
    // Above the largest number, the next step would be as wide as the last.
    const double step =
        std::isfinite(next) ? next - value : std::ldexp(1.0, format.largest_exponent - format.fraction_bits);
    for (double sign : {1.0, -1.0}) {
      with_neighbours(static_cast<float>(sign * value));
      with_neighbours(static_cast<float>(sign * (value + step / 2)));
    }
  }
  for (uint32_t bits : {0x7F800000u, 0x7F800001u, 0x7F80FFFFu, 0x7FBFFFFFu, 0x7FC00000u, 0x7FFFFFFFu,
                        0x7F7FFFFFu, 0x00000001u, 0x007FFFFFu, 0x00800000u})
    for (uint32_t sign : {0u, 0x80000000u}) all.push_back(of_bits(bits | sign));
  Random random(7);
  for (size_t i = 0; i < 200000; ++i) all.push_back(of_bits(static_cast<uint32_t>(random.bits())));
  return all;
}

void test_format(const char* isa, const Format& format, Widen widen, Narrow narrow) {
  const std::vector<float> values = turning_points(format);
  const std::string widen_name = std::string("widen_") + format.name,
                    narrow_name = std::string("narrow_") + format.name;
  Random random(8);
  for (size_t n = 0; n <= 520; ++n) {
    std::vector<uint16_t> patterns(n);
    for (uint16_t& pattern : patterns) pattern = static_cast<uint16_t>(random.bits());
    std::vector<float> numbers(n);
    for (float& number : numbers) number = values[random.below(values.size())];
    if (!check::count_shape(widen_name.c_str()) | !check::count_shape(narrow_name.c_str())) continue;
    for (Place place : kPlaces) {
      run_widen(isa, format, widen, patterns, place);
      run_narrow(isa, format, narrow, numbers, place);
    }
  }
  for (unsigned first = 0; first < 0x10000; first += kChunk) {
    std::vector<uint16_t> patterns;
    for (unsigned i = first; i < std::min<unsigned>(first + kChunk, 0x10000); ++i)
      patterns.push_back(static_cast<uint16_t>(i));
    run_widen(isa, format, widen, patterns, Place::kEnd);
  }
  for (size_t first = 0; first < values.size(); first += kChunk)
    run_narrow(isa, format, narrow,
               {values.begin() + static_cast<ptrdiff_t>(first),
                values.begin() + static_cast<ptrdiff_t>(std::min(first + kChunk, values.size()))},
               Place::kEnd);
}

// ---- stochastic rounding ----

using Dither = void (*)(size_t, uint64_t, uint64_t, float*);

// The result for x and a random word. u is the number's position between its two neighbours. The result is
// the upper neighbour if u plus the word's leading bits, as a fraction, is 1 or more. For a normal number as
// many bits are used as it loses, for a subnormal float16 24.
float dithered(const Format& format, float x, uint32_t word) {
  const double largest = std::ldexp(2 - std::ldexp(1.0, -format.fraction_bits), format.largest_exponent);
  if (std::isnan(x) || std::abs(double(x)) > largest) return x;
  const bool is_subnormal = x == 0 || std::ilogb(x) < format.smallest_exponent();
  const int exponent = is_subnormal ? format.smallest_exponent() : std::ilogb(x);
  const double step = std::ldexp(1.0, exponent - format.fraction_bits);
  const double units = std::abs(double(x)) / step, whole = std::floor(units);
  const int random_bits = is_subnormal && format.fraction_bits == 10 ? 24 : 23 - format.fraction_bits;
  const double one = std::ldexp(1.0, random_bits);
  const bool up = std::floor((units - whole) * one) + double(word >> (32 - random_bits)) >= one;
  return std::copysign(static_cast<float>((whole + up) * step), x);
}

void run_dither(const char* isa, const Format& format, Dither dither, const std::vector<float>& values,
                uint64_t seed, uint64_t first, Place place) {
  check::Case one("%s dither_%s n %zu from %g, seed %#llx first %llu, %s", isa, format.name, values.size(),
                  values.empty() ? 0.0 : double(values[0]), static_cast<unsigned long long>(seed),
                  static_cast<unsigned long long>(first), name_of(place));
  Row<float> x(place, values);
  dither(values.size(), seed, first, x.data());
  for (size_t i = 0; i < values.size(); ++i) {
    const float wanted = dithered(format, values[i], word_of(seed, first + i));
    check::expect(same(x[i], wanted) && std::signbit(x[i]) == std::signbit(values[i]),
                  "%.9g (%a) became %.9g, wanted %.9g", double(values[i]), double(values[i]), double(x[i]),
                  double(wanted));
  }
  check::expect(x.gaps_intact(), "wrote outside x");
}

void test_dither(const char* isa, const Format& format, Dither dither) {
  const std::vector<float> values = turning_points(format);
  const std::string name = std::string("dither_") + format.name;
  Random random(10);
  for (size_t n = 0; n <= 520; ++n) {
    std::vector<float> numbers(n);
    for (float& number : numbers) number = values[random.below(values.size())];
    if (!check::count_shape(name.c_str())) continue;
    for (Place place : kPlaces)
      run_dither(isa, format, dither, numbers, random.bits(), random.bits() >> n % 64, place);
  }
  for (size_t first = 0; first < values.size(); first += kChunk)
    run_dither(isa, format, dither,
               {values.begin() + static_cast<ptrdiff_t>(first),
                values.begin() + static_cast<ptrdiff_t>(std::min(first + kChunk, values.size()))},
               1, first, Place::kEnd);
}

// ---- pairs of neighbours down the columns ----

// Element (i, c) of out holds rows 2i (low half) and 2i + 1 of x (rows, cols). matches(x, bits) says whether
// the bits may stand for x.
template <class X, class Pair, class Matches>
void run_pair(const char* isa, const char* kernel, Pair pair, const std::vector<X>& values, size_t rows,
              size_t cols, size_t gap, Matches matches, Place place) {
  check::Case one("%s %s rows %zu cols %zu stride %zu, %s", isa, kernel, rows, cols, cols + gap,
                  name_of(place));
  Placed<X> x(rows, cols, {cols + gap}, place, values);
  Placed<Bf16Pair> out((rows + 1) / 2, cols, {cols}, place);
  pair(rows, cols, x.data(), cols + gap, out.data());
  for (size_t i = 0; i < (rows + 1) / 2; ++i)
    for (size_t c = 0; c < cols; ++c) {
      const uint32_t bits = static_cast<uint32_t>(out(i, c));
      const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
      check::expect(matches(values[2 * i * cols + c], low), "row %zu column %zu became %#x", 2 * i, c, low);
      check::expect(2 * i + 1 < rows ? matches(values[(2 * i + 1) * cols + c], high) : high == 0,
                    "row %zu column %zu became %#x", 2 * i + 1, c, high);
    }
  check::expect(out.gaps_intact() && x.untouched(values), "wrote outside its output");
}

void test_pairs(const KernelTable& table) {
  Random random(9);
  const auto narrowed = [](float x, uint16_t bits) {
    return std::isnan(x) ? is_nan(kBfloat16, bits) : bits == kBfloat16.nearest(x);
  };
  const auto copied = [](uint16_t x, uint16_t bits) { return x == bits; };
  for (size_t rows = 0; rows <= 9; ++rows)
    for (size_t cols = 0; cols <= 65; ++cols) {
      std::vector<float> numbers(rows * cols);
      for (float& number : numbers) number = of_bits(static_cast<uint32_t>(random.bits()));
      std::vector<uint16_t> patterns(rows * cols);
      for (uint16_t& pattern : patterns) pattern = static_cast<uint16_t>(random.bits());
      if (!check::count_shape("pair_rows") | !check::count_shape("pair_bits")) continue;
      const size_t gap = (rows + cols) % 3;
      for (Place place : kPlaces) {
        run_pair(table.isa, "pair_rows", table.convert.pair_rows, numbers, rows, cols, gap, narrowed, place);
        run_pair(table.isa, "pair_bits", table.convert.pair_bits, patterns, rows, cols, gap, copied, place);
      }
    }
}

}  // namespace

void test_conversions(const KernelTable& table) {
  const auto& convert = table.convert;
  test_format(table.isa, kBfloat16, convert.widen_bfloat16, convert.narrow_bfloat16);
  test_format(table.isa, kFloat16, convert.widen_float16, convert.narrow_float16);
  test_widening_while_flushing(table.isa, convert.widen_float16);
  test_narrowing_while_flushing(table);
  test_dither(table.isa, kBfloat16, convert.dither_bfloat16);
  test_dither(table.isa, kFloat16, convert.dither_float16);
  test_pairs(table);
}
