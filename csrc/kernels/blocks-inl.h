// Low-bit blocks to float: one body for every instruction set. See kernel_table.h for the contract, base/block_formats.h for the
// layouts.
//
// A fused multiply-add gives what a product and a sum would: a float16 has 11 significant bits, a scale at most 7 and a code at most 6,
// so that their product fits into float's 24 and only the sum rounds.

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

inline Bytes low_nibbles(Bytes b) {
  return b & 15;
}
inline Bytes high_nibbles(Bytes b) {
  return move(b, 4, 0, 15);
}

// Where a minimum is added it goes in by fma; the others keep the sign of d * 0.
inline void put(const Floats& q, Vec<float> d, float* to) {
  for (size_t i = 0; i < kVectors; ++i) (q.v[i] * d).store(to + i * Vec<float>::kLanes);
}
inline void put(const Floats& q, Vec<float> d, Vec<float> m, float* to) {
  for (size_t i = 0; i < kVectors; ++i) fma(q.v[i], d, m).store(to + i * Vec<float>::kLanes);
}

// ---- one block: what its strips share, and strip j ----

template <class Block>
struct Decoder;

template <>
struct Decoder<BlockQ4_0> {
  const BlockQ4_0& b;
  Vec<float> d = Vec<float>::broadcast(to_float(b.d));

  void strip(size_t, float* to) const {
    const Bytes q = load_bytes(b.q);
    put(widen(low_nibbles(q) - 8), d, to);
    put(widen(high_nibbles(q) - 8), d, to + kBytes);
  }
};

template <>
struct Decoder<BlockQ4_1> {
  const BlockQ4_1& b;
  Vec<float> d = Vec<float>::broadcast(to_float(b.d)), m = Vec<float>::broadcast(to_float(b.m));

  void strip(size_t, float* to) const {
    const Bytes q = load_bytes(b.q);
    put(widen(low_nibbles(q)), d, m, to);
    put(widen(high_nibbles(q)), d, m, to + kBytes);
  }
};

// Element i of a strip takes bit i of high.
struct HighBits {
  Bytes low, high;
  explicit HighBits(const uint8_t (&bits)[4])
      : low(each_bit(static_cast<uint16_t>(bits[0] | bits[1] << 8), 16)),
        high(each_bit(static_cast<uint16_t>(bits[2] | bits[3] << 8), 16)) {}
};

template <>
struct Decoder<BlockQ5_0> {
  const BlockQ5_0& b;
  Vec<float> d = Vec<float>::broadcast(to_float(b.d));

  void strip(size_t, float* to) const {
    const Bytes q = load_bytes(b.q);
    const HighBits bits(b.high);
    put(widen((low_nibbles(q) | bits.low) - 16), d, to);
    put(widen((high_nibbles(q) | bits.high) - 16), d, to + kBytes);
  }
};

template <>
struct Decoder<BlockQ5_1> {
  const BlockQ5_1& b;
  Vec<float> d = Vec<float>::broadcast(to_float(b.d)), m = Vec<float>::broadcast(to_float(b.m));

  void strip(size_t, float* to) const {
    const Bytes q = load_bytes(b.q);
    const HighBits bits(b.high);
    put(widen(low_nibbles(q) | bits.low), d, m, to);
    put(widen(high_nibbles(q) | bits.high), d, m, to + kBytes);
  }
};

template <>
struct Decoder<BlockQ8_0> {
  const BlockQ8_0& b;
  Vec<float> d = Vec<float>::broadcast(to_float(b.d));

  void strip(size_t, float* to) const {
    put(widen(load_bytes(b.q)), d, to);
    put(widen(load_bytes(b.q + kBytes)), d, to + kBytes);
  }
};

// d scale_j and -dmin min_j of the sub-blocks of Q4_K and Q5_K.
struct SubScales {
  float d[16], m_behind_8[16];

  SubScales(Half d_half, Half m_half, const uint8_t (&bytes)[12]) {
    uint32_t low, middle, high;  // four bytes each
    __builtin_memcpy(&low, bytes, 4);
    __builtin_memcpy(&middle, bytes + 4, 4);
    __builtin_memcpy(&high, bytes + 8, 4);
    constexpr uint32_t kSix = 0x3F3F3F3F, kFour = 0x0F0F0F0F, kTwo = 0x30303030;
    const uint64_t d_codes = (low & kSix) | uint64_t((high & kFour) | ((low >> 2) & kTwo)) << 32;
    const uint64_t m_codes = (middle & kSix) | uint64_t(((high >> 4) & kFour) | ((middle >> 2) & kTwo)) << 32;
    const Floats codes = widen(pair(d_codes, m_codes));
    put(codes, Vec<float>::broadcast(to_float(d_half)), d);
    put(codes, Vec<float>::broadcast(-to_float(m_half)), m_behind_8);
  }
  Vec<float> scale(size_t j) const { return Vec<float>::broadcast(d[j]); }
  Vec<float> minus_min(size_t j) const { return Vec<float>::broadcast(m_behind_8[8 + j]); }
};

template <>
struct Decoder<BlockQ4_K> {
  const BlockQ4_K& b;
  SubScales scales{b.d, b.dmin, b.scales};

  void strip(size_t j, float* to) const {
    const Vec<float> d = scales.scale(j), m = scales.minus_min(j);
    for (size_t i = 0; i < kStrip; i += kBytes) {
      const Bytes q = load_bytes(b.q + j / 2 * kStrip + i);
      put(widen(j % 2 == 0 ? low_nibbles(q) : high_nibbles(q)), d, m, to + i);
    }
  }
};

