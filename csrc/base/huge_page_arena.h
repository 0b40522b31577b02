// Memory in huge pages that neighbours share.
#pragma once

#include <cstddef>
#include <iterator>
#include <map>
#include <mutex>

namespace nplora {

inline constexpr size_t kHugePage = size_t{2} << 20;

// So many bytes, rounded up.
size_t whole_pages(size_t bytes);

// A mapping of so many bytes, or nullptr.
char* map_pages(size_t bytes);

// One that begins at a huge page.
char* map_at_huge_page(size_t bytes);

// Offers the huge pages of a range to the system. It is advice: a refusal costs speed, nothing else.
void advise_huge(char* at, size_t bytes);

// For what lives long and is read from memory again and again: a huge page costs the processor one translation, where a weight of
// 1 MB in pages of 4 KB brings 300 that its tables do not keep. What ends within a huge page takes its first part only, until the
// neighbour behind takes the rest: nobody's memory is larger for it.
class HugePageArena {
 public:
  // Undefined contents, at the start of a page; nullptr where there is no memory.
  void* allocate(size_t bytes);
  void free(void* at, size_t bytes) noexcept;

 private:
  struct Region {
    char* end;
    size_t live;  // allocations
  };
  using Regions = std::map<char*, Region>;  // by their starts

  char* open(size_t bytes);
  Regions::iterator region_of(void* at) { return std::prev(regions_.upper_bound(static_cast<char*>(at))); }

  std::mutex mutex_;
  Regions regions_;
  char *next_ = nullptr, *end_ = nullptr;  // what is free of the newest region
  char* small_pages_ = nullptr;  // in it, from this huge page on memory is in pages of 4 KB, or not there yet
};

}  // namespace nplora
