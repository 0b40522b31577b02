// Chooses the kernel table. If the environment variable NPLORA_ISA is set, the variable names the table.
// Otherwise, the best table that this machine can run is chosen.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "kernels/kernel_table.h"
#include "simd/cpu.h"

namespace nplora::kernels {

// The kernels in this build. CMakeLists.txt defines NPLORA_X86_64 or NPLORA_AARCH64 for the target processor.
extern const KernelTable k_generic_table;
#if defined(NPLORA_X86_64)
extern const KernelTable k_avx2_table, k_avx512_table;
extern const NarrowKernels k_avx512bf16_kernels;
extern const PairProducts k_amx_products;
extern const Int8Gemm k_avxvnni_products, k_avx512vnni_products;
#elif defined(NPLORA_AARCH64)
extern const KernelTable k_neon_table;
extern const NarrowKernels k_neonbf16_kernels;
extern const Int8Gemm k_neondot_products, k_neoni8mm_products;
#endif

namespace {

#if defined(NPLORA_X86_64) || defined(NPLORA_AARCH64)
// Each function with_kernels returns a copy of `table` with the name `isa`, in which the given kernels
// replace the kernels of `table`.
KernelTable with_kernels(const KernelTable& table, const char* isa, const NarrowKernels& kernels) {
  KernelTable made = table;
  made.isa = isa;
  static_cast<NarrowKernels&>(made) = kernels;
  return made;
}

KernelTable with_kernels(const KernelTable& table, const char* isa, const Int8Gemm& products) {
  NarrowKernels kernels = table;
  kernels.int8_gemm = products;
  return with_kernels(table, isa, kernels);
}
#endif

#if defined(NPLORA_X86_64)
KernelTable with_kernels(const KernelTable& table, const char* isa, const PairProducts& products) {
  NarrowKernels kernels = table;
  kernels.bf16 = products.tiles;
  kernels.small_pairs.gemm_outputs_in_lanes = products.small_gemm_outputs_in_lanes;
  kernels.pairs_in_registers = false;
  return with_kernels(table, isa, kernels);
}
#endif

struct Choice {
  const KernelTable* table;
  bool available;            // whether this machine can run the kernels of the table
  const char* parts;         // the processor features that the table requires
  bool takes_tiles = false;  // whether the table needs the AMX tile registers, which Linux may refuse
};

// Returns the tables of this build, with the best table last.
const Choice* choices(size_t* count) {
  using simd::cpu;
#if defined(NPLORA_X86_64)
  static const KernelTable avxvnni = with_kernels(k_avx2_table, "avxvnni", k_avxvnni_products);
  static const KernelTable avx512vnni = with_kernels(k_avx512_table, "avx512vnni", k_avx512vnni_products);
  static const KernelTable avx512bf16 = with_kernels(k_avx512_table, "avx512bf16", k_avx512bf16_kernels);
  static const KernelTable amx = with_kernels(avx512bf16, "amx", k_amx_products);
#elif defined(NPLORA_AARCH64)
  static const KernelTable neondot = with_kernels(k_neon_table, "neondot", k_neondot_products);
  static const KernelTable neonbf16 = with_kernels(k_neon_table, "neonbf16", k_neonbf16_kernels);
  static const KernelTable neoni8mm = with_kernels(neonbf16, "neoni8mm", k_neoni8mm_products);
#endif
  static const Choice all[] = {
      {&k_generic_table, true, ""},
#if defined(NPLORA_X86_64)
      {&k_avx2_table, cpu().avx2, "AVX2, FMA3 and F16C"},
      {&avxvnni, cpu().avxvnni, "AVX2, FMA3, F16C and AVX-VNNI"},
      {&k_avx512_table, cpu().avx512, "AVX-512 F, BW, DQ and VL"},
      {&avx512vnni, cpu().avx512vnni, "AVX-512 F, BW, DQ, VL and VNNI"},
      {&avx512bf16, cpu().avx512bf16, "AVX-512 F, BW, DQ, VL, BF16 and VNNI"},
      {&amx, cpu().amx, "AMX with BF16, beside the AVX-512 of avx512bf16", true},
#elif defined(NPLORA_AARCH64)
      {&k_neon_table, cpu().neon, "NEON"},
      {&neondot, cpu().neondot, "NEON with dot products"},
      {&neonbf16, cpu().neonbf16, "NEON with BF16 and dot products"},
      {&neoni8mm, cpu().neoni8mm, "NEON with BF16, dot products and I8MM"},
#endif
  };
  *count = sizeof all / sizeof *all;
  return all;
}

// Checks that this process can use a table. If the table needs the tile registers of AMX, the function asks
// Linux for them. Returns an empty string on success, else the reason for the failure.
std::string try_to_enable(const Choice& choice) {
  if (!choice.available) return std::string("this machine, or its operating system, lacks ") + choice.parts;
  if (choice.takes_tiles && !simd::ask_for_tiles())
    return "Linux refuses the tile registers of AMX, perhaps because a thread's signal stack is too small";
  return "";
}

const KernelTable& choose() {
  size_t count;
  const Choice* all = choices(&count);
  const char* name = std::getenv("NPLORA_ISA");
  if (name == nullptr || *name == '\0') {
    while (!try_to_enable(all[count - 1]).empty()) --count;
    return *all[count - 1].table;
  }
  std::string known;
  for (size_t i = 0; i < count; ++i) {
    if (std::string_view(name) == all[i].table->isa) {
      const std::string obstacle = try_to_enable(all[i]);
      if (obstacle.empty()) return *all[i].table;
      throw std::invalid_argument(std::string("NPLORA_ISA=") + name + ": " + obstacle);
    }
    known += (i ? ", " : "") + std::string(all[i].table->isa);
  }
  throw std::invalid_argument(std::string("NPLORA_ISA=") + name + ": expected one of " + known);
}

}  // namespace

const KernelTable& table() {
  static const KernelTable& chosen = choose();
  return chosen;
}

size_t available_tables(const KernelTable** out, size_t capacity) {
  size_t count, found = 0;
  const Choice* all = choices(&count);
  for (size_t i = 0; i < count && found < capacity; ++i)
    if (all[i].available) out[found++] = all[i].table;
  return found;
}

}  // namespace nplora::kernels
