// Products of a few rows of `x` with rows of low-bit blocks, in integer arithmetic. The rows of `x` are
// quantised to int8. One implementation serves every instruction set. Each kernel is documented in
// kernel_table.h.
//
// An element of W is a * code + b, where a and b are floats that all elements of a sub-block share. (In some
// formats, each half of a sub-block has its own a and b.) An element of `x` is scale * code. The dot product
// of a sub-block of W and a sub-block of `x` is
//   a * scale * Σ (codes of W * codes of x) + b * scale * Σ (codes of x).
// The sum of the products of codes is computed in integers. Int8Rows stores the value scale * Σ (codes of x)
// for each sub-block of `x`.

namespace nplora::kernels::NPLORA_ISA {

// ---- x ----

// Returns the largest magnitude in a sub-block of `x`, as the bits of a float. The function compares the bits
// of the magnitudes as integers: a larger magnitude has larger bits, and NaN has larger bits than all
// numbers.
inline uint32_t largest_bits(const float* x) {
  EightBits most{};
  for (size_t i = 0; i < kSubBlock; i += 8) {
    const EightBits bits = (EightBits)load_eight(x + i) & 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  uint32_t largest = most[0];
  for (size_t i = 1; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
  return largest;
}

inline void quantize_sub_block(const float* x, int8_t* codes, float& scale, float& sum_of_codes,
                               float* half_sums) {
  constexpr float kLargestCode = 127, kLeast = 0x1p-119f;  // below kLeast, 1 / scale may be infinite
  constexpr uint32_t kInfinite = 0x7F800000u;
  constexpr float kShift = 0x1.8p23f;  // the low bits of kShift + x are x, rounded to an integer
  const uint32_t largest = largest_bits(x);
  if (largest >= kInfinite || __builtin_bit_cast(float, largest) < kLeast) {
    __builtin_memset(codes, 0, kSubBlock);
    scale = sum_of_codes = half_sums[0] = half_sums[1] = largest >= kInfinite ? __builtin_nanf("") : 0;
    return;
  }
  scale = __builtin_bit_cast(float, largest) / kLargestCode;
  const float inverse = 1 / scale;
  EightInts total{}, first_half{};
  for (size_t i = 0; i < kSubBlock; i += 8) {
    const Eight shifted = load_eight(x + i) * inverse + kShift;
    const EightInts whole = (EightInts)shifted - __builtin_bit_cast(int32_t, kShift);
    total += whole;
    if (i == kSubBlock / 2 - 8) first_half = total;
    for (size_t j = 0; j < 8; ++j) codes[i + j] = static_cast<int8_t>(whole[j]);
  }
  int32_t all = 0, half = 0;
  for (size_t j = 0; j < 8; ++j) {
    all += total[j];
    half += first_half[j];
  }
  sum_of_codes = scale * static_cast<float>(all);
  half_sums[0] = scale * static_cast<float>(half);
  half_sums[1] = scale * static_cast<float>(all - half);
}

inline void quantize_sub_blocks(size_t n, const float* x, int8_t* codes, float* scales, float* sums,
                                float* half_sums) {
  for (size_t i = 0; i < n; i += kSubBlock)
    quantize_sub_block(x + i, codes + i, scales[i / kSubBlock], sums[i / kSubBlock],
                       half_sums + i / kSubBlock * 2);
}

// ---- the factors a and the minima b of one block, and the codes of its sub-blocks ----

// The factor a, or the minimum b, of a block that has a single sub-block.
struct One {
  float v;
  static One load(const float* p) { return {*p}; }
  Eight at(size_t) const { return broadcast_eight(v); }
  friend One operator*(One x, One y) { return {x.v * y.v}; }
  friend One operator+(One x, One y) { return {x.v + y.v}; }
};
inline float sum(One x) {
  return x.v;
}

// The factors a, or the minima b, of a block with eight sub-blocks: one factor or minimum for each sub-block.
struct EightSubBlocks {
  Eight v;
  static EightSubBlocks load(const float* p) { return {load_eight(p)}; }
  Eight at(size_t j) const { return broadcast_eight(v[j]); }
  friend EightSubBlocks operator*(EightSubBlocks x, EightSubBlocks y) { return {x.v * y.v}; }
  friend EightSubBlocks operator+(EightSubBlocks x, EightSubBlocks y) { return {x.v + y.v}; }
};
inline float sum(EightSubBlocks x) {
  return sum(x.v);
}

// The 16 factors a of a block with eight sub-blocks: one for each half of each sub-block. `at(j)` returns the
// factors of sub-block j, times the scale of sub-block j of `x`. Lanes 0 to 3 belong to the first half of the
// sub-block, and lanes 4 to 7 belong to the second half.
struct Halves {
  const float* factors;
  Eight x;  // the scales of eight sub-blocks of `x`
  Eight at(size_t j) const { return spread(factors + 2 * j) * broadcast_eight(x[j]); }
  friend Halves operator*(const Halves& a, const EightSubBlocks& y) { return {a.factors, y.v}; }
};

// Makes the compiler compute the products of eight factors and eight scales as one vector (see `keep`).
inline void keep_products(One&) {}
[[gnu::always_inline]] inline void keep_products(EightSubBlocks& x) {
  keep(x.v);
}
inline void keep_products(Halves&) {}

// The 16 minima of a block with eight sub-blocks: one for each half of each sub-block. The minimum of a half
// is multiplied by the sum of the 16 values of `x` in the same columns.
struct HalfMinima {
  Eight low, high;
  static HalfMinima load(const float* p) { return {load_eight(p), load_eight(p + 8)}; }
  friend HalfMinima operator*(const HalfMinima& x, const HalfMinima& y) {
    return {x.low * y.low, x.high * y.high};
  }
  friend HalfMinima operator*(const HalfMinima& x, float y) { return {x.low * y, x.high * y}; }
  friend HalfMinima operator+(const HalfMinima& x, const HalfMinima& y) {
    return {x.low + y.low, x.high + y.high};
  }
};
inline float sum(const HalfMinima& x) {
  return sum(x.low + x.high);
}

// The scale d and the minimum m of a block, as floats. The two numbers are neighbours in memory. With AVX2 or
// AVX-512, one instruction converts both numbers.
struct TwoFloats {
  float first, second;
};
template <class Block>
inline TwoFloats two_floats(const Block& block) {
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
  static_assert(sizeof block.d + sizeof block.m == sizeof(int) && offsetof(Block, m) == sizeof block.d);
  const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(bits_at<int>(&block)));
  return {both[0], both[1]};
#else
  return {to_float(block.d), to_float(block.m)};
#endif
}

template <class Block>
struct Codes;

// The base class of Codes<Block> for formats with unsigned codes. In these formats, an element is a code
// times a scale, plus a minimum.
struct Unsigned {
  static constexpr bool kHasMinimum = true, kPlainNibbles = false;
  // An upper bound. Without VNNI, int8_lanes needs the largest code of the format. So formats with unsigned
  // codes and blocks of one sub-block define kLargestCode themselves. With VNNI, this bound is not used.
  static constexpr size_t kLargestCode = 255;
  static EightInts dot_with(SubBlock codes, SubBlock x) { return dot(codes, x); }
};
// The base class of Codes<Block> for formats with signed codes. In these formats, an element is a code times
// a scale.
struct Signed {
  static constexpr bool kHasMinimum = false, kPlainNibbles = false;
  static constexpr size_t kLargestCode = 128;  // the largest magnitude
  static EightInts dot_with(SubBlock codes, SubBlock x) { return dot_signed(codes, x); }
};

// The base class of Codes<Block> for formats with signed codes of eight bits. With VNNI, `moved` adds 128 to
// each code, because the instruction vpdpbusd needs unsigned bytes. To compensate, the minimum of a sub-block
// is -128 times the scale of the sub-block. Without VNNI, the codes stay signed (see dot_signed).
#if defined(NPLORA_SIMD_VNNI)
struct EightBitCodes : Unsigned {
  static constexpr float kOffset = 128;
  static auto moved(auto codes) { return codes ^ 128; }
};
#else
struct EightBitCodes : Signed {
  static constexpr float kOffset = 0;
  static auto moved(auto codes) { return codes; }
};
#endif

// Returns the 32 nibbles of 16 bytes as 32 bytes: first all low nibbles, then all high nibbles.
inline SubBlock nibbles(const uint8_t* q) {
  const Bytes b = load_bytes(q);
  return join(b, (Bytes)((Words)b >> 4)) & 15;
}
inline SubBlock high_bits(const uint8_t (&bits)[4]) {
  const HighBits high(bits);
  return join(high.low, high.high);
}

// `Type` is the type that holds the minima of a block. Each minimum is multiplied by the sum of the values of
// `x` in the same columns. `sums(x, sub_block)` loads these sums for all sub-blocks of one block. The first
// sum belongs to sub-block number `sub_block` of `x`. In most formats, each sub-block has one minimum. The
// specialisation below is for formats in which each half of a sub-block has a minimum.
template <class Block>
struct MinimaOf {
  using Type = typename Codes<Block>::Factors;
  static Type sums(const Int8Rows& x, size_t sub_block) { return Type::load(x.sums + sub_block); }
};
template <class Block>
  requires requires { typename Codes<Block>::Minima; }
struct MinimaOf<Block> {
  using Type = typename Codes<Block>::Minima;
  static Type sums(const Int8Rows& x, size_t sub_block) { return Type::load(x.half_sums + 2 * sub_block); }
};

// ---- rows ----

// Rows of blocks. Reading a block also prefetches the memory that is `ahead` bytes after the block.
struct Rows {
  const uint8_t* blocks;
  size_t count, row_bytes, ahead;
  Rows after(size_t i) const { return {blocks + i * row_bytes, count - i, row_bytes, ahead}; }
};

// Returns the codes and the factors of a block. If a format does not specialise `Scales`, the factors are
// read from the block instead of from `scales`. The caller decodes the scales of all rows of a tile before it
// computes the products. Decoding the scales of one row is a long chain of dependent instructions. If several
// rows are decoded together, the processor can overlap their chains.
template <class Block>
inline Codes<Block> codes_of(const Block& block, const Scales<Block>& scales) {
  if constexpr (requires { Codes<Block>{{}, block, scales}; })
    return {{}, block, scales};
  else
    return {{}, block};
}

// Multiplies kTokens rows of `x` by the first kRows rows of `w`. The products are stored in `y` (kTokens,
// kRows), whose rows are `all` elements apart. If `w` has fewer than kRows rows, the last row is computed
// several times, but its products are stored only once.
template <class Block, size_t kTokens, size_t kRows>
inline void int8_tile(const Rows& w, size_t sub_blocks, const Int8Rows& x, float* y, size_t all) {
  using Factors = typename Codes<Block>::Factors;
  constexpr size_t kSubBlocks = Block::kElements / kSubBlock;
  const uint8_t* at[kRows];
  Eight sums[kRows][kTokens];
  using Minima = typename MinimaOf<Block>::Type;
  Minima minima[kRows][kTokens];
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r) {
    at[r] = w.blocks + smaller(r, w.count - 1) * w.row_bytes;
#pragma GCC unroll 4
    for (size_t t = 0; t < kTokens; ++t) {
      sums[r][t] = Eight{};
      minima[r][t] = Minima{};
    }
  }
  for (size_t sub_block = 0; sub_block < sub_blocks; sub_block += kSubBlocks) {
    Scales<Block> scales_of[kRows];
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r) scales_of[r].read(*reinterpret_cast<const Block*>(at[r]));
#pragma GCC unroll 4
    for (size_t r = 0; r < kRows; ++r, at[r - 1] += sizeof(Block)) {
      for (size_t line = 0; line < sizeof(Block); line += kCacheLine)
        __builtin_prefetch(at[r] + w.ahead + line, 0, 2);
      const Codes<Block> codes = codes_of(*reinterpret_cast<const Block*>(at[r]), scales_of[r]);
#pragma GCC unroll 4
      for (size_t t = 0; t < kTokens; ++t) {
        const size_t first = t * sub_blocks + sub_block;
        auto scales = codes.a * Factors::load(x.scales + first);
        keep_products(scales);
        if constexpr (Codes<Block>::kHasMinimum)
          minima[r][t] = minima[r][t] + codes.b * MinimaOf<Block>::sums(x, first);
#pragma GCC unroll kUnrolledSubBlocks
        for (size_t j = 0; j < kSubBlocks; ++j) {
          const EightInts sum =
              codes.dot_with(codes.sub_block(j), load_sub_block(x.codes + (first + j) * kSubBlock));
          sums[r][t] += to_floats(sum) * scales.at(j);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < kRows; ++r)
    for (size_t t = 0; t < kTokens && r < w.count; ++t) y[t * all + r] = sum(sums[r][t]) + sum(minima[r][t]);
}

// Multiplies `m` tokens by the rows `w`. The tokens are processed in groups of 4, and the remaining tokens in
// groups of 2 and 1. The first group brings the rows of W into L1, and the later groups read the rows from
// L1.
template <class Block, size_t kTokens>
inline void int8_tiles(const Rows& w, size_t m, size_t sub_blocks, Int8Rows x, float* y, size_t all) {
  constexpr size_t kRows = 4 / kTokens;
  for (; m >= kTokens; m -= kTokens, y += kTokens * all) {
    for (size_t i = 0; i < w.count; i += kRows)
      int8_tile<Block, kTokens, kRows>(w.after(i), sub_blocks, x, y + i, all);
    x = {x.codes + kTokens * sub_blocks * kSubBlock, x.scales + kTokens * sub_blocks,
         x.sums + kTokens * sub_blocks, x.half_sums + 2 * kTokens * sub_blocks};
  }
  if constexpr (kTokens > 1) int8_tiles<Block, kTokens / 2>(w, m, sub_blocks, x, y, all);
}

#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)

// ---- rows of W in the lanes, for formats whose block is a single sub-block ----
//
// Each lane belongs to one of kLaneRows rows of W. The codes of a sub-block are transposed once and then used
// for all tokens. For each token and each sub-block, one instruction converts the integer sums of the
// kLaneRows rows to float. No sums across lanes are needed.

template <class Block>
inline constexpr bool kRowsInLanes = Block::kElements == kSubBlock;

// The largest number of tokens that are multiplied at the same time. With more tokens, the registers would
// not have room for both the sums of the tokens and the codes of the rows.
#if defined(NPLORA_SIMD_AVX512)
inline constexpr size_t kLaneTokens = 8;
#else
inline constexpr size_t kLaneTokens = 4;
#endif

// Calls compute(k + 4 * p) for each part p of a vector (see vec_lanes.h), and returns the results in the
// array `parts`.
template <class Compute>
[[gnu::always_inline]] inline auto of_parts(size_t k, const Compute& compute) {
  struct {
    decltype(compute(k)) parts[kLaneParts];
  } found;
#pragma GCC unroll 4
  for (size_t p = 0; p < kLaneParts; ++p) found.parts[p] = compute(k + 4 * p);
  return found;
}

// Transposes the codes of kLaneRows blocks, where at(r) returns block r. Lane r of codes[k] holds the codes
// of elements 4 * k to 4 * k + 3 of block r.
template <class Block, class At>
[[gnu::always_inline]] inline void transposed_codes(const At& at, LaneBytes (&codes)[8]) {
  LaneBytes low[4], high[4];
  if constexpr (Codes<Block>::kPlainNibbles) {
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r)
      low[r] = join_parts(of_parts(r, [&](size_t row) { return load_bytes(at(row).q); }).parts);
    transpose_parts(low);
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
      codes[k] = low[k] & 15;
      codes[k + 4] = (LaneBytes)((LaneBits)low[k] >> 4) & 15;
    }
  } else {
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; ++r) {
      const auto rows = of_parts(r, [&](size_t row) { return Codes<Block>{{}, at(row)}.sub_block(0); });
      low[r] = first_halves(rows.parts);
      high[r] = last_halves(rows.parts);
    }
    transpose_parts(low);
    transpose_parts(high);
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; ++k) {
      codes[k] = low[k];
      codes[k + 4] = high[k];
    }
  }
}

