// Makes the kernel table of a kernel unit (isa_*.cpp). The table holds the kernels from the files that the
// unit included before this file.

#define NPLORA_DECODERS
#include "kernels/formats.h"

namespace nplora::kernels::NPLORA_ISA {

template <class E>
constexpr Tiles<E> make_tiles() {
  return {2 * Vec<E>::kLanes,
          kTileRows,
          kTileTokens,
          kOutputVectors * Vec<E>::kLanes,
          kL1BlockBytes<E>,
          1,
          gemm_tokens_in_lanes<E>,
          gemm_outputs_in_lanes<E, E>,
          peak<E>};
}

template <class T>
constexpr Products<T> make_products() {
  return {make_tiles<T>(), to_lanes<T>, from_lanes<T>,     transpose<T>, sum_parts<T>,
          adamw<T>,        sgd<T>,      sum_of_squares<T>, dropout<T>,   merge<T>};
}

template <class W>
constexpr SmallProducts<W> make_small() {
  constexpr auto product = gemm_outputs_in_lanes<Operand<W>, typename StoredOf<W>::Type>;
  if constexpr (kValuesPerElement<W> == 1)
    return {dots<W>, add_dots<W>, product};
  else
    return {nullptr, nullptr, product};
}

#define NPLORA_DECODE(name, Name) decode<Block##Name>,
#define NPLORA_ENCODE(name, Name) encode_blocks<Block##Name>,
#define NPLORA_DOTS(name, Name) dot_blocks<Block##Name>,
#define NPLORA_INT8_DOTS(name, Name) int8_dots<Block##Name>,
constexpr BlockDecoders make_block_decoders() {
  return {{NPLORA_ROW_FORMATS(NPLORA_DECODE)}, {NPLORA_ROW_FORMATS(NPLORA_ENCODE)}, decode_nf4};
}
constexpr BlockDots make_block_dots() {
  return {{NPLORA_ROW_FORMATS(NPLORA_DOTS)}, dot_nf4};
}
constexpr Int8Products make_int8() {
  return {quantize_sub_blocks, {NPLORA_ROW_FORMATS(NPLORA_INT8_DOTS)}};
}
#undef NPLORA_DECODE
#undef NPLORA_ENCODE
#undef NPLORA_DOTS
#undef NPLORA_INT8_DOTS

constexpr Transformer make_transformer() {
  return {rms_norm,
          rms_norm_backward,
          layer_norm,
          layer_norm_backward,
          rotate,
          {gated<Silu>, gated<GeluTanh>, gated<Gelu>},
          {gated_backward<Silu>, gated_backward<GeluTanh>, gated_backward<Gelu>},
          largest,
          exp_sum,
          scaled,
          dot,
          key_dots,
          add_values,
          select,
          add_rows,
          scale_columns,
          softmax_step,
          softmax_backward,
          whole_softmax_backward};
}

constexpr NarrowKernels make_narrow() {
  return {make_tiles<Bf16Pair>(),
          make_small<Bf16Pair>(),
          {widen_bfloat16, narrow_bfloat16, widen_float16, narrow_float16, dither_bfloat16, dither_float16,
           pair_rows, pair_bits},
          make_int8(),
          make_int8_gemm()};
}

constexpr KernelTable make_table(const char* isa) {
  return {make_narrow(),          isa,
          make_products<float>(), make_products<double>(),
          make_small<float>(),    make_small<double>(),
          make_small<Bf16>(),     make_block_decoders(),
          make_block_dots(),      make_transformer()};
}

}  // namespace nplora::kernels::NPLORA_ISA
