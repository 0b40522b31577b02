// aarch64 NEON: 32 registers of 128 bits, 12 x 2 and 8 x 3 accumulators.
#define NPLORA_ISA neon
#define NPLORA_SIMD_NEON

#include "kernels/kernel_table.h"
#include "simd/vec.h"

namespace nplora::kernels::neon {
inline constexpr size_t kTileRows = 12;
inline constexpr size_t kTileTokens = 8;
inline constexpr size_t kDotResident = 24, kDotRows = 4, kDotSums = 4;
}  // namespace nplora::kernels::neon

#include "kernels/dots-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/products-inl.h"
#include "kernels/table-inl.h"

namespace nplora::kernels {
extern const KernelTable k_neon_table;
constinit const KernelTable k_neon_table = neon::make_table("neon");
}  // namespace nplora::kernels
