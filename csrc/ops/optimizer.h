// Optimiser steps over a list of live buffers, in place.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernel_table.h"

namespace nplora {

template <class T>
struct Trained {
  size_t n;
  T* value;
  const T* grad;
  T* first;   // AdamW: first moment; SGD: momentum, or null
  T* second;  // AdamW: second moment
  double lr, weight_decay;
};

template <class T>
void adamw_step(const std::vector<Trained<T>>& parameters, kernels::AdamWCoefficients shared);
template <class T>
void sgd_step(const std::vector<Trained<T>>& parameters, kernels::SgdCoefficients shared);

template <class T>
struct Span {
  size_t n;
  const T* data;
};
template <class T>
double sum_of_squares(const std::vector<Span<T>>& arrays);

}  // namespace nplora
