// The random number generator of dropout and of stochastic rounding.
#pragma once

namespace nplora::kernels::NPLORA_ISA {

// Runs the random number generator Philox4x32-10 (Salmon et al. 2011) on kPhiloxBlocks counters at once. The
// output words[w][i] is word w of the counter first + i.
inline constexpr size_t kPhiloxBlocks = 16;
inline void philox(uint64_t seed, uint64_t first, uint32_t (&words)[4][kPhiloxBlocks]) {
  for (size_t i = 0; i < kPhiloxBlocks; ++i) {
    words[0][i] = uint32_t(first + i);
    words[1][i] = uint32_t((first + i) >> 32);
    words[2][i] = words[3][i] = 0;
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (size_t i = 0; i < kPhiloxBlocks; ++i) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * words[0][i],
                     product1 = uint64_t(0xCD9E8D57u) * words[2][i];
      words[0][i] = uint32_t(product1 >> 32) ^ words[1][i] ^ key0;
      words[1][i] = uint32_t(product1);
      words[2][i] = uint32_t(product0 >> 32) ^ words[3][i] ^ key1;
      words[3][i] = uint32_t(product0);
    }
}

}  // namespace nplora::kernels::NPLORA_ISA
