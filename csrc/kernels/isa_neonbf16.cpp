// NEON with BF16 (Neoverse V1 and N2, Cortex-X2 and A710, Apple M2). Products of bfloat16 pairs use BFDOT,
// which rounds to odd and treats subnormal inputs and results as zero. The accumulators (rows x vectors) are
// 12 x 2 in gemm_tokens_in_lanes and 8 x 3 in gemm_outputs_in_lanes. The accumulators take 24 of the 32
// registers. The remaining 8 registers hold 2 or 3 vectors of one operand and several broadcast pairs of the
// other operand. The file dispatch.cpp combines these kernels with the other kernels of neon.
#define NPLORA_ISA neonbf16
#define NPLORA_SIMD_NEON
#define NPLORA_SIMD_BF16
#define NPLORA_SIMD_DOTPROD

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::neonbf16 {
inline constexpr size_t kTileRows = 12;
inline constexpr size_t kTileTokens = 8, kOutputVectors = 3, kPanelVectors = kOutputVectors,
                        kNearRows = kTileTokens;
inline constexpr size_t kDotResident = 24, kDotRows = 4, kDotSums = 4;
inline constexpr size_t kUnrolledSubBlocks = 8, kMostBlockSums = 8;
inline constexpr size_t kTokenTileRows = 6, kTokenTileVectors = 4, kGroupTileRows = 3, kGroupTileVectors = 4;
}  // namespace nplora::kernels::neonbf16

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
extern const NarrowKernels k_neonbf16_kernels;
constinit const NarrowKernels k_neonbf16_kernels = neonbf16::make_narrow();
}  // namespace nplora::kernels
