// Low-bit blocks: every element against the formula of its format, taken bit by bit from the block and computed in double.
#include <string>

#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using namespace nplora;
using nplora::kernels::KernelTable;
using nplora::kernels::Nf4;

namespace {

// By the definition of float16, so that nothing of what is tested is used.
double value(Half half) {
  const int bits = half.bytes[0] | half.bytes[1] << 8, exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(fraction + (exponent ? 1024 : 0), std::max(exponent, 1) - 25);
}

int bit(const uint8_t* bytes, size_t i) {
  return bytes[i / 8] >> (i % 8) & 1;
}

// Elements 0 ... n / 2 - 1 in the low halves of the bytes, the others in the high ones.
int nibble(const uint8_t* bytes, size_t n, size_t i) {
  return i < n / 2 ? bytes[i] & 15 : bytes[i - n / 2] >> 4;
}

// ---- element i of a block; products and sums of these few bits are exact in double ----

double element(const BlockQ4_0& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) - 8);
}
double element(const BlockQ4_1& b, size_t i) {
  return value(b.d) * nibble(b.q, 32, i) + value(b.m);
}
double element(const BlockQ5_0& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) + 16 * bit(b.high, i) - 16);
}
double element(const BlockQ5_1& b, size_t i) {
  return value(b.d) * (nibble(b.q, 32, i) + 16 * bit(b.high, i)) + value(b.m);
}
double element(const BlockQ8_0& b, size_t i) {
  return value(b.d) * b.q[i];
}

int scale(const uint8_t* s, size_t j) {
  return j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
}
int minimum(const uint8_t* s, size_t j) {
  return j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
}
double element(const BlockQ4_K& b, size_t i) {
  const int q = nibble(b.q + i / 64 * 32, 64, i % 64);
  return value(b.d) * scale(b.scales, i / 32) * q - value(b.dmin) * minimum(b.scales, i / 32);
}
double element(const BlockQ5_K& b, size_t i) {
  const int q = nibble(b.q + i / 64 * 32, 64, i % 64) + 16 * (b.high[i % 32] >> (i / 32) & 1);
  return value(b.d) * scale(b.scales, i / 32) * q - value(b.dmin) * minimum(b.scales, i / 32);
}
double element(const BlockQ6_K& b, size_t i) {
  const size_t half = i / 128, l = i % 128;
  const int q = nibble(b.low + half * 64, 128, l) + 16 * (b.high[half * 32 + l % 32] >> (2 * (l / 32)) & 3);
  return value(b.d) * b.scales[i / 16] * (q - 32);
}

// A scale is anything that 16 bits can be: subnormal, huge, negative, infinite, NaN; one in four is zero.
Half draw_half(Random& random) {
  if (random.below(4) == 0) return {{0, static_cast<uint8_t>(random.below(2) * 128)}};
  return {{static_cast<uint8_t>(random.bits()), static_cast<uint8_t>(random.bits())}};
}
void draw_scales(Random& random, auto& block) {
  block.d = draw_half(random);
  if constexpr (requires { block.m; }) block.m = draw_half(random);
  if constexpr (requires { block.dmin; }) block.dmin = draw_half(random);
}

struct Shape {
  size_t rows, row_blocks, first, strips, gap;
};

template <class Block>
void run_decode(const KernelTable& table, BlockFormat format, const Shape& s, Random& random, Place place) {
  const char* name = kBlockFormats[static_cast<size_t>(format)].name;
  check::Case one("%s decode %s rows %zu of %zu blocks, strips %zu from %zu, gap %zu, %s", table.isa, name,
                  s.rows, s.row_blocks, s.strips, s.first, s.gap, name_of(place));
  const size_t row_bytes = s.row_blocks * sizeof(Block), cols = s.strips * kStrip;
  std::vector<Block> blocks(s.rows * s.row_blocks);
  std::vector<uint8_t> bytes(s.rows * row_bytes);
  for (Block& block : blocks) {
    for (size_t i = 0; i < sizeof block; ++i)
      reinterpret_cast<uint8_t*>(&block)[i] = static_cast<uint8_t>(random.bits());
    draw_scales(random, block);
  }
  if (!bytes.empty()) std::memcpy(bytes.data(), blocks.data(), bytes.size());

  Placed<uint8_t> from(s.rows, row_bytes, {row_bytes + s.gap}, place, bytes);
  Placed<float> to(s.rows, cols, {cols + s.gap}, place);
  table.blocks.decode[static_cast<size_t>(format)](s.rows, s.first * kStrip, cols, from.data(),
                                                   row_bytes + s.gap, to.data(), cols + s.gap);
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < cols; ++c) {
      const size_t col = s.first * kStrip + c;
      const Block& block = blocks[row * s.row_blocks + col / Block::kElements];
      const float wanted = static_cast<float>(element(block, col % Block::kElements));
      check::expect(same(to(row, c), wanted), "row %zu column %zu is %.9g, wanted %.9g", row, col,
                    double(to(row, c)), double(wanted));
    }
  check::expect(to.gaps_intact() && from.untouched(bytes), "wrote outside its output");
}

