// Products in int8, compared with the formulas of the blocks and of x, computed in double.
#include <string>

#include "block_elements.h"
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using nplora::kernels::KernelTable;

namespace {

// ---- x to int8 ----

void run_quantize(const KernelTable& table, size_t n, Data data, Random& random, Place place) {
  check::Case one("%s int8 quantize %zu %s, %s", table.isa, n, name_of(data), name_of(place));
  std::vector<float> values = draw<float>(random, n, data);
  for (size_t i = 0; i < n; i += kSubBlock)
    if (random.below(8) == 0)
      std::fill_n(values.begin() + long(i), kSubBlock, random.below(2) ? 0.0f : 0x1p-125f);
  Row<float> x(place, values), scales(place, n / kSubBlock), sums(place, n / kSubBlock),
      half_sums(place, n / kSubBlock * 2);
  Row<int8_t> codes(place, n);
  table.int8.quantize_sub_blocks(n, x.data(), codes.data(), scales.data(), sums.data(), half_sums.data());
  for (size_t sub_block = 0; sub_block < n / kSubBlock; ++sub_block) {
    double largest = 0;
    bool finite = true;
    for (size_t i = 0; i < kSubBlock; ++i) {
      largest = std::max(largest, std::abs(double(values[sub_block * kSubBlock + i])));
      finite &= std::isfinite(values[sub_block * kSubBlock + i]);
    }
    const bool zero = finite && largest < 0x1p-119;
    const float scale = zero ? 0 : finite ? float(float(largest) / 127.0f) : NAN;
    check::expect(same(scales[sub_block], scale), "scale %zu is %.9g, wanted %.9g", sub_block,
                  double(scales[sub_block]), double(scale));
    double sum = 0, halves[2] = {};
    for (size_t i = 0; i < kSubBlock; ++i) {
      const int code = codes[sub_block * kSubBlock + i];
      sum += code;
      halves[i / (kSubBlock / 2)] += code;
      const double wanted = zero || !finite ? 0 : double(values[sub_block * kSubBlock + i]) / double(scale);
      check::expect(std::abs(code - wanted) <= 0.5 + 127 * 2 * 0x1p-23 && std::abs(code) <= 127,
                    "code %zu of sub-block %zu is %d, wanted %.9g", i, sub_block, code, wanted);
    }
    check::expect(same(sums[sub_block], finite ? scale * float(sum) : NAN), "sum %zu is %.9g, wanted %.9g",
                  sub_block, double(sums[sub_block]), double(scale) * sum);
    for (size_t i = 0; i < 2; ++i)
      check::expect(same(half_sums[2 * sub_block + i], finite ? scale * float(halves[i]) : NAN),
                    "sum %zu of sub-block %zu is %.9g, wanted %.9g", i, sub_block,
                    double(half_sums[2 * sub_block + i]), double(scale) * halves[i]);
  }
  check::expect(codes.gaps_intact() && scales.gaps_intact() && sums.gaps_intact() &&
                    half_sums.gaps_intact() && x.untouched(values),
                "wrote outside its outputs");
}

void test_quantize_rows(const KernelTable& table) {
  Random random(500);
  for (size_t sub_blocks = 0; sub_blocks <= 130; ++sub_blocks)
    for (Data data : kAllData) {
      if (!check::count_shape("int8 quantize")) continue;
      for (Place place : kPlaces) run_quantize(table, sub_blocks * kSubBlock, data, random, place);
    }
}

// ---- products ----

struct Shape {
  size_t m, rows, row_blocks, gap;
};

// The largest magnitude of an element's two terms: |a code| + |b|.
template <class Block>
double extent(const Block& block) {
  const double d = std::abs(value(block.d));
  if constexpr (requires { block.m; }) return 31 * d + std::abs(value(block.m));
  if constexpr (requires { block.dmin; }) return 63 * (31 * d + std::abs(value(block.dmin)));
  return Block::kElements == kSubBlock ? 128 * d : 128 * 32 * d;
}

template <class Block>
void run_dots(const KernelTable& table, BlockFormat format, const Shape& s, Random& random, Place place) {
  const char* name = kBlockFormats[static_cast<size_t>(format)].name;
  check::Case one("%s int8 dots %s, %zu rows of x, %zu of %zu blocks, gap %zu, %s", table.isa, name, s.m,
                  s.rows, s.row_blocks, s.gap, name_of(place));
  const size_t row_bytes = s.row_blocks * sizeof(Block), cols = s.row_blocks * Block::kElements,
               sub_blocks = cols / kSubBlock;
  std::vector<Block> blocks(s.rows * s.row_blocks);
  std::vector<uint8_t> bytes(s.rows * row_bytes);
  const uint64_t extreme = random.below(3);  // in every third matrix all bits are set: the largest codes
  for (Block& block : blocks) {
    for (size_t i = 0; i < sizeof block; ++i)
      reinterpret_cast<uint8_t*>(&block)[i] = static_cast<uint8_t>(extreme == 0 ? 0xFF : random.bits());
    if constexpr (std::is_same_v<Block, BlockQ8_0>)
      if (extreme == 1) std::fill_n(block.q, kSubBlock, int8_t(-128));
    block.d = draw_integer(random);
    if constexpr (requires { block.m; }) block.m = draw_integer(random);
    if constexpr (requires { block.dmin; }) block.dmin = draw_integer(random);
  }
  if (!bytes.empty()) std::memcpy(bytes.data(), blocks.data(), bytes.size());
  std::vector<int8_t> code_values(s.m * cols);
  std::vector<float> scale_values(s.m * sub_blocks), sum_values(s.m * sub_blocks),
      half_values(2 * s.m * sub_blocks);
  for (int8_t& code : code_values)
    code = static_cast<int8_t>(extreme < 2 ? (random.below(9) ? 127 : -127) : int(random.below(255)) - 127);
  for (size_t i = 0; i < scale_values.size(); ++i) {
    scale_values[i] = float(int(random.below(4)) - 1);
    for (size_t j = 0; j < kSubBlock; ++j) {
      sum_values[i] += scale_values[i] * float(code_values[i * kSubBlock + j]);
      half_values[2 * i + j / (kSubBlock / 2)] += scale_values[i] * float(code_values[i * kSubBlock + j]);
    }
  }
  Placed<uint8_t> from(s.rows, row_bytes, {row_bytes + s.gap}, place, bytes);
  Row<int8_t> codes(place, code_values);
  Row<float> scales(place, scale_values), sums(place, sum_values), half_sums(place, half_values),
      y(place, s.m * s.rows);
  table.int8.dots[static_cast<size_t>(format)](s.m, s.rows, cols, from.data(), row_bytes + s.gap,
                                               {codes.data(), scales.data(), sums.data(), half_sums.data()},
                                               y.data(), lines_at(from.data(), s.m + s.row_blocks));
  for (size_t t = 0; t < s.m; ++t)
    for (size_t row = 0; row < s.rows; ++row) {
      double sum = 0, magnitude = 0;
      for (size_t k = 0; k < cols; ++k) {
        const Block& block = blocks[row * s.row_blocks + k / Block::kElements];
        const double x = double(scale_values[(t * cols + k) / kSubBlock]) * code_values[t * cols + k];
        sum += element(block, k % Block::kElements) * x;
        magnitude += extent(block) * std::abs(x);
      }
      // Integers up to 2^24 are exact in float, in any order.
      const double bound = magnitude < 0x1p24 ? 0 : gamma<float>(2 * sub_blocks + 16) * magnitude;
      check::expect(std::abs(double(y[t * s.rows + row]) - sum) <= bound,
                    "token %zu row %zu is %.9g, wanted %.9g", t, row, double(y[t * s.rows + row]), sum);
    }
  check::expect(y.gaps_intact() && from.untouched(bytes) && codes.untouched(code_values) &&
                    scales.untouched(scale_values) && sums.untouched(sum_values) &&
                    half_sums.untouched(half_values),
                "wrote outside its output");
}

template <class Block>
void test_dots_of(const KernelTable& table, BlockFormat format) {
  Random random(600 + static_cast<uint64_t>(format));
  const size_t most_blocks = Block::kElements == kSubBlock ? 9 : 3;
  for (size_t m = 1; m <= nplora::kernels::kSmallBatch; ++m)
    for (size_t rows : {0u, 1u, 2u, 3u, 4u, 5u, 7u, 8u, 9u, 13u, 17u, 26u})
      for (size_t row_blocks = 0; row_blocks <= most_blocks; row_blocks += 1 + row_blocks / 3) {
        for (size_t again = 0; again < 6 / most_blocks + 1; ++again) {
          if (!check::count_shape(std::string("int8 dots ") +
                                  kBlockFormats[static_cast<size_t>(format)].name))
            continue;
          for (Place place : kPlaces)
            run_dots<Block>(table, format, {m, rows, row_blocks, (m + rows + again) % 3}, random, place);
        }
      }
}

}  // namespace

void test_int8(const KernelTable& table) {
  test_quantize_rows(table);
  for_block_types([&]<class Block>(BlockFormat format) { test_dots_of<Block>(table, format); });
}
