// The instruction sets that this processor and its operating system can run.
#pragma once

namespace nplora::simd {

struct Cpu {
  bool avx2 = false;        // with FMA3 and F16C
  bool avx512 = false;      // F, BW, DQ, VL
  bool avx512bf16 = false;  // with VNNI
  bool amx = false;         // with BF16, on top of avx512bf16; see ask_for_tiles
  bool neon = false;
  bool neonbf16 = false;
};

const Cpu& cpu();

// Asks Linux to let this process use the tile registers of AMX from now on. All of its threads then need
// larger signal stacks. Returns false if Linux refuses.
bool ask_for_tiles();

}  // namespace nplora::simd
