#pragma once

#include <cstddef>

namespace nplora {

inline constexpr size_t kCacheLine = 64;

}  // namespace nplora
