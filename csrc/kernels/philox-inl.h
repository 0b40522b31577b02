// The random number generator of dropout and of stochastic rounding.
#pragma once

#include "simd/vec_wide.h"

namespace nplora::kernels::NPLORA_ISA {

// Runs the random number generator Philox4x32-10 (Salmon et al. 2011) on kPhiloxBlocks counters at once. The
// counters are first, first + 1, and so on. The generator makes four words from each counter. Word w of the
// counter first + i is stored in words[w][i]. Each word is computed in the lower half of a 64-bit lane. The
// upper half may hold any value, because the multiplications read only the lower half.
inline constexpr size_t kPhiloxBlocks = 16;
inline void philox(uint64_t seed, uint64_t first, uint32_t (&words)[4][kPhiloxBlocks]) {
  constexpr size_t kTogether = 2, kAtOnce = kTogether * kWideLanes;  // two chains of products run in parallel
  static_assert(kPhiloxBlocks % kAtOnce == 0);
  uint64_t counters[kPhiloxBlocks];
  for (size_t i = 0; i < kPhiloxBlocks; ++i) counters[i] = first + i;
  for (size_t i = 0; i < kPhiloxBlocks; i += kAtOnce) {
    Wide w[4][kTogether] = {};
    for (size_t j = 0; j < kTogether; ++j) {
      __builtin_memcpy(&w[0][j], counters + i + j * kWideLanes, sizeof(Wide));
      w[1][j] = w[0][j] >> 32;
    }
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
#pragma GCC unroll 2
      for (size_t j = 0; j < kTogether; ++j) {
        const Wide product0 = multiply_low(w[0][j], Wide{} + 0xD2511F53u),
                   product1 = multiply_low(w[2][j], Wide{} + 0xCD9E8D57u);
        w[0][j] = (product1 >> 32) ^ w[1][j] ^ key0;
        w[1][j] = product1;
        w[2][j] = (product0 >> 32) ^ w[3][j] ^ key1;
        w[3][j] = product0;
      }
    for (size_t k = 0; k < 4; ++k)
      for (size_t j = 0; j < kTogether; ++j) store_low(w[k][j], words[k] + i + j * kWideLanes);
  }
}

}  // namespace nplora::kernels::NPLORA_ISA
