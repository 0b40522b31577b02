#include "base/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <mutex>
#include <string>

namespace nplora {

namespace {

// What neighbours take one after the other, and the largest of them: of larger ones little lies in small pages.
constexpr size_t kRegion = size_t{32} << 20, kLargestNeighbour = size_t{8} << 20;

#ifdef __linux__
constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1, of which older headers do not know
#endif

size_t whole_pages(size_t bytes) {
  static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

void advise_huge([[maybe_unused]] char* at, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
}

// So many bytes at the start of a huge page.
char* map_aligned(size_t bytes) {
  char* const first = map(bytes + kHugePage);
  if (first == nullptr) return nullptr;
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
  if (before > 0) munmap(first, before);
  munmap(first + before + bytes, kHugePage - before);
  return first + before;
}

#ifdef __linux__

std::string setting(const char* name) {
  std::string line;
  std::getline(std::ifstream(std::string("/sys/kernel/mm/transparent_hugepage/") + name), line);
  return line;
}

// Whether what lies in small pages can be moved into a huge one. The system would do so where its administrator wants none, too.
bool can_collapse() {
  const std::string enabled = setting("enabled");
  if (enabled.empty() || enabled.find("[never]") != std::string::npos) return false;
  if (setting("hpage_pmd_size") != std::to_string(kHugePage)) return false;
  char* const trial = map_aligned(kHugePage);
  if (trial == nullptr) return false;
  *trial = 1;
  const bool done = madvise(trial, kHugePage, kCollapse) == 0;
  munmap(trial, kHugePage);
  return done;
}

// Where the last weight ends the next one begins. What a weight leaves is not taken again: it is unmapped, and a huge page with
// a hole is none, so that it does not come back with a neighbour's either.
class Neighbours {
 public:
  // nullptr also while another thread is here: a child of a fork would wait for it in vain.
  char* take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    if (size > static_cast<size_t>(end_ - next_) && !open()) return nullptr;
    char* const at = next_;
    next_ += size;
    char* const taken = next_ - reinterpret_cast<uintptr_t>(next_) % kHugePage;
    if (taken > small_pages_) {
      advise_huge(small_pages_, static_cast<size_t>(taken - small_pages_));
      if (small_pages_ < at)
        madvise(small_pages_, kHugePage, kCollapse);  // or, in its own time, the system does so
      small_pages_ = taken;
    }
    return at;
  }

 private:
  // A new region; what is left of the one before goes back.
  bool open() {
    if (next_ != end_) munmap(next_, static_cast<size_t>(end_ - next_));
    next_ = end_ = nullptr;
    char* const region = map_aligned(kRegion);
    if (region == nullptr) return false;
    madvise(region, kRegion, MADV_NOHUGEPAGE);  // until they are taken
    next_ = small_pages_ = region;
    end_ = region + kRegion;
    return true;
  }

  std::mutex mutex_;
  char *next_ = nullptr, *end_ = nullptr;
  char* small_pages_ = nullptr;  // from this huge page on all is in small pages, or not there yet
};

#endif

}  // namespace

char* map(size_t bytes) {
  void* const start =
      mmap(nullptr, whole_pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

char* map_huge(size_t bytes) {
  const size_t size = whole_pages(bytes);
  char* const start = map_aligned(size);
  if (start != nullptr) advise_huge(start, size);
  return start;
}

char* map_beside(size_t bytes) {
#ifdef __linux__
  static const bool shares = can_collapse();
  static Neighbours neighbours;
  if (shares && bytes <= kLargestNeighbour)
    if (char* const at = neighbours.take(whole_pages(bytes))) return at;
#endif
  return bytes < kHugePage ? map(bytes) : map_huge(bytes);
}

void unmap(void* at, size_t bytes) {
  munmap(at, whole_pages(bytes));
}

}  // namespace nplora
