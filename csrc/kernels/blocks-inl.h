// Kernels for weights in low-bit blocks. They decode the blocks to float, or multiply rows of `x` by rows of
// blocks. One implementation serves every instruction set and every block format. Each kernel is documented
// in kernel_table.h. The decoders are in kernels/formats.
//
// In all formats except NF4, a decoded value is a product of two or three factors. The first factor is the
// scale of the block, a float16. The second factor is the scale of the sub-block, an integer. If the blocks
// of a format have a single sub-block, the second factor is missing. The last factor is the code, or the
// level that a table gives for the code. In some formats, a minimum is added to the product. The scale of the
// block has 11 significant bits. Together, the scale of the sub-block and the code have at most 12
// significant bits: 7 + 5 bits in Q6_K, and 5 + 7 bits in IQ4_XS. So the product fits into the 24 significant
// bits of a float and is exact. Rounding occurs only when the minimum is added. Therefore, a fused
// multiply-add gives the same value as a separate multiplication and addition.

namespace nplora::kernels::NPLORA_ISA {

inline float to_float(Half half) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  return _cvtsh_ss(__builtin_bit_cast(uint16_t, half));
#elif defined(NPLORA_SIMD_NEON)
  return __builtin_bit_cast(__fp16, half);
#else
  float value;
  const uint16_t bits = __builtin_bit_cast(uint16_t, half);
  widen_float16_portable(1, &bits, &value);
  return value;
#endif
}

// Copies the 16 bits of `half` into every lane and then converts all lanes to float. Converting one number
// first, and then copying the float to all lanes, would need a permutation.
inline Vec<float> broadcast(const Half& half) {
#if defined(NPLORA_SIMD_AVX512)
  return {_mm512_cvtph_ps(_mm256_set1_epi16(__builtin_bit_cast(int16_t, half)))};
#elif defined(NPLORA_SIMD_AVX2)
  return {_mm256_cvtph_ps(_mm_set1_epi16(__builtin_bit_cast(int16_t, half)))};
#else
  return Vec<float>::broadcast(to_float(half));
#endif
}
// Converts the four float16 numbers in `halves` to floats, and stores the floats in `to` (4). The lowest 16
// bits of `halves` are the first number.
inline void to_four_floats(uint64_t halves, float* to) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  _mm_storeu_ps(to, _mm_cvtph_ps(_mm_cvtsi64_si128(static_cast<long long>(halves))));
#else
  for (size_t i = 0; i < 4; ++i, halves >>= 16)
    to[i] = to_float(__builtin_bit_cast(Half, static_cast<uint16_t>(halves)));
#endif
}
inline Half negative(Half half) {
  return __builtin_bit_cast(Half, static_cast<uint16_t>(__builtin_bit_cast(uint16_t, half) ^ 0x8000));
}
// Makes the compiler store `values` in memory, so that one instruction can later load a value and copy it to
// all lanes. GCC would otherwise keep the values in a register and permute that register for each broadcast.
template <size_t kCount>
inline void keep_in_memory(float (&values)[kCount]) {
  asm("" : "+m"(values));
}

inline void put(const Floats& values, float* to) {
  for (size_t i = 0; i < kVectors; ++i) values.v[i].store(to + i * Vec<float>::kLanes);
}
// The functions below store d * q, or d * q + m for formats with a minimum m, where d is the scale and q is
// the code. For formats without a minimum, the functions do not add 0, because adding 0 would turn a product
// of -0 into +0.
inline void put(const Floats& q, Vec<float> d, float* to) {
  for (size_t i = 0; i < kVectors; ++i) (q.v[i] * d).store(to + i * Vec<float>::kLanes);
}
inline void put(const Floats& q, Vec<float> d, Vec<float> m, float* to) {
  for (size_t i = 0; i < kVectors; ++i) fma(q.v[i], d, m).store(to + i * Vec<float>::kLanes);
}
template <class To>
inline void put(const Floats& low, const Floats& high, Vec<float> d, To to) {
  put(low, d, to);
  put(high, d, to + kBytes);
}

