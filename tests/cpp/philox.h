// Philox4x32-10, from its definition.
#pragma once

#include <array>
#include <cstdint>

using Words = std::array<uint32_t, 4>;

// Philox4x32-10: Salmon, Moraes, Dror & Shaw 2011, section 3.3.
inline Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = 0xD2511F53ull * counter[0], product1 = 0xCD9E8D57ull * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The word that decides whether an element is dropped.
inline uint32_t word_of(uint64_t seed, uint64_t element) {
  const uint64_t block = element / 4;
  return philox({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, 0},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))[element % 4];
}
