// Memory from the system, in whole pages.
#pragma once

#include <cstddef>

namespace nplora {

// The size of a huge page on x86-64, and on aarch64 with pages of 4 KB. On systems with larger huge pages,
// weights share none.
inline constexpr size_t kHugePage = size_t{2} << 20;

// Both functions return nullptr if there is no memory. unmap undoes both.

// Mappings of 2 MiB or more start at a huge page, and the system is asked for huge pages. If it refuses, only
// speed is lost.
char* map(size_t bytes);

// For weights, which are read from memory again and again. A huge page needs one address translation; the
// same bytes in small pages need 512, more than the processor keeps. So weights are placed one after the
// other, and a huge page is requested once weights fill all of it: it never makes a process larger while they
// live. Memory that is unmapped inside a huge page returns to the system when it is short of memory, or
// together with the rest of the page.
char* map_beside(size_t bytes);

void unmap(void* at, size_t bytes);

}  // namespace nplora
