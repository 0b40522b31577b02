// Optimiser steps over a list of live buffers, in place. Nothing is allocated after the first step of a thread.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernel_table.h"

namespace nplora {

// The buffers of one parameter: n elements each, of float or of double.
struct Trained {
  bool is_double;
  size_t n;
  void* value;
  const void* grad;
  void* first;   // AdamW: first moment; SGD: momentum, or null
  void* second;  // AdamW: second moment
  double lr;
};

void adamw_step(const std::vector<Trained>& parameters, kernels::AdamWCoefficients shared);
void sgd_step(const std::vector<Trained>& parameters, kernels::SgdCoefficients shared);

// Over all gradients, in double.
double sum_of_squares(const std::vector<Trained>& parameters);

// The Euclidean norm of all gradients times *scale, which is lowered where the norm would be above max_norm.
double clip(const std::vector<Trained>& parameters, double max_norm, double* scale);

}  // namespace nplora
