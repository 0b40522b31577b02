// The instruction sets that both this processor and its operating system support.
#pragma once

namespace nplora::simd {

struct Cpu {
  bool avx2 = false;     // AVX2 together with FMA3 and F16C
  bool avxvnni = false;  // also requires avx2
  bool avx512 = false;   // AVX-512 with the parts F, BW, DQ and VL
  bool avx512vnni = false;
  bool avx512bf16 = false;  // also requires avx512vnni
  bool amx = false;         // AMX with BF16; also requires avx512bf16 (see ask_for_tiles)
  bool neon = false;
  bool neonbf16 = false;  // BF16, and also dot products of bytes
  bool neoni8mm = false;  // also requires neonbf16
};

const Cpu& cpu();

// Asks Linux to let this process use the tile registers of AMX from now on. All threads of the process then
// need larger signal stacks. Returns false if Linux refuses.
bool ask_for_tiles();

}  // namespace nplora::simd