// Returns a vector whose lane r holds the first four bytes of block r, where at(r) returns block r.
template <class Block, class At>
[[gnu::always_inline]] inline LaneBits first_bytes(const At& at) {
  if constexpr (kLaneRows == 8) {
    LaneBits found;
#pragma GCC unroll 8
    for (size_t r = 0; r < 8; ++r) found[r] = bits_at<uint32_t>(&at(r));
    return found;
  }
  static_assert(sizeof(Block) >= sizeof(Bytes), "A block of 32 values has at least 16 bytes");
  LaneBytes heads[4];
#pragma GCC unroll 4
  for (size_t r = 0; r < 4; ++r)
    heads[r] = join_parts(of_parts(r, [&](size_t row) { return load_bytes(&at(row)); }).parts);
  transpose_parts(heads);  // the compiler computes only heads[0], the only result that is used
  return (LaneBits)heads[0];
}

// Multiplies kTokens rows of `x` by the first kLaneRows rows of `w`. The products are stored in `y` (kTokens,
// kLaneRows), whose rows are `all` elements apart. If `w` has fewer than kLaneRows rows, the last row is
// computed in several lanes, but its products are stored only once.
template <class Block, size_t kTokens>
inline void int8_lanes(const Rows& w, size_t sub_blocks, const Int8Rows& x, float* y, size_t all) {
  using C = Codes<Block>;
  const uint8_t* rows[kLaneRows];
  for (size_t r = 0; r < kLaneRows; ++r) rows[r] = w.blocks + smaller(r, w.count - 1) * w.row_bytes;
  LaneFloats sums[kTokens];
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t) sums[t] = LaneFloats{};
  for (size_t s = 0; s < sub_blocks; ++s) {
    const auto at = [&](size_t r) -> const Block& { return reinterpret_cast<const Block*>(rows[r])[s]; };
    LaneBytes codes[8];
    transposed_codes<Block>(at, codes);
    [[maybe_unused]] LaneSigns signs[8];
    if constexpr (!C::kHasMinimum)  // dot_lanes needs unsigned codes of W, so `x` gets the signs
#pragma GCC unroll 8
      for (size_t k = 0; k < 8; ++k) {
        const LaneBytes all = codes[k];
        codes[k] = magnitudes(all);
        set_signs(signs[k], all);
      }
    const LaneBits heads = first_bytes<Block>(at);
    const LaneFloats a = floats_of_halves(heads);
    LaneFloats b{};
    if constexpr (requires(Block block) { block.m; })
      b = floats_of_halves(heads >> 16);
    else if constexpr (C::kHasMinimum)
      b = a * -C::kOffset;
#pragma GCC unroll 8
    for (size_t t = 0; t < kTokens; ++t) {
      const size_t i = t * sub_blocks + s;
      const LaneInts products = dot_lanes<C::kLargestCode>(codes, [&](size_t k) {
        const LaneBytes some = broadcast_four(x.codes + i * kSubBlock + 4 * k);
        if constexpr (C::kHasMinimum)
          return some;
        else
          return with_signs(some, signs[k]);
      });
      sums[t] += to_floats(products) * (a * x.scales[i]);
      if constexpr (C::kHasMinimum) sums[t] += b * x.sums[i];
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < kLaneRows; ++r) __builtin_prefetch(rows[r] + s * sizeof(Block) + w.ahead, 0, 2);
  }