// A destination for decoded values: the floats that begin at element `at` of a row of DecodedRows. The
// functions `put` store kBytes floats at a time, and these floats must be in the same panel. So if the row
// covers two panels, `at` must be a multiple of kBytes.
static_assert(kPanelColumns % kBytes == 0);
struct DecodedRow {
  float* row;
  size_t apart, at = 0;

  DecodedRow operator+(size_t elements) const { return {row, apart, at + elements}; }
  operator float*() const { return row + at + (at < kPanelColumns ? 0 : apart); }
};

// A destination for decoded values. The functions `put` store each value as an int8 code, which is the
// rounded product of the value and `inverse`, plus `offset` (see BlockDecoders::encode).
struct EncodedRow {
  uint8_t* codes;
  Vec<float> inverse;
  int32_t offset;

  EncodedRow operator+(size_t elements) const { return {codes + elements, inverse, offset}; }
};
inline Bytes encoded(const Floats& values, const EncodedRow& to) {
  LaneCodes codes[kVectors];
  for (size_t i = 0; i < kVectors; ++i) codes[i] = low_bytes(to_ints(values.v[i] * to.inverse) + to.offset);
  return load_bytes(codes);
}
inline void put(Bytes codes, const EncodedRow& to) {
  __builtin_memcpy(to.codes, &codes, sizeof codes);
}
inline void put(const Floats& values, const EncodedRow& to) {
  put(encoded(values, to), to);
}
inline void put(const Floats& q, Vec<float> d, const EncodedRow& to) {
  Floats values;
  for (size_t i = 0; i < kVectors; ++i) values.v[i] = q.v[i] * d;
  put(values, to);
}
inline void put(const Floats& q, Vec<float> d, Vec<float> m, const EncodedRow& to) {
  Floats values;
  for (size_t i = 0; i < kVectors; ++i) values.v[i] = fma(q.v[i], d, m);
  put(values, to);
}

// A sub-block of 4-bit codes can hold only sixteen different values, one for each possible nibble. If the
// destination stores int8 codes, nibbles_for converts these sixteen values to int8 codes. The nibble of an
// element is then an index into these sixteen int8 codes.
struct NibbleCodes {
  Bytes codes;
};
template <class To>
inline Nibbles nibbles_for(const To&, const Nibbles& values) {
  return values;
}
inline NibbleCodes nibbles_for(const EncodedRow& to, const Nibbles& values) {
  return {encoded(values.all(), to)};
}
inline Bytes low(const NibbleCodes& n, Bytes b) {
  return lookup(n.codes, low_nibbles(b));
}
inline Bytes high(const NibbleCodes& n, Bytes b) {
  return lookup(n.codes, high_nibbles(b));
}

// Whether each row of a tile loads the columns of `x` from memory again. With AVX2 and four tokens, there are
// too few registers to share the loaded columns: the compilers would store them on the stack. kMostBlockSums
// is below 8 only with AVX2.
template <size_t kTokens>
inline constexpr bool kReloadsX = kTokens > 2 && kMostBlockSums < 8;

// Hides the value of `column` from the compiler. After each call, the compiler loads the elements of `x` at
// this column again. `volatile` prevents the compiler from merging two calls with the same column.
inline void hide(size_t& column) {
  asm volatile("" : "+r"(column));
}

// A destination for decoded values. The functions `put` do not store the values, but multiply them by kTokens
// rows of `x`. The products for row t of `x` are added to the lanes of sums[t]. The order of the additions
// does not depend on the number of tokens.
template <size_t kTokens>
struct Dot {
  const float* const (&x)[kTokens];  // the rows of `x`
  Vec<float> (&sums)[kTokens];
  size_t at;  // the column of `x` that belongs to the next decoded element

  Dot operator+(size_t elements) const { return {x, sums, at + elements}; }
  Vec<float> x_of(size_t t, size_t i) const { return Vec<float>::load(x[t] + at + i * Vec<float>::kLanes); }
  void add(size_t i, Vec<float> w) const {
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) sums[t] = fma(w, x_of(t, i), sums[t]);
  }
};
template <size_t kTokens>
inline void put(const Floats& values, const Dot<kTokens>& to) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kVectors; ++i) to.add(i, values.v[i]);
}
template <size_t kTokens>
inline void put(const Floats& q, Vec<float> d, const Dot<kTokens>& to) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kVectors; ++i) to.add(i, q.v[i] * d);
}
template <size_t kTokens>
inline void put(const Floats& q, Vec<float> d, Vec<float> m, const Dot<kTokens>& to) {
#pragma GCC unroll 4
  for (size_t i = 0; i < kVectors; ++i) to.add(i, fma(q.v[i], d, m));
}

