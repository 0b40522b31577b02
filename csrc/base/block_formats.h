// Low-bit blocks as they lie on disk: GGUF's quantised types, and NF4 of bitsandbytes. A block may start at any byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nplora {

// In this order wherever one table holds them all.
enum class BlockFormat : uint8_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4_K, kQ5_K, kQ6_K, kNf4 };

// Every block is a whole number of strips: the pieces in which a row can be cut.
inline constexpr size_t kStrip = 32;

// A float16, little-endian.
struct Half {
  uint8_t bytes[2];
};

// Nibbles: the low ones are elements 0 ... 15, the high ones elements 16 ... 31. Bit i of high is bit 4 of element i.

// d (q - 8)
struct BlockQ4_0 {
  static constexpr size_t kElements = 32;
  Half d;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

// d q + m
struct BlockQ4_1 {
  static constexpr size_t kElements = 32;
  Half d, m;
  uint8_t q[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

// d (q - 16)
struct BlockQ5_0 {
  static constexpr size_t kElements = 32;
  Half d;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_0) == 22);

// d q + m
struct BlockQ5_1 {
  static constexpr size_t kElements = 32;
  Half d, m;
  uint8_t high[4];
  uint8_t q[16];
};
static_assert(sizeof(BlockQ5_1) == 24);

// d q
struct BlockQ8_0 {
  static constexpr size_t kElements = 32;
  Half d;
  int8_t q[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

// Eight sub-blocks j of one strip each: (d scale_j) q - (dmin min_j). Scales and minima have six bits; j < 4: scale_j in the low
// bits of byte j, min_j in those of byte 4 + j; j >= 4: their low four bits in the nibbles of byte 4 + j, their high two on top of
// bytes j - 4 and j. The 32 bytes at 32 (j / 2) of q hold sub-blocks j (low nibbles) and j + 1 (high nibbles), j even.
struct BlockQ4_K {
  static constexpr size_t kElements = 256;
  Half d, dmin;
  uint8_t scales[12];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

// The same; bit j of high[i] is bit 4 of element i of sub-block j.
struct BlockQ5_K {
  static constexpr size_t kElements = 256;
  Half d, dmin;
  uint8_t scales[12];
  uint8_t high[32];
  uint8_t q[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

// Sixteen sub-blocks of 16: (d scale) (q - 32). Strip 4 h + t has its low four bits at 64 h + 32 (t % 2) of low, in the low nibbles
// for t < 2, else in the high ones; its high two at 32 h of high, at bit 2 t.
struct BlockQ6_K {
  static constexpr size_t kElements = 256;
  uint8_t low[128];
  uint8_t high[64];
  int8_t scales[16];
  Half d;
};
static_assert(sizeof(BlockQ6_K) == 210);

// absmax kNf4Levels[q]: 64 elements of the flat tensor, which may begin and end within a row; element 2 i in the high nibble of
// byte i. absmax, a float for each block, lies in an array of its own; or, quantised again, it is book[code] scale + offset, with a
// book of kNf4Book levels and a scale for each kNf4Group blocks.
struct BlockNf4 {
  static constexpr size_t kElements = 64;
  uint8_t q[32];
};
static_assert(sizeof(BlockNf4) == 32);
inline constexpr size_t kNf4Group = 256, kNf4Book = 256;

// Dettmers et al. 2023, appendix E: equal shares of a normal distribution, with an exact zero.
inline constexpr float kNf4Levels[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};

struct BlockFormatInfo {
  const char* name;
  size_t elements, bytes;  // of one block
};
inline constexpr BlockFormatInfo kBlockFormats[] = {
    {"q4_0", BlockQ4_0::kElements, sizeof(BlockQ4_0)}, {"q4_1", BlockQ4_1::kElements, sizeof(BlockQ4_1)},
    {"q5_0", BlockQ5_0::kElements, sizeof(BlockQ5_0)}, {"q5_1", BlockQ5_1::kElements, sizeof(BlockQ5_1)},
    {"q8_0", BlockQ8_0::kElements, sizeof(BlockQ8_0)}, {"q4_k", BlockQ4_K::kElements, sizeof(BlockQ4_K)},
    {"q5_k", BlockQ5_K::kElements, sizeof(BlockQ5_K)}, {"q6_k", BlockQ6_K::kElements, sizeof(BlockQ6_K)},
    {"nf4", BlockNf4::kElements, sizeof(BlockNf4)},
};
static_assert(sizeof kBlockFormats / sizeof *kBlockFormats == static_cast<size_t>(BlockFormat::kNf4) + 1);

}  // namespace nplora
