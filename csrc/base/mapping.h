// Memory from the system, in whole pages.
#pragma once

#include <cstddef>

namespace nplora {

// The size of a huge page on x86-64, and on aarch64 with pages of 4 KB. On systems with larger huge pages,
// map_beside does not place weights one after the other.
inline constexpr size_t kHugePage = size_t{2} << 20;

// If there is no memory, map and map_beside return nullptr. Memory from either function is freed by unmap.

// A mapping of 2 MiB or more starts at a multiple of the huge page size, and the system is asked to use huge
// pages for it. If the system refuses, only speed is lost.
char* map(size_t bytes);

// Maps memory for a weight. A weight is read from memory again and again. A huge page needs one address
// translation. The same bytes in small pages need 512 translations, and the processor cannot cache the
// translations of so many small pages. So weights are placed one after the other and share huge pages. A huge
// page is requested only when weights fill all of it. As long as no weight is freed, huge pages therefore
// take no more memory than small pages would take. If a freed weight filled only a part of a huge page, the
// system reclaims this part later: when memory is short, or when the other part of the huge page is unmapped.
char* map_beside(size_t bytes);

// Changes the size of a mapping that `map` made. Returns the new start of the mapping. The caller must treat
// the contents as undefined. The system keeps the pages within the smaller of the two sizes. This is faster
// than unmapping the old mapping and mapping a new one, because the system would have to clear all pages of
// the new mapping. If the system cannot do this, or if exactly one of the two sizes is large enough for huge
// pages, `remap` returns nullptr and changes nothing.
char* remap(void* at, size_t old_bytes, size_t new_bytes);

void unmap(void* at, size_t bytes);

}  // namespace nplora