// Adds the products of a sub-block that has a single scale `d`. `low` and `high` are the first and the last
// kBytes codes of the sub-block. The function first sums the products of the codes and `x`, and then
// multiplies the sum by `d`. For a single token, this order takes fewer multiplications than multiplying each
// code by `d` first. With four tokens, `in_order` prevents Clang from computing the sums of all tokens at the
// same time, for which AVX2 has too few registers.
template <size_t kTokens>
inline void put(const Floats& low, const Floats& high, Vec<float> d, const Dot<kTokens>& to) {
#pragma GCC unroll 4
  for (size_t t = 0; t < kTokens; ++t) {
    Vec<float> sum = low.v[0] * to.x_of(t, 0);
#pragma GCC unroll 8
    for (size_t i = 1; i < kVectors; ++i) sum = fma(low.v[i], to.x_of(t, i), sum);
#pragma GCC unroll 8
    for (size_t i = 0; i < kVectors; ++i) sum = fma(high.v[i], to.x_of(t, kVectors + i), sum);
    sum = fma(sum, d, to.sums[t]);
    if (kTokens > 2) in_order(sum);
    to.sums[t] = sum;
  }
}

// ---- decoders of a single block ----

// A Decoder<Block> is made from one block, and holds the scales of the block as floats. The member function
// `sub_block(j, to)` decodes sub-block j, and calls `put` to pass the values to the destination `to`.
template <class Block>
struct Decoder;

// The fifth bits of the 32 codes of a sub-block, with one byte for each code. The byte of element i is 16 if
// bit i of `bits` is set, else 0. `low` holds elements 0 to 15, and `high` holds elements 16 to 31.
struct HighBits {
  Bytes low, high;
  explicit HighBits(const uint8_t (&bits)[4])
      : low(each_bit(static_cast<uint16_t>(bits[0] | bits[1] << 8), 16)),
        high(each_bit(static_cast<uint16_t>(bits[2] | bits[3] << 8), 16)) {}
};

// The factors of a block, and in some formats its minima, as floats in memory. A factor is the scale of the
// block times the scale of a sub-block (in some formats, of half a sub-block). `read` computes the factors
// and minima of a block. Formats whose sub-blocks have scales specialise this struct.
template <class Block>
struct Scales {
  void read(const Block&) {}
};

// The factors d * scale_j and the negated minima -dmin * min_j of the eight sub-blocks j of a Q4_K or Q5_K
// block. Elements 0 to 7 of the array `d` are the factors, and elements 8 to 15 of the array `m_from_8` are
// the negated minima.
template <class Block>
struct SubScales {
  alignas(64) float d[16], m_from_8[16];

  void read(const Block& block) {
    uint32_t low, middle, high;  // each holds four bytes of block.scales
    __builtin_memcpy(&low, block.scales, 4);
    __builtin_memcpy(&middle, block.scales + 4, 4);
    __builtin_memcpy(&high, block.scales + 8, 4);
    constexpr uint32_t kSix = 0x3F3F3F3F, kFour = 0x0F0F0F0F, kTwo = 0x30303030;
    const uint64_t d_codes = (low & kSix) | uint64_t((high & kFour) | ((low >> 2) & kTwo)) << 32;
    const uint64_t m_codes = (middle & kSix) | uint64_t(((high >> 4) & kFour) | ((middle >> 2) & kTwo)) << 32;
    const Floats codes = widen(pair(d_codes, m_codes));
    put(codes, broadcast(block.d), d);
    put(codes, broadcast(negative(block.dmin)), m_from_8);
    keep_in_memory(d);
    keep_in_memory(m_from_8);
  }
  Vec<float> scale(size_t j) const { return Vec<float>::broadcast(d[j]); }
  Vec<float> minus_min(size_t j) const { return Vec<float>::broadcast(m_from_8[8 + j]); }
};