template <>
struct Decoder<BlockQ5_K> {
  const BlockQ5_K& b;
  SubScales scales{b.d, b.dmin, b.scales};

  void strip(size_t j, float* to) const {
    const Vec<float> d = scales.scale(j), m = scales.minus_min(j);
    for (size_t i = 0; i < kStrip; i += kBytes) {
      const Bytes q = load_bytes(b.q + j / 2 * kStrip + i), high = load_bytes(b.high + i);
      put(widen((j % 2 == 0 ? low_nibbles(q) : high_nibbles(q)) | move(high, j, 4, 16)), d, m, to + i);
    }
  }
};

template <>
struct Decoder<BlockQ6_K> {
  const BlockQ6_K& b;
  float scales[16];

  explicit Decoder(const BlockQ6_K& block) : b(block) {
    put(widen(load_bytes(b.scales)), Vec<float>::broadcast(to_float(b.d)), scales);
  }

  void strip(size_t j, float* to) const {
    const size_t half = j / 4, t = j % 4;
    for (size_t i = 0; i < kStrip; i += kBytes) {
      const Bytes q = load_bytes(b.low + half * 64 + t % 2 * kStrip + i),
                  high = load_bytes(b.high + half * kStrip + i);
      const Bytes code = (t < 2 ? low_nibbles(q) : high_nibbles(q)) | move(high, 2 * t, 4, 48);
      put(widen(code - 32), Vec<float>::broadcast(scales[2 * j + i / kBytes]), to + i);
    }
  }
};

// ---- rows of blocks ----

template <class Block>
void decode(size_t rows, size_t first, size_t cols, const void* blocks, size_t row_bytes, float* to,
            size_t to_stride) {
  constexpr size_t kStrips = Block::kElements / kStrip, kRowsAhead = 8, kMostAhead = 4 * kCacheLine;
  const size_t piece = smaller(cols / kStrip * sizeof(Block) / kStrips + kCacheLine, kMostAhead);
  for (size_t row = 0; row < rows; ++row) {
    const Block* in_row =
        reinterpret_cast<const Block*>(static_cast<const uint8_t*>(blocks) + row * row_bytes);
    float* out = to + row * to_stride;
    // A piece of each row: too short for the machine to see a stream.
    const uint8_t* ahead =
        reinterpret_cast<const uint8_t*>(in_row + first / Block::kElements) + kRowsAhead * row_bytes;
    for (size_t line = 0; line < piece; line += kCacheLine) __builtin_prefetch(ahead + line);
    for (size_t strip = first / kStrip, end = (first + cols) / kStrip; strip < end;) {
      const Decoder<Block> block{in_row[strip / kStrips]};
      const size_t j = strip % kStrips, n = smaller(kStrips - j, end - strip);
      // Unrolled, so that j is known to each.
#pragma GCC unroll 8
      for (size_t i = 0; i < kStrips; ++i)
        if (i - j < n) block.strip(i, out + (i - j) * kStrip);
      strip += n;
      out += n * kStrip;
    }
  }
}

// ---- NF4 ----

// A copy in this namespace: see vec.h.
struct Nf4Levels {
  float v[16];
};
inline constexpr Nf4Levels kLevels = [] {
  Nf4Levels levels{};
  for (size_t i = 0; i < 16; ++i) levels.v[i] = kNf4Levels[i];
  return levels;
}();

// bitsandbytes rounds the product before the sum; volatile keeps the two from being fused.
inline float absmax_of(const Nf4& w, size_t block) {
  if (w.absmax) return w.absmax[block];
  const volatile float product = w.absmax_book[w.absmax_codes[block]] * w.absmax_scales[block / kNf4Group];
  return product + w.absmax_offset;
}

inline float nf4_value(const uint8_t* codes, size_t i, float absmax) {
  return kLevels.v[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15] * absmax;
}

// to (n) = elements [i, i + n) of the flat tensor, all in one block.
inline void decode_nf4_run(const uint8_t* codes, size_t i, size_t n, float absmax, const Levels& levels,
                           float* to) {
  const Vec<float> d = Vec<float>::broadcast(absmax);
  if (i % 2 != 0 && n > 0) {
    *to++ = nf4_value(codes, i++, absmax);
    --n;
  }
  for (; n >= kStrip; n -= kStrip, i += kStrip, to += kStrip) {
    const Bytes q = load_bytes(codes + i / 2);
    const BytePair in_order = interleave(high_nibbles(q), low_nibbles(q));
    put(lookup(levels, in_order.low), d, to);
    put(lookup(levels, in_order.high), d, to + kBytes);
  }
  for (; n > 0; --n) *to++ = nf4_value(codes, i++, absmax);
}

inline void decode_nf4(size_t rows, size_t cols, Nf4 w, size_t first, size_t row_step, float* to,
                       size_t to_stride) {
  constexpr size_t kElements = BlockNf4::kElements;
  const Levels levels(kLevels.v);
  for (size_t row = 0; row < rows; ++row)
    for (size_t c = 0; c < cols;) {
      const size_t i = first + row * row_step + c, n = smaller(cols - c, kElements - i % kElements);
      decode_nf4_run(w.codes, i, n, absmax_of(w, i / kElements), levels, to + row * to_stride + c);
      c += n;
    }
}

}  // namespace nplora::kernels::NPLORA_ISA
