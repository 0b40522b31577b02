// The kernels for machines without any of the other instruction sets. These kernels use no special
// instructions, so they run on every machine. On x86-64, the compiler uses 16 registers of 128 bits for these
// kernels. The accumulators (rows x vectors) are 4 x 2 in gemm_tokens_in_lanes and 4 x 3 in
// gemm_outputs_in_lanes.
#define NPLORA_ISA generic
#define NPLORA_SIMD_GENERIC

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::generic {
inline constexpr size_t kTileRows = 4;
inline constexpr size_t kTileTokens = 4, kOutputVectors = 3, kPanelVectors = kOutputVectors,
                        kNearRows = kTileTokens;
inline constexpr size_t kDotResident = 0, kDotRows = 4, kDotSums = 2;
inline constexpr size_t kUnrolledSubBlocks = 1, kMostBlockSums = 8;
inline constexpr size_t kTokenTileRows = 2, kTokenTileVectors = 1, kGroupTileRows = 2, kGroupTileVectors = 1;
}  // namespace nplora::kernels::generic

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
extern const KernelTable k_generic_table;
constinit const KernelTable k_generic_table = generic::make_table("generic");
}  // namespace nplora::kernels