// ---- rows of blocks ----
//
// Each kernel unit (isa_*.cpp) defines kUnrolledSubBlocks, the unroll factor of the loops over the sub-blocks
// of a block. It also defines kMostBlockSums: a tile has four rows of W if it then has at most kMostBlockSums
// vectors of sums. Otherwise, it has two rows.

// Before some columns of row i are decoded, the same columns of row i + kRowsAhead are prefetched. The
// hardware does not prefetch these columns, because it cannot detect a stream in the few bytes that are read
// from each row. `fetch_columns` prefetches the `bytes` bytes at `at`, but at most four cache lines.
constexpr size_t kRowsAhead = 8;
inline void fetch_columns(const void* at, size_t bytes) {
  constexpr size_t kMost = 4 * kCacheLine;
  bytes = smaller(bytes + kCacheLine, kMost);
  for (size_t line = 0; line < bytes; line += kCacheLine)
    __builtin_prefetch(static_cast<const char*>(at) + line);
}

// Decodes the columns [first, first + cols) of each row. The decoded values of row i are passed to the
// destination that destination(i) returns.
template <class Block, class Destination>
inline void decode_rows(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                        const Destination& destination) {
  constexpr size_t kSubBlocks = Block::kElements / kSubBlock;
  for (size_t row = 0; row < rows; ++row) {
    const Block* in_row =
        reinterpret_cast<const Block*>(static_cast<const uint8_t*>(blocks) + row * row_bytes);
    auto out = destination(row);
    fetch_columns(reinterpret_cast<const char*>(in_row + first / Block::kElements) + kRowsAhead * row_bytes,
                  cols / kSubBlock * sizeof(Block) / kSubBlocks);
    for (size_t sub_block = first / kSubBlock, end = (first + cols) / kSubBlock; sub_block < end;) {
      const Decoder<Block> block{in_row[sub_block / kSubBlocks]};
      const size_t j = sub_block % kSubBlocks, n = smaller(kSubBlocks - j, end - sub_block);
      // The loop is unrolled so that the index of the sub-block is a compile-time constant in each copy of
      // the loop body.
#pragma GCC unroll kUnrolledSubBlocks
      for (size_t i = 0; i < kSubBlocks; ++i)
        if (i - j < n) block.sub_block(i, out + (i - j) * kSubBlock);
      sub_block += n;
      out = out + n * kSubBlock;
    }
  }
}

template <class Block>
void decode(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
            const DecodedRows& to) {
  decode_rows<Block>(rows, first, cols, blocks, row_bytes,
                     [&](size_t row) { return DecodedRow{to.data + row * to.stride, to.apart}; });
}

template <class Block>
void encode_blocks(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes,
                   const float* inverses, uint8_t offset, uint8_t* codes, size_t codes_stride) {
  decode_rows<Block>(rows, first, cols, blocks, row_bytes, [&](size_t row) {
    return EncodedRow{codes + row * codes_stride, all_lanes(inverses[row]), offset};
  });
}

// ---- products of a few tokens with rows of blocks ----

// The rows of W are processed in groups, usually of kFewRows rows. All tokens are multiplied by the rows of a
// group before the next group is read. While a row is read, the same columns of a later row are prefetched.
// The function fetch_ahead returns the distance between the two rows in bytes. The distance is kFetchAhead,
// rounded up to a multiple of the size of `group` rows.
inline constexpr size_t kFewRows = 8;
inline size_t fetch_ahead(size_t row_bytes, size_t group = kFewRows) {
  const size_t few = group * row_bytes;
  return few == 0 ? 0 : ceil_div(kFetchAhead, few) * few;
}

// `next` describes the cache lines that the caller of the kernel wants to be prefetched. This function
// prefetches some of these lines into L2, and removes them from `next`. The rows of W are processed in groups
// of `group` rows. This function is called before each group, and `rows` is the number of rows that are not
// yet processed. Each call prefetches the fraction group / rows of the remaining lines. So all calls prefetch
// about the same number of lines.
inline void fetch_share(Fetch& next, size_t rows, size_t group = kFewRows) {
  const size_t n = rows <= group ? next.lines : ceil_div(next.lines * group, rows);
  next.lines -= n;
  for (const char* end = next.at + n * kCacheLine; next.at < end; next.at += kCacheLine)
    __builtin_prefetch(next.at, 0, 2);
}

