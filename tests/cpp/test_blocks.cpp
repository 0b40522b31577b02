// Low-bit blocks: every element is compared with its format's formula, which takes the block apart bit by bit
// and computes in double.
#include <string>

#include "block_elements.h"
#include "check.h"
#include "guarded.h"
#include "kernel_tests.h"
#include "numbers.h"

using namespace nplora;
using nplora::kernels::DecodedRows;
using nplora::kernels::KernelTable;
using nplora::kernels::kPanelColumns;
using nplora::kernels::Nf4;

namespace {

// A scale may be anything that 16 bits can be: subnormal, huge, negative, infinite, NaN. One in four is zero.
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
  size_t rows, row_blocks, first, sub_blocks, gap;
};

// The destination of decoded rows: one row after the other, or two separate panels.
struct Output {
  Layout layout;
  size_t apart;

  Output(size_t rows, size_t cols, size_t gap, bool two_panels)
      : layout{two_panels ? kPanelColumns + gap : cols + gap}, apart(0) {
    if (!two_panels) return;
    layout.panel = kPanelColumns;
    layout.panel_stride = rows * layout.row_stride + 5;
    apart = layout.panel_stride - kPanelColumns;
  }
  DecodedRows of(const Placed<float>& to) const { return {to.data(), layout.row_stride, apart}; }
};

template <class Block>
void run_decode(const KernelTable& table, BlockFormat format, const Shape& s, bool two_panels, Random& random,
                Place place) {
  const char* name = kBlockFormats[static_cast<size_t>(format)].name;
  check::Case one("%s decode %s rows %zu of %zu blocks, sub-blocks %zu from %zu, gap %zu, %s, %s", table.isa,
                  name, s.rows, s.row_blocks, s.sub_blocks, s.first, s.gap,
                  two_panels ? "two panels" : "rows", name_of(place));
  const size_t row_bytes = s.row_blocks * sizeof(Block), cols = s.sub_blocks * kSubBlock;
  std::vector<Block> blocks(s.rows * s.row_blocks);
  std::vector<uint8_t> bytes(s.rows * row_bytes);
  for (Block& block : blocks) {
    for (size_t i = 0; i < sizeof block; ++i)
      reinterpret_cast<uint8_t*>(&block)[i] = static_cast<uint8_t>(random.bits());
    draw_scales(random, block);
  }
  if (!bytes.empty()) std::memcpy(bytes.data(), blocks.data(), bytes.size());

  Placed<uint8_t> from(s.rows, row_bytes, {row_bytes + s.gap}, place, bytes);
  const Output output(s.rows, cols, s.gap, two_panels);
  Placed<float> to(s.rows, cols, output.layout, place);
  table.blocks.decode[static_cast<size_t>(format)](s.rows, s.first * kSubBlock, cols, from.data(),
                                                   row_bytes + s.gap, output.of(to));
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < cols; ++c) {
      const size_t col = s.first * kSubBlock + c;
      const Block& block = blocks[row * s.row_blocks + col / Block::kElements];
      const float wanted = static_cast<float>(element(block, col % Block::kElements));
      check::expect(same(to(row, c), wanted), "row %zu column %zu is %.9g, wanted %.9g", row, col,
                    double(to(row, c)), double(wanted));
    }
  check::expect(to.gaps_intact() && from.untouched(bytes), "wrote outside its output");
}

template <class Block>
void test_decode(const KernelTable& table, BlockFormat format) {
  constexpr size_t kSubBlocks = Block::kElements / kSubBlock;
  Random random(100 + static_cast<uint64_t>(format));
  const auto run = [&](const Shape& shape) {
    if (!check::count_shape(std::string("decode ") + kBlockFormats[static_cast<size_t>(format)].name)) return;
    for (Place place : kPlaces) {
      run_encode_blocks<Block>(table, format, shape, random, place);
      run_decode<Block>(table, format, shape, false, random, place);
      if (shape.sub_blocks * kSubBlock <= 2 * kPanelColumns)
        run_decode<Block>(table, format, shape, true, random, place);
    }
  };
  for (size_t rows = 0; rows <= 5; ++rows)
    for (size_t row_blocks = 1; row_blocks <= (kSubBlocks == 1 ? 13 : 3); ++row_blocks)
      for (size_t first = 0; first < row_blocks * kSubBlocks; ++first)
        for (size_t sub_blocks = 0; first + sub_blocks <= row_blocks * kSubBlocks;
             sub_blocks += 1 + sub_blocks / 4)
          run({rows, row_blocks, first, sub_blocks, (rows + first) % 4});
}

