// Measures the highest number of operations per second of this machine, with operands in registers.
#pragma once

#include "base/profile.h"

namespace nplora {

// Multiplies on all threads for some milliseconds, with the instructions that products in this arithmetic
// use. Returns the operations per second.
double peak_rate(Arithmetic arithmetic);

}  // namespace nplora
