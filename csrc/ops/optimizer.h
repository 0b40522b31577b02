// Optimiser steps over a list of live buffers, in place. After a thread's first step, nothing is allocated.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/kernel_table.h"

namespace nplora {

// The buffers of one parameter, each of n elements of float or double.
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

// The sum over all gradients, in double.
double sum_of_squares(const std::vector<Trained>& parameters);

// Returns the Euclidean norm of all gradients times *scale. If it is above max_norm, *scale is lowered.
double clip(const std::vector<Trained>& parameters, double max_norm, double* scale);

}  // namespace nplora
