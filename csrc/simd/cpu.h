// The instruction sets that both this processor and its operating system support.
#pragma once

namespace nplora::simd {

struct Cpu {
  bool avx2 = false;        // AVX2, FMA3 and F16C are supported
  bool avxvnni = false;     // true only if `avx2` is true
  bool avx512 = false;      // `avx2` is true, and the AVX-512 extensions F, BW, DQ and VL are supported
  bool avx512vnni = false;  // true only if `avx512` is true
  bool avx512bf16 = false;  // true only if `avx512vnni` is true
  bool amx = false;         // `avx512bf16` is true, and AMX-TILE and AMX-BF16 are supported
  bool neon = false;
  bool neondot = false;   // the NEON instructions for dot products of bytes are supported
  bool neonbf16 = false;  // `neondot` is true, and the NEON instructions for bfloat16 are supported
  bool neoni8mm = false;  // true only if `neonbf16` is true
};

const Cpu& cpu();

// Asks Linux to let this process use the tile registers of AMX from now on. All threads of the process then
// need larger signal stacks. Returns false if Linux refuses.
bool ask_for_tiles();

}  // namespace nplora::simd