template <class Block>
void test_decode(const KernelTable& table, BlockFormat format) {
  constexpr size_t kStrips = Block::kElements / kStrip;
  Random random(100 + static_cast<uint64_t>(format));
  const auto run = [&](const Shape& shape) {
    check::count_shape(std::string("decode ") + kBlockFormats[static_cast<size_t>(format)].name);
    for (Place place : kPlaces) run_decode<Block>(table, format, shape, random, place);
  };
  for (size_t rows = 0; rows <= 5; ++rows)
    for (size_t row_blocks = 1; row_blocks <= (kStrips == 1 ? 13 : 3); ++row_blocks)
      for (size_t first = 0; first < row_blocks * kStrips; ++first)
        for (size_t strips = 0; first + strips <= row_blocks * kStrips; strips += 1 + strips / 4)
          run({rows, row_blocks, first, strips, (rows + first) % 4});
}

// ---- NF4 ----

struct Nf4Shape {
  size_t rows, cols, first, row_step;
};

void run_nf4(const KernelTable& table, const Nf4Shape& s, bool nested, Random& random, Place place) {
  check::Case one("%s decode_nf4 rows %zu cols %zu from %zu step %zu, %s, %s", table.isa, s.rows, s.cols,
                  s.first, s.row_step, nested ? "absmax quantised" : "absmax float", name_of(place));
  const size_t n = s.rows == 0 ? 0 : s.first + (s.rows - 1) * s.row_step + s.cols;
  const size_t blocks = (n + 63) / 64, groups = (blocks + kNf4Group - 1) / kNf4Group;
  std::vector<uint8_t> code_bytes((n + 1) / 2), absmax_bytes(blocks);
  for (uint8_t& byte : code_bytes) byte = static_cast<uint8_t>(random.bits());
  for (uint8_t& byte : absmax_bytes) byte = static_cast<uint8_t>(random.bits());
  const std::vector<float> absmax_values = draw<float>(random, blocks, Data::kSpecial),
                           book_values = draw<float>(random, 256, Data::kUniform),
                           scale_values = draw<float>(random, groups, Data::kUniform);
  const float offset = static_cast<float>(random.uniform());

  Row<uint8_t> codes(place, code_bytes), absmax_codes(place, absmax_bytes);
  Row<float> absmax(place, absmax_values), book(place, book_values), scales(place, scale_values);
  Placed<float> to(s.rows, s.cols, {s.cols + 3}, place);
  table.blocks.decode_nf4(
      s.rows, s.cols,
      nested ? Nf4{codes.data(), nullptr, absmax_codes.data(), book.data(), scales.data(), offset}
             : Nf4{codes.data(), absmax.data(), nullptr, nullptr, nullptr, 0},
      s.first, s.row_step, to.data(), s.cols + 3);
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < s.cols; ++c) {
      const size_t i = s.first + row * s.row_step + c, block = i / 64;
      // Rounded after each of its two operations.
      const volatile float product = book_values[absmax_bytes[block]] * scale_values[block / kNf4Group];
      const float nested_absmax = product + offset;
      const double level = kNf4Levels[i % 2 ? code_bytes[i / 2] & 15 : code_bytes[i / 2] >> 4];
      const float wanted = static_cast<float>(level * (nested ? nested_absmax : absmax_values[block]));
      check::expect(same(to(row, c), wanted), "row %zu column %zu is %.9g, wanted %.9g", row, c,
                    double(to(row, c)), double(wanted));
    }
  check::expect(to.gaps_intact() && codes.untouched(code_bytes) && absmax.untouched(absmax_values) &&
                    absmax_codes.untouched(absmax_bytes) && scales.untouched(scale_values) &&
                    book.untouched(book_values),
                "wrote outside its output");
}

void test_nf4(const KernelTable& table) {
  Random random(200);
  const auto run = [&](const Nf4Shape& shape) {
    check::count_shape("decode_nf4");
    for (bool nested : {false, true})
      for (Place place : kPlaces) run_nf4(table, shape, nested, random, place);
  };
  for (size_t cols = 0; cols <= 200; ++cols)
    for (size_t rows : {1u, 2u, 5u}) run({rows, cols, random.below(140), cols + random.below(3)});
  for (size_t first : {0u, 1u, 63u, 64u, 65u}) run({3, 1024, first, 1024});
  run({0, 64, 0, 64});
  run({2, 300 * 64, 5, 301 * 64});  // several groups of absmax
}

}  // namespace

void test_blocks(const KernelTable& table) {
  test_decode<BlockQ4_0>(table, BlockFormat::kQ4_0);
  test_decode<BlockQ4_1>(table, BlockFormat::kQ4_1);
  test_decode<BlockQ5_0>(table, BlockFormat::kQ5_0);
  test_decode<BlockQ5_1>(table, BlockFormat::kQ5_1);
  test_decode<BlockQ8_0>(table, BlockFormat::kQ8_0);
  test_decode<BlockQ4_K>(table, BlockFormat::kQ4_K);
  test_decode<BlockQ5_K>(table, BlockFormat::kQ5_K);
  test_decode<BlockQ6_K>(table, BlockFormat::kQ6_K);
  test_nf4(table);
}
