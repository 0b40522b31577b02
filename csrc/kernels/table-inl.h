// Fills the table of one unit from the bodies above it.

namespace nplora::kernels::NPLORA_ISA {

template <class E>
constexpr Tiles<E> make_tiles() {
  return {2 * Vec<E>::kLanes, kTileRows, kTileTokens,  kOuterVectors * Vec<E>::kLanes,
          kPieceBytes<E>,     1,         lane_tile<E>, outer_tile<E, E>};
}

template <class T>
constexpr Products<T> make_products() {
  return {make_tiles<T>(), to_lanes<T>, from_lanes<T>, transpose<T>,      interleave<T>, sum_parts<T>,
          add_dots<T>,     adamw<T>,    sgd<T>,        sum_of_squares<T>, dropout<T>,    merge<T>};
}

template <class W>
constexpr SmallProducts<W> make_small() {
  return {dots<W>, outer_tile<Operand<W>, typename StoredOf<W>::Type>};
}

constexpr BlockDecoders make_block_decoders() {
  return {{decode<BlockQ4_0>, decode<BlockQ4_1>, decode<BlockQ5_0>, decode<BlockQ5_1>, decode<BlockQ8_0>,
           decode<BlockQ4_K>, decode<BlockQ5_K>, decode<BlockQ6_K>},
          decode_nf4};
}

constexpr BlockDots make_block_dots() {
  return {{dot_blocks<BlockQ4_0>, dot_blocks<BlockQ4_1>, dot_blocks<BlockQ5_0>, dot_blocks<BlockQ5_1>,
           dot_blocks<BlockQ8_0>, dot_blocks<BlockQ4_K>, dot_blocks<BlockQ5_K>, dot_blocks<BlockQ6_K>},
          dot_nf4};
}

constexpr Int8Products make_int8() {
  return {quantize_row,
          {int8_dots<BlockQ4_0>, int8_dots<BlockQ4_1>, int8_dots<BlockQ5_0>, int8_dots<BlockQ5_1>,
           int8_dots<BlockQ8_0>, int8_dots<BlockQ4_K>, int8_dots<BlockQ5_K>, int8_dots<BlockQ6_K>}};
}

constexpr Transformer make_transformer() {
  return {rms_norm,
          rms_norm_backward,
          rotate,
          {gated<Silu>, gated<GeluTanh>},
          {gated_backward<Silu>, gated_backward<GeluTanh>},
          largest,
          exp_sum,
          scaled,
          dot,
          key_dots,
          add_values,
          scale_columns,
          softmax_step,
          softmax_backward};
}

constexpr KernelTable make_table(const char* isa) {
  return {isa,
          make_products<float>(),
          make_products<double>(),
          make_tiles<Bf16Pair>(),
          make_small<float>(),
          make_small<double>(),
          make_small<Bf16>(),
          make_small<Bf16Pair>(),
          {widen_bfloat16, narrow_bfloat16, widen_float16, narrow_float16, dither_bfloat16, dither_float16,
           pair_rows, pair_bits},
          make_block_decoders(),
          make_block_dots(),
          make_int8(),
          make_transformer()};
}

}  // namespace nplora::kernels::NPLORA_ISA