// The codes of blocks must be those of the decoded values.
template <class Block>
void run_encode_blocks(const KernelTable& table, BlockFormat format, const Shape& s, Random& random,
                       Place place) {
  check::Case one("%s encode blocks %s rows %zu of %zu blocks, sub-blocks %zu from %zu, gap %zu, %s",
                  table.isa, kBlockFormats[static_cast<size_t>(format)].name, s.rows, s.row_blocks,
                  s.sub_blocks, s.first, s.gap, name_of(place));
  const size_t row_bytes = s.row_blocks * sizeof(Block), cols = s.sub_blocks * kSubBlock;
  std::vector<uint8_t> bytes(s.rows * row_bytes);
  for (size_t i = 0; i < s.rows * s.row_blocks; ++i) {
    Block block;
    for (size_t j = 0; j < sizeof block; ++j)
      reinterpret_cast<uint8_t*>(&block)[j] = static_cast<uint8_t>(random.bits());
    draw_scales(random, block);
    std::memcpy(bytes.data() + i * sizeof block, &block, sizeof block);
  }
  Placed<uint8_t> from(s.rows, row_bytes, {row_bytes + s.gap}, place, bytes);
  std::vector<float> values(s.rows * cols), inverse_values(s.rows);
  table.blocks.decode[static_cast<size_t>(format)](s.rows, s.first * kSubBlock, cols, from.data(),
                                                   row_bytes + s.gap, {values.data(), cols});
  for (size_t row = 0; row < s.rows; ++row) {
    float largest = 0;
    for (size_t c = 0; c < cols; ++c) largest = std::max(largest, std::abs(values[row * cols + c]));
    inverse_values[row] = 1 / nplora::kernels::code_scale(largest).scale;
    if (!(largest >= 0x1p-119f && std::isfinite(largest))) inverse_values[row] = 0;
  }
  Row<float> inverses(place, inverse_values);
  Placed<uint8_t> codes(s.rows, cols, {cols + s.gap}, place);
  table.blocks.encode[static_cast<size_t>(format)](s.rows, s.first * kSubBlock, cols, from.data(),
                                                   row_bytes + s.gap, inverses.data(), 128, codes.data(),
                                                   cols + s.gap);
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < cols; ++c) {
      const float value = values[row * cols + c];
      if (!std::isfinite(value)) continue;
      volatile float product = value * inverse_values[row];
      const int wanted = 128 + static_cast<int>(std::nearbyint(double(product)));
      check::expect(codes(row, c) == wanted, "row %zu column %zu of %.9g is %d, wanted %d", row, c,
                    double(value), codes(row, c), wanted);
    }
  check::expect(codes.gaps_intact() && from.untouched(bytes), "wrote outside its output");
}

// ---- NF4 ----

struct Nf4Shape {
  size_t rows, cols, first, row_step;
  bool two_panels = false;
};

void run_nf4(const KernelTable& table, const Nf4Shape& s, bool nested, Random& random, Place place) {
  check::Case one("%s decode_nf4 rows %zu cols %zu from %zu step %zu, %s, %s, %s", table.isa, s.rows, s.cols,
                  s.first, s.row_step, s.two_panels ? "two panels" : "rows",
                  nested ? "absmax quantised" : "absmax float", name_of(place));
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
  const Output output(s.rows, s.cols, 3, s.two_panels);
  Placed<float> to(s.rows, s.cols, output.layout, place);
  table.blocks.decode_nf4(
      s.rows, s.cols,
      nested ? Nf4{codes.data(), nullptr, absmax_codes.data(), book.data(), scales.data(), offset}
             : Nf4{codes.data(), absmax.data(), nullptr, nullptr, nullptr, 0},
      s.first, s.row_step, output.of(to));
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < s.cols; ++c) {
      const size_t i = s.first + row * s.row_step + c, block = i / 64;
      // Rounded after each of the two operations.
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
    if (!check::count_shape("decode_nf4")) return;
    for (bool nested : {false, true})
      for (Place place : kPlaces) run_nf4(table, shape, nested, random, place);
  };
  for (size_t cols = 0; cols <= 200; ++cols)
    for (size_t rows : {1u, 2u, 5u}) run({rows, cols, random.below(140), cols + random.below(3)});
  for (size_t cols = 0; cols <= 2 * kPanelColumns; ++cols)
    for (size_t rows : {1u, 2u, 5u}) run({rows, cols, 16 * random.below(9), 16 * random.below(9), true});
  for (size_t first : {0u, 1u, 63u, 64u, 65u}) run({3, 1024, first, 1024});
  run({0, 64, 0, 64});
  run({2, 300 * 64, 5, 301 * 64});  // several groups of absmax
}

