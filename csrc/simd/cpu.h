// What this processor and its operating system can run.
#pragma once

namespace nplora::simd {

struct Cpu {
  bool avx2 = false;        // with FMA3 and F16C
  bool avx512 = false;      // F, BW, DQ, VL
  bool avx512bf16 = false;  // with VNNI
  bool amx = false;         // with BF16, and with what avx512bf16 has; see ask_for_tiles
  bool neon = false;
  bool neonbf16 = false;
};

const Cpu& cpu();

// Asks Linux to let this process use the tile registers of AMX from now on: all of its threads then need larger signal stacks. False
// where it refuses.
bool ask_for_tiles();

}  // namespace nplora::simd
