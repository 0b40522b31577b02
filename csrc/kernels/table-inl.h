// Fills the table of one unit from the bodies above it.

namespace nplora::kernels::NPLORA_ISA {

template <class T>
constexpr Products<T> make_products() {
  return {2 * Vec<T>::kLanes, kTileRows,    kTileTokens,  lane_tile<T>, to_lanes<T>, from_lanes<T>,
          outer_tile<T>,      dot_panel<T>, sum_parts<T>, adamw<T>,     sgd<T>,      sum_of_squares<T>,
          dropout<T>};
}

constexpr KernelTable make_table(const char* isa) {
  return {isa,
          make_products<float>(),
          make_products<double>(),
          {widen_bfloat16, narrow_bfloat16, widen_float16, narrow_float16}};
}

}  // namespace nplora::kernels::NPLORA_ISA