// ---- products of a few rows ----

struct DotShape {
  size_t m, rows, row_blocks, gap;
};

// Compares part (m, rows, lanes) with the sums of each lane's elements of W (rows, cols).
void expect_sums(const KernelTable& table, const DotShape& s, const std::vector<double>& w, size_t cols,
                 const Placed<float>& x, const Placed<float>& part, double gamma) {
  const size_t lanes = table.f32.lanes / 2;
  for (size_t t = 0; t < s.m; ++t)
    for (size_t row = 0; row < s.rows; ++row)
      for (size_t lane = 0; lane < lanes; ++lane) {
        double sum = 0, magnitude = 0;
        for (size_t k = lane; k < cols; k += lanes) {
          sum += w[row * cols + k] * double(x(t, k));
          magnitude += std::abs(w[row * cols + k] * double(x(t, k)));
        }
        const double got = part(0, (t * s.rows + row) * lanes + lane);
        check::expect(std::abs(got - sum) <= gamma * magnitude,
                      "token %zu row %zu lane %zu is %.9g, wanted %.9g", t, row, lane, got, sum);
      }
}

template <class Block>
void run_dots(const KernelTable& table, BlockFormat format, const DotShape& s, Random& random, Place place) {
  const char* name = kBlockFormats[static_cast<size_t>(format)].name;
  check::Case one("%s dots %s, %zu rows of x, %zu of %zu blocks, gap %zu, %s", table.isa, name, s.m, s.rows,
                  s.row_blocks, s.gap, name_of(place));
  const size_t row_bytes = s.row_blocks * sizeof(Block), cols = s.row_blocks * Block::kElements;
  std::vector<uint8_t> bytes(s.rows * row_bytes);
  std::vector<double> w;
  for (size_t i = 0; i < s.rows * s.row_blocks; ++i) {
    Block block;
    for (size_t j = 0; j < sizeof block; ++j)
      reinterpret_cast<uint8_t*>(&block)[j] = static_cast<uint8_t>(random.bits());
    block.d = draw_integer(random);
    if constexpr (requires { block.m; }) block.m = draw_integer(random);
    if constexpr (requires { block.dmin; }) block.dmin = draw_integer(random);
    for (size_t j = 0; j < Block::kElements; ++j) w.push_back(element(block, j));
    std::memcpy(bytes.data() + i * sizeof block, &block, sizeof block);
  }
  const std::vector<float> x_values = draw<float>(random, s.m * cols, Data::kIntegers);
  Placed<uint8_t> from(s.rows, row_bytes, {row_bytes + s.gap}, place, bytes);
  Placed<float> x(s.m, cols, {cols + s.gap}, place, x_values);
  Row<float> part(place, s.m * s.rows * table.f32.lanes / 2);
  table.block_dots.dots[static_cast<size_t>(format)](s.m, s.rows, cols, from.data(), row_bytes + s.gap,
                                                     x.data(), cols + s.gap, part.data(),
                                                     lines_at(from.data(), s.m + s.row_blocks));
  expect_sums(table, s, w, cols, x, part, 0);
  // With fractions, whose products are rounded, a token has the same bits alone.
  const std::vector<float> fractions = draw<float>(random, s.m * cols, Data::kUniform);
  const size_t all = s.rows * table.f32.lanes / 2;
  std::vector<float> together(s.m * all + 1), alone(all + 1);
  const auto dots = table.block_dots.dots[static_cast<size_t>(format)];
  dots(s.m, s.rows, cols, from.data(), row_bytes + s.gap, fractions.data(), cols, together.data(), {});
  for (size_t t = 0; t < s.m; ++t) {
    dots(1, s.rows, cols, from.data(), row_bytes + s.gap, fractions.data() + t * cols, cols, alone.data(),
         {});
    check::expect(std::memcmp(alone.data(), together.data() + t * all, all * sizeof(float)) == 0,
                  "token %zu differs alone", t);
  }
  check::expect(part.gaps_intact() && from.untouched(bytes) && x.untouched(x_values),
                "wrote outside its output");
}

