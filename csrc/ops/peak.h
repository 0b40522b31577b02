// Measures the highest number of operations per second of this machine, with operands in registers.
#pragma once

#include "base/profile.h"

namespace nplora {

// Returns the number of operations per second of all threads together. The threads multiply for some
// milliseconds, with the instructions that matrix products in `arithmetic` use.
double peak_rate(Arithmetic arithmetic);

}  // namespace nplora
