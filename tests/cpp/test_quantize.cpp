// The quantisers between guard pages, on numbers from subnormal to the largest of the format. How small their
// errors are is tested in tests/core/test_blocks.py.
#include <algorithm>
#include <string>

#include "block_elements.h"
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"
#include "ops/quantizers/quantize.h"

using namespace nplora;

namespace {

// Blocks of several kinds: zeros, constants, one outlier, one sign, or anything; all of one magnitude, or of
// any magnitudes.
std::vector<float> draw_values(Random& random, size_t n, double largest) {
  const double size = std::ldexp(1.0, -static_cast<int>(random.below(170))) * largest;
  const size_t kind = random.below(6);
  std::vector<float> x(n);
  for (float& v : x) {
    double value = random.uniform();
    if (kind == 0) value = 0;
    if (kind == 1) value = 1;
    if (kind == 2 && random.below(n) != 0) value *= 1e-3;
    if (kind == 3) value = std::abs(value);
    if (kind == 4) value = -std::abs(value);
    if (kind == 5) value = std::ldexp(value, -static_cast<int>(random.below(150)));
    v = static_cast<float>(value * size);
  }
  return x;
}

// Every value must come back within `step` of its block's absmax, or within what float16's smallest numbers
// can scale.
template <class Block>
void test_format(BlockFormat format) {
  constexpr double largest = Block::kFacts.largest, step = kQuantizedWithin<Block>;
  const char* name = kBlockFormats[static_cast<size_t>(format)].name;
  const auto decode = kernels::table().blocks.decode[static_cast<size_t>(format)];
  Random random(300 + static_cast<uint64_t>(format));
  for (size_t i = 0; i < 1000; ++i) {
    if (!check::count_shape(std::string("quantize ") + name)) continue;
    const size_t blocks = i % 5, n = blocks * Block::kElements;
    const Place place = kPlaces[i / 5 % 2];
    check::Case one("quantize %s, %zu blocks, case %zu, %s", name, blocks, i, name_of(place));
    std::vector<float> values;
    for (size_t b = 0; b < blocks; ++b) {
      const std::vector<float> block = draw_values(random, Block::kElements, largest);
      values.insert(values.end(), block.begin(), block.end());
    }
    Row<float> x(place, values);
    Placed<Block> out(1, blocks, {blocks}, place);
    quantize_blocks(blocks, x.data(), out.data());
    std::vector<float> decoded(n);
    decode(1, 0, n, out.data(), 0, {decoded.data(), n});
    for (size_t b = 0; b < blocks; ++b) {
      const auto first = values.begin() + static_cast<ptrdiff_t>(b * Block::kElements);
      double absmax = 0;
      std::for_each(first, first + Block::kElements,
                    [&](float v) { absmax = std::max(absmax, double(std::abs(v))); });
      for (size_t j = b * Block::kElements; j < (b + 1) * Block::kElements; ++j)
        check::expect(std::abs(double(decoded[j]) - values[j]) <= step * absmax + 0x1p-18,
                      "%.9g became %.9g in a block of %g", double(values[j]), double(decoded[j]), absmax);
    }
    check::expect(out.gaps_intact() && x.untouched(values), "wrote outside its output");
  }
}

void test_nf4() {
  Random random(400);
  for (size_t n = 0; n <= 64; ++n)
    for (size_t i = 0; i < 20; ++i) {
      if (!check::count_shape("quantize nf4")) continue;
      const Place place = kPlaces[i % 2];
      check::Case one("quantize nf4, %zu values, case %zu, %s", n, i, name_of(place));
      const std::vector<float> values = draw_values(random, n, 3e38);
      Row<float> x(place, values);
      Row<uint8_t> codes(place, (n + 1) / 2);
      const float absmax = quantize_nf4_block(n, x.data(), codes.data());
      for (size_t j = 0; j < n; ++j) {
        const double level = kNf4Levels[j % 2 ? codes[j / 2] & 15 : codes[j / 2] >> 4];
        // Half the widest gap between levels.
        check::expect(std::abs(level * absmax - values[j]) <= 0.152 * absmax + 1e-38,
                      "%.9g became %.9g of %g", double(values[j]), level, double(absmax));
      }
      check::expect(codes.gaps_intact() && x.untouched(values), "wrote outside its output");
    }

  float book[kNf4Book];
  dynamic_book(book);
  for (size_t n = 0; n <= kNf4Group; n += 1 + n / 8) {
    const Place place = kPlaces[n % 2];
    check::Case one("quantize a group of %zu absmax, %s", n, name_of(place));
    const std::vector<float> values = draw_values(random, n, 3e38);
    Row<float> x(place, values);
    Row<uint8_t> codes(place, n);
    const float scale = quantize_nf4_group(n, x.data(), book, codes.data());
    for (size_t j = 0; j < n; ++j)
      check::expect(std::abs(double(book[codes[j]]) * scale - values[j]) <= 0.0071 * scale + 1e-38,
                    "%.9g became %.9g of %g", double(values[j]), double(book[codes[j]]), double(scale));
    check::expect(codes.gaps_intact() && x.untouched(values), "wrote outside its output");
  }
}

}  // namespace

void test_quantize() {
  for_block_types([]<class Block>(BlockFormat format) { test_format<Block>(format); });
  test_nf4();
}