// Creates the decoders of the blocks of a tile: up to kTogether neighbouring blocks in each of kRows rows.
// The pointer at[r] points to the first block of row r. `get(r, i)` returns the decoder of block i of row r.
inline constexpr size_t kTogether = 16;
template <class Block, size_t kRows>
struct Decoders {
  const Block* const (&at)[kRows];
  Decoders(const Block* const (&at)[kRows], size_t) : at(at) {}
  Decoder<Block> get(size_t r, size_t i) const { return Decoder<Block>{at[r][i]}; }
};

// The decoders of formats whose blocks have only one sub-block. One instruction converts the scales and
// minima of several rows to float. The floats are stored in `factors`, and `get` broadcasts them from there.
// Tiles of two rows use the general decoders above, because this conversion would not make such tiles faster.
template <class Block, size_t kRows>
  requires(Block::kElements == kSubBlock && kRows > 2)
struct Decoders<Block, kRows> {
  static constexpr size_t kFactors = requires(Block b) { b.m; } ? 2 : 1, kBits = kFactors * 8 * sizeof(Half);
  const Block* const (&at)[kRows];
  float factors[kTogether][kFactors * 4];

  Decoders(const Block* const (&at)[kRows], size_t n) : at(at) {
    static_assert(offsetof(Block, d) == 0);
    if constexpr (kFactors == 2) static_assert(offsetof(Block, m) == sizeof(Half));
    constexpr size_t kAtOnce = smaller(kRows, 64 / kBits);  // the factors of kAtOnce rows fit into `halves`
    for (size_t i = 0; i < n; ++i)
      for (size_t r = 0; r < kRows; r += kAtOnce) {
        uint64_t halves = 0;
        for (size_t k = kAtOnce; k-- > 0;) {
          uint64_t some = 0;
          // Copies the scale d and, in formats with minima, the minimum m that follows d.
          __builtin_memcpy(&some, at[r + k] + i, kFactors * sizeof(Half));
          halves = halves << kBits | some;
        }
        to_four_floats(halves, factors[i] + r * kFactors);
      }
  }
  Decoder<Block> get(size_t r, size_t i) const {
    const auto d = Vec<float>::broadcast(factors[i][r * kFactors]);
    if constexpr (kFactors == 1)
      return {at[r][i], d};
    else
      return {at[r][i], d, Vec<float>::broadcast(factors[i][r * kFactors + 1])};
  }
};

template <class Block>
struct BlockRows {
  static constexpr size_t kElements = Block::kElements;
  const uint8_t* blocks;
  size_t row_bytes;
  size_t ahead = fetch_ahead(row_bytes);

  // Decodes the first `cols` columns of the rows rows[0] to rows[kRows - 1] of W, block by block. A sub-block
  // is decoded in all rows before the next one, so that the rows can share the loaded columns of `x` (see
  // kReloadsX). The values of the block that begins at column i of row rows[r] are passed to the destination
  // that to(r, i) returns.
  template <size_t kRows, class To>
  [[gnu::always_inline]] void add(const size_t (&rows)[kRows], size_t cols, const To& to) const {
    const Block* at[kRows];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) at[r] = reinterpret_cast<const Block*>(blocks + rows[r] * row_bytes);
    for (size_t first = 0; first < cols / kElements; first += kTogether) {
      const size_t n = smaller(kTogether, cols / kElements - first);
      const Decoders<Block, kRows> decoders(at, n);
      for (size_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
        for (size_t r = 0; r < kRows; ++r)
          for (size_t line = 0; line < sizeof(Block); line += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const uint8_t*>(at[r] + i) + ahead + line, 0, 2);
        const auto decode = [&](const auto&... blocks) __attribute__((always_inline)) {
#pragma GCC unroll kUnrolledSubBlocks
          for (size_t j = 0; j < kElements / kSubBlock; ++j) {
            size_t r = 0;
            (blocks.sub_block(j, to(r++, (first + i) * kElements) + j * kSubBlock), ...);
          }
        };
        if constexpr (kElements == kSubBlock) {
          // Each decoder is used once. So it is made just before its use, which takes fewer registers.
#pragma GCC unroll 4
          for (size_t r = 0; r < kRows; ++r) decoders.get(r, i).sub_block(0, to(r, (first + i) * kElements));
        } else if constexpr (kRows == 2) {
          decode(decoders.get(0, i), decoders.get(1, i));
        } else {
          decode(decoders.get(0, i), decoders.get(1, i), decoders.get(2, i), decoders.get(3, i));
        }
      }
#pragma GCC unroll 4
      for (size_t r = 0; r < kRows; ++r) at[r] += n;
    }
  }
};

