// Optimiser steps that change a list of parameters in place. After the first step of a thread, further steps
// with the same parameters allocate no memory.
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
  void* first;   // AdamW: first moment; SGD: momentum, or null without momentum
  void* second;  // AdamW: second moment
  double lr;
};

void adamw_step(const std::vector<Trained>& parameters, kernels::AdamWCoefficients shared);
void sgd_step(const std::vector<Trained>& parameters, kernels::SgdCoefficients shared);

// The sum of the squares of all gradients, in double.
double sum_of_squares(const std::vector<Trained>& parameters);

// Returns the Euclidean norm of all gradients, multiplied by `*scale`. If the result is above max_norm,
// `*scale` is lowered so that the norm times the new `*scale` is max_norm.
double clip(const std::vector<Trained>& parameters, double max_norm, double* scale);

}  // namespace nplora
