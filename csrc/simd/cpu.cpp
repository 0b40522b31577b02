#include "simd/cpu.h"

#include "base/platform.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nplora::simd {

namespace {

#if defined(__x86_64__)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned word, int i) {
  return (word >> i & 1) != 0;
}

// Returns the XCR0 register, which has a bit for each set of registers that the operating system saves. An
// instruction faults if it uses registers that the operating system does not save, even if CPUID lists the
// instruction.
unsigned saved_state() {
  unsigned eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

Cpu detect() {
  Cpu found;
  const Registers leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  if (!bit(leaf1.ecx, 27)) return found;  // the OSXSAVE bit: the instruction xgetbv can be used
  const unsigned state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  const bool fma = bit(leaf1.ecx, 12), avx = bit(leaf1.ecx, 28), f16c = bit(leaf1.ecx, 29);
  found.avx2 = ymm && avx && fma && f16c && bit(leaf7.ebx, 5);
  const bool f = bit(leaf7.ebx, 16), dq = bit(leaf7.ebx, 17), bw = bit(leaf7.ebx, 30),
             vl = bit(leaf7.ebx, 31);
  found.avx512 = found.avx2 && zmm && f && dq && bw && vl;
  found.avxvnni = found.avx2 && bit(leaf7_1.eax, 4);
  found.avx512vnni = found.avx512 && bit(leaf7.ecx, 11);
  found.avx512bf16 = found.avx512vnni && bit(leaf7_1.eax, 5);
  // Bit 24 is AMX-TILE, and bit 22 is AMX-BF16.
  const bool tiles = (state & 0x60000) == 0x60000 && bit(leaf7.edx, 24) && bit(leaf7.edx, 22);
  found.amx = found.avx512bf16 && tiles && platform::offers_tiles();
  return found;
}

#elif defined(__aarch64__)

Cpu detect() {
  Cpu found;
  found.neon = true;  // NEON is part of the aarch64 architecture
  found.neondot = platform::has_arm_dot_products();
  found.neonbf16 = found.neondot && platform::has_arm_bf16();
  found.neoni8mm = found.neonbf16 && platform::has_arm_i8mm();
  return found;
}

#else

Cpu detect() {
  return {};
}

#endif

}  // namespace

const Cpu& cpu() {
  static const Cpu found = detect();
  return found;
}

bool ask_for_tiles() {
  return platform::request_tiles();
}

}  // namespace nplora::simd
