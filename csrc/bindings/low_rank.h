// Code that bind_lora.cpp and bind_inference.cpp share.
#pragma once

#include "bindings/arrays.h"
#include "ops/lora.h"

namespace nplora::bindings {

template <class T>
LowRank<T> low_rank(const WeightView& w, const Array<T>& a, const Array<T>& b, double scale, double dropout,
                    uint64_t key) {
  const LowRank<T> low{read(a), read(b), scale, dropout, key};
  require_shape("a", a, w.d_out, low.b.rows);
  require_shape("b", b, low.a.cols, w.d_in);
  require(dropout >= 0 && dropout < 1, "dropout must be at least 0 and below 1");
  return low;
}

template <class T>
const T* bias_data(const WeightView& w, const std::optional<Array<T>>& bias) {
  if (!bias) return nullptr;
  require_size("bias", *bias, w.d_out);
  return bias->data();
}

}  // namespace nplora::bindings