#pragma GCC unroll 8
  for (size_t t = 0; t < kTokens; ++t)
    if (w.count >= kLaneRows)
      __builtin_memcpy(y + t * all, &sums[t], sizeof sums[t]);
    else
      for (size_t r = 0; r < w.count; ++r) y[t * all + r] = sums[t][r];
}

template <class Block, size_t kTokens>
inline void int8_groups(const Rows& w, size_t m, size_t sub_blocks, Int8Rows x, float* y, size_t all) {
  for (; m >= kTokens; m -= kTokens, y += kTokens * all) {
    int8_lanes<Block, kTokens>(w, sub_blocks, x, y, all);
    x = {x.codes + kTokens * sub_blocks * kSubBlock, x.scales + kTokens * sub_blocks,
         x.sums + kTokens * sub_blocks, x.half_sums + 2 * kTokens * sub_blocks};
  }
  if constexpr (kTokens > 1) int8_groups<Block, kTokens / 2>(w, m, sub_blocks, x, y, all);
}

template <class Block>
constexpr size_t int8_rows_together() {
  return kRowsInLanes<Block> ? kLaneRows : kFewRows;
}

#else

template <class Block>
constexpr size_t int8_rows_together() {
  return kFewRows;
}

#endif

template <class Block>
void int8_dots(size_t m, size_t rows, size_t cols, const void* blocks, size_t row_bytes, const Int8Rows& x,
               float* y, const Fetch& following) {
  constexpr size_t kGroup = int8_rows_together<Block>();
  Fetch next = following;
  const Rows w{static_cast<const uint8_t*>(blocks), rows, row_bytes, fetch_ahead(row_bytes, kGroup)};
  for (size_t i = 0; i < rows; i += kGroup) {
    fetch_share(next, rows - i, kGroup);
    Rows few = w.after(i);
    few.count = smaller(kGroup, few.count);
#if defined(NPLORA_SIMD_AVX512) || defined(NPLORA_SIMD_AVX2)
    if constexpr (kRowsInLanes<Block>) {
      int8_groups<Block, kLaneTokens>(few, m, cols / kSubBlock, x, y + i, rows);
      continue;
    }
#endif
    int8_tiles<Block, 4>(few, m, cols / kSubBlock, x, y + i, rows);
  }
}

}  // namespace nplora::kernels::NPLORA_ISA