// Multiplies kTokens rows of `x` by kRows rows of W, beginning with row `first`. The sums are stored in
// `part` (kTokens, all, kLanes), where `all` is the number of rows of W. `rows` is the number of rows that
// are left in the group. If `rows` is less than kRows, the last row is computed several times, but its sums
// are stored only once.
template <size_t kTokens, size_t kRows, class Rows>
inline void dot_tile(const Rows& w, size_t first, size_t rows, size_t cols, const float* x, size_t x_stride,
                     float* part, size_t all) {
  constexpr size_t kLanes = Vec<float>::kLanes;
  Vec<float> sums[kRows][kTokens];
#pragma GCC unroll 16
  for (size_t i = 0; i < kRows * kTokens; ++i) sums[i / kTokens][i % kTokens] = Vec<float>::zero();
  size_t all_rows[kRows];
  for (size_t r = 0; r < kRows; ++r) all_rows[r] = first + smaller(r, rows - 1);
  const float* x_rows[kTokens];
#pragma GCC unroll 4
  for (size_t t = 0; t < kTokens; ++t) {
    x_rows[t] = x + t * x_stride;
    if constexpr (kReloadsX<kTokens>) keep(x_rows[t]);
  }
  // A local copy: Clang assumes that a prefetch changes memory, and would load the members of `w` again after
  // each prefetch.
  const Rows own = w;
  own.add(all_rows, cols, [&](size_t r, size_t i) __attribute__((always_inline)) {
    if constexpr (kReloadsX<kTokens>) hide(i);
    return Dot<kTokens>{x_rows, sums[r], i};
  });
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens && r < rows; ++t) sums[r][t].store(part + (t * all + first + r) * kLanes);
}

struct RowRange {
  size_t first, count;
};

// Multiplies `m` tokens by the rows `few` of W. The tokens are processed in groups of 4, and the remaining
// tokens in groups of 2 and 1. The first group brings the rows of W into L1, and the later groups read the
// rows from L1.
template <size_t kTokens, class Rows>
inline void dot_tiles(const Rows& w, RowRange few, size_t m, size_t cols, const float* x, size_t x_stride,
                      float* part, size_t all) {
  constexpr size_t kRows = 4 * kTokens <= kMostBlockSums ? 4 : 2;
  for (; m >= kTokens; m -= kTokens, x += kTokens * x_stride, part += kTokens * all * Vec<float>::kLanes)
    for (size_t i = 0; i < few.count; i += kRows)
      dot_tile<kTokens, kRows>(w, few.first + i, few.count - i, cols, x, x_stride, part, all);
  if constexpr (kTokens > 1) dot_tiles<kTokens / 2>(w, few, m, cols, x, x_stride, part, all);
}

template <class Rows>
inline void dot_rows(const Rows& w, size_t m, size_t rows, size_t cols, const float* x, size_t x_stride,
                     float* part, Fetch next) {
  for (size_t i = 0; i < rows; i += kFewRows) {
    fetch_share(next, rows - i);
    dot_tiles<4>(w, {i, smaller(kFewRows, rows - i)}, m, cols, x, x_stride, part, rows);
  }
}

template <class Block>
void dot_blocks(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes, const float* x,
                size_t x_stride, float* part, const Fetch& next) {
  dot_rows(BlockRows<Block>{static_cast<const uint8_t*>(blocks), row_bytes}, m, rows, cols, x, x_stride, part,
           next);
}

}  // namespace nplora::kernels::NPLORA_ISA
