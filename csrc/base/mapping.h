// Memory from the system, in whole pages.
#pragma once

#include <cstddef>

namespace nplora {

// Of x86-64, and of aarch64 with pages of 4 KB. Where huge pages are larger weights share none.
inline constexpr size_t kHugePage = size_t{2} << 20;

// Both return nullptr where there is no memory, and are undone by unmap.

// From 2 MiB on at the start of a huge page, and offered to the system as huge pages: a refusal costs speed, nothing else.
char* map(size_t bytes);

// For weights, which are read from memory again and again. A huge page needs one address translation, the same bytes in small pages
// need 512, more than the processor keeps. So weights lie one behind the other, and a huge page is asked for when weights have taken
// all of it: nobody's memory is larger for it while they live. What is unmapped of a huge page comes back when the system
// is short of memory, or with the rest of the page.
char* map_beside(size_t bytes);

void unmap(void* at, size_t bytes);

}  // namespace nplora
