// AVX2, FMA3 and F16C (Haswell, Zen): 16 registers of 256 bits. gemm_tokens_in_lanes and
// gemm_outputs_in_lanes both use 6 x 2 accumulators (rows x vectors). With 4 x 3 accumulators,
// gemm_outputs_in_lanes would have to read each element of W from L2 1.5 times as often, because a tile would
// have only 4 rows instead of 6. For a dense panel, gemm_outputs_in_lanes uses 2 x 6 accumulators. A row of a
// dense panel of floats has three cache lines, and a tile of 6 x 2 accumulators would read only one of them.
// The hardware does not prefetch if a program reads only every third cache line.
#define NPLORA_ISA avx2
#define NPLORA_SIMD_AVX2

#include "kernels/kernel_table.h"
#include "simd/vec.h"
#include "simd/vec_bytes.h"
#include "simd/vec_lanes.h"
#include "simd/vec_quads.h"
#include "simd/vec_sub_blocks.h"

namespace nplora::kernels::avx2 {
inline constexpr size_t kTileRows = 6;
inline constexpr size_t kTileTokens = 6, kOutputVectors = 2, kPanelVectors = 6, kNearRows = kTileTokens;
inline constexpr size_t kDotResident = 12, kDotRows = 4, kDotSums = 2;
inline constexpr size_t kUnrolledSubBlocks = 8, kMostBlockSums = 4;
inline constexpr size_t kTokenTileRows = 4, kTokenTileVectors = 3, kGroupTileRows = 3, kGroupTileVectors = 2;
}  // namespace nplora::kernels::avx2

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
extern const KernelTable k_avx2_table;
constinit const KernelTable k_avx2_table = avx2::make_table("avx2");
}  // namespace nplora::kernels