void run_nf4_dots(const KernelTable& table, const DotShape& s, bool nested, Random& random, Place place) {
  check::Case one("%s dots_nf4, %zu rows of x, %zu of %zu blocks, gap %zu, %s, %s", table.isa, s.m, s.rows,
                  s.row_blocks, s.gap, nested ? "absmax quantised" : "absmax float", name_of(place));
  const size_t cols = s.row_blocks * BlockNf4::kElements, step = cols + s.gap * BlockNf4::kElements;
  const size_t first = s.gap * BlockNf4::kElements;
  const size_t n = s.rows == 0 ? 0 : first + (s.rows - 1) * step + cols, blocks = n / BlockNf4::kElements;
  std::vector<uint8_t> code_bytes(n / 2), absmax_bytes(blocks);
  for (uint8_t& byte : code_bytes) byte = static_cast<uint8_t>(random.bits());
  for (uint8_t& byte : absmax_bytes) byte = static_cast<uint8_t>(random.bits());
  const std::vector<float> absmax_values = draw<float>(random, blocks, Data::kUniform),
                           book_values = draw<float>(random, kNf4Book, Data::kUniform),
                           scale_values = draw<float>(random, blocks / kNf4Group + 1, Data::kUniform),
                           x_values = draw<float>(random, s.m * cols, Data::kUniform);
  Row<uint8_t> codes(place, code_bytes), absmax_codes(place, absmax_bytes);
  Row<float> absmax(place, absmax_values), book(place, book_values), scales(place, scale_values);
  Placed<float> x(s.m, cols, {cols + s.gap}, place, x_values);
  Row<float> part(place, s.m * s.rows * table.f32.lanes / 2);
  std::vector<double> w;
  for (size_t row = 0; row < s.rows; ++row)
    for (size_t c = 0; c < cols; ++c) {
      const size_t i = first + row * step + c, block = i / BlockNf4::kElements;
      const volatile float product = book_values[absmax_bytes[block]] * scale_values[block / kNf4Group];
      const float nested_absmax = product + 0.5f;
      const double level = kNf4Levels[i % 2 ? code_bytes[i / 2] & 15 : code_bytes[i / 2] >> 4];
      w.push_back(static_cast<float>(level * (nested ? nested_absmax : absmax_values[block])));
    }
  table.block_dots.dots_nf4(
      s.m, s.rows, cols,
      nested ? Nf4{codes.data(), nullptr, absmax_codes.data(), book.data(), scales.data(), 0.5f}
             : Nf4{codes.data(), absmax.data(), nullptr, nullptr, nullptr, 0},
      first, step, x.data(), cols + s.gap, part.data(), lines_at(codes.data(), s.m + s.row_blocks));
  expect_sums(table, s, w, cols, x, part, gamma<float>(2 * cols));
  check::expect(part.gaps_intact() && codes.untouched(code_bytes) && x.untouched(x_values),
                "wrote outside its output");
}

// Blocks of one sub-block are taken 16 at a time.
const std::vector<size_t> kFewBlocks{0, 1, 2, 3, 5, 7}, kManyBlocks{0, 1, 2, 3, 5, 16, 17, 33};

void for_dot_shapes(const std::string& kernel, const std::vector<size_t>& counts, const auto& run) {
  for (size_t m = 1; m <= nplora::kernels::kSmallBatch; ++m)
    for (size_t rows : {0u, 1u, 2u, 3u, 4u, 5u, 7u, 8u, 9u, 13u, 17u})
      for (size_t row_blocks : counts) {
        if (!check::count_shape(kernel)) continue;
        for (Place place : kPlaces) run(DotShape{m, rows, row_blocks, (m + rows) % 3}, place);
      }
}

template <class Block>
void test_dots_of(const KernelTable& table, BlockFormat format) {
  Random random(300 + static_cast<uint64_t>(format));
  for_dot_shapes(
      std::string("dots ") + kBlockFormats[static_cast<size_t>(format)].name,
      Block::kElements == kSubBlock ? kManyBlocks : kFewBlocks,
      [&](const DotShape& shape, Place place) { run_dots<Block>(table, format, shape, random, place); });
}

void test_nf4_dots(const KernelTable& table) {
  Random random(400);
  for_dot_shapes("dots_nf4", kFewBlocks, [&](const DotShape& shape, Place place) {
    for (bool nested : {false, true}) run_nf4_dots(table, shape, nested, random, place);
  });
}

}  // namespace

void test_blocks(const KernelTable& table) {
  for_block_types([&]<class Block>(BlockFormat format) {
    test_decode<Block>(table, format);
    test_dots_of<Block>(table, format);
  });
  test_nf4(table);
  test_nf4_dots(table);
}
