// Checks that all elements of an array are finite. The memory bandwidth limits the speed.
#pragma once

#include <cstddef>

#include "ops/storage.h"

namespace nplora {

// The index of the first NaN or infinity among n elements, or n if all are finite. `storage` must not be a
// block format.
size_t first_nonfinite(Storage storage, size_t n, const void* elements);

}  // namespace nplora
