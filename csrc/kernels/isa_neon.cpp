// NEON on aarch64: 32 registers of 128 bits. The accumulators (rows x vectors) are 12 x 2 in
// gemm_tokens_in_lanes and 8 x 3 in gemm_outputs_in_lanes. For bfloat16 pairs, gemm_outputs_in_lanes uses all
// 32 registers: 24 for accumulators, 6 for vectors of single values of `w`, 1 for a mask and 1 for a pair of
// `a`. The mask splits 3 vectors of pairs into the 6 vectors of single values.
#define NPLORA_ISA neon
#define NPLORA_SIMD_NEON

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::neon {
inline constexpr size_t kTileRows = 12;
inline constexpr size_t kTileTokens = 8, kOutputVectors = 3, kPanelVectors = kOutputVectors,
                        kNearRows = kTileTokens;
inline constexpr size_t kDotResident = 24, kDotRows = 4, kDotSums = 4;
inline constexpr size_t kUnrolledSubBlocks = 8, kMostBlockSums = 8;
inline constexpr size_t kTokenTileRows = 6, kTokenTileVectors = 4, kGroupTileRows = 3, kGroupTileVectors = 4;
}  // namespace nplora::kernels::neon

#include "kernels/dots-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/products-inl.h"

#include "kernels/blocks-inl.h"
#include "kernels/exp-inl.h"
#include "kernels/int8-inl.h"
#include "kernels/int8_gemm-inl.h"

#include "kernels/attention-inl.h"
#include "kernels/transformer-inl.h"

#include "kernels/table-inl.h"

namespace nplora::kernels {
extern const KernelTable k_neon_table;
constinit const KernelTable k_neon_table = neon::make_table("neon");
}  // namespace nplora::kernels
