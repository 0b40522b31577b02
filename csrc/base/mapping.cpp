#include "base/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <mutex>
#include <optional>
#include <string>

#include "base/range.h"

namespace nplora {

namespace {

// What neighbours take one after the other, and the largest of them: of larger ones little lies in small pages.
constexpr size_t kRegion = size_t{32} << 20, kLargestNeighbour = size_t{8} << 20;

#ifdef __linux__
constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1, of which older headers do not know
#endif

// Not in whole_pages: the child of a fork could wait for another thread that asks.
const size_t page_size = static_cast<size_t>(sysconf(_SC_PAGESIZE));

size_t whole_pages(size_t bytes) {
  return round_up(bytes, page_size);
}

char* huge_page_of(char* at) {
  return at - reinterpret_cast<uintptr_t>(at) % kHugePage;
}

char* huge_page_behind(char* at) {
  return huge_page_of(at + kHugePage - 1);
}

char* map_pages(size_t bytes) {
  void* const start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return start == MAP_FAILED ? nullptr : static_cast<char*>(start);
}

void advise_huge([[maybe_unused]] char* at, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  madvise(at, bytes, MADV_HUGEPAGE);
#endif
}

// So many bytes at the start of a huge page.
char* map_aligned(size_t bytes) {
  char* const first = map_pages(bytes + kHugePage);
  if (first == nullptr) return nullptr;
  char* const start = huge_page_behind(first);
  const auto before = static_cast<size_t>(start - first);
  if (before > 0) munmap(first, before);
  munmap(start + bytes, kHugePage - before);
  return start;
}

#ifdef __linux__

std::string setting(const char* name) {
  std::string line;
  std::getline(std::ifstream(std::string("/sys/kernel/mm/transparent_hugepage/") + name), line);
  return line;
}

// Whether what lies in small pages can be moved into a huge one; nothing where there is no memory to try it. The system would do so
// where its administrator wants none, too.
std::optional<bool> can_collapse() {
  std::string enabled = setting("hugepages-2048kB/enabled");
  if (enabled.empty() || enabled.find("[inherit]") != std::string::npos) enabled = setting("enabled");
  if (enabled.empty() || enabled.find("[never]") != std::string::npos) return false;
  if (setting("hpage_pmd_size") != std::to_string(kHugePage)) return false;
  char* const trial = map_aligned(kHugePage);
  if (trial == nullptr) return std::nullopt;
  *trial = 1;
  const bool knows = madvise(trial, kHugePage, kCollapse) == 0 || errno != EINVAL;  // it may be short of them
  munmap(trial, kHugePage);
  return knows;
}

// Where the last weight ends the next one begins. Nobody waits for another thread: the child of a fork would do so in vain.
class Neighbours {
 public:
  // nullptr where nothing is shared, for now or ever.
  char* take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    if (!shares_) shares_ = can_collapse();
    if (!shares_.value_or(false)) return nullptr;
    if (has_hole_.exchange(false) && next_ != end_) go_to(huge_page_behind(next_));
    if (size > static_cast<size_t>(end_ - next_) && !open()) return nullptr;
    char* const at = next_;
    next_ += size;
    char* const taken = huge_page_of(next_);
    if (taken > small_pages_) {
      advise_huge(small_pages_, static_cast<size_t>(taken - small_pages_));
      if (small_pages_ < at) madvise(small_pages_, kHugePage, kCollapse);
      small_pages_ = taken;
    }
    return at;
  }

  // What is unmapped of the huge page that is being filled may be a stranger's next: the page is left as it is. A thread that is in
  // `take` at that moment may miss it, which can cost that stranger memory, but never what lies there.
  void leave(const char* at, size_t size) {
    if (at < end_ && at + size > small_pages_) has_hole_ = true;
  }

 private:
  // What is between goes back.
  void go_to(char* start) {
    if (start != next_) munmap(next_, static_cast<size_t>(start - next_));
    next_ = start;
    small_pages_ = start;
  }

  bool open() {
    go_to(end_);
    next_ = nullptr;
    end_ = nullptr;
    char* const region = map_aligned(kRegion);
    if (region == nullptr) return false;
    madvise(region, kRegion, MADV_NOHUGEPAGE);  // until they are taken
    next_ = region;
    small_pages_ = region;
    end_ = region + kRegion;
    return true;
  }

  std::mutex mutex_;
  std::optional<bool> shares_;
  char* next_ = nullptr;
  std::atomic<char*> end_ = nullptr;  // of the region
  // From this huge page on all is in small pages, or not there yet.
  std::atomic<char*> small_pages_ = nullptr;
  std::atomic<bool> has_hole_ = false;
};

constinit Neighbours neighbours;

#endif

}  // namespace

char* map(size_t bytes) {
  const size_t size = whole_pages(bytes);
  if (size < kHugePage) return map_pages(size);
  char* const start = map_aligned(size);
  if (start != nullptr) advise_huge(start, size);
  return start;
}

char* map_beside(size_t bytes) {
#ifdef __linux__
  const size_t size = whole_pages(bytes);
  if (size <= kLargestNeighbour && size % kHugePage != 0)
    if (char* const at = neighbours.take(size)) return at;
#endif
  return map(bytes);
}

void unmap(void* at, size_t bytes) {
  const size_t size = whole_pages(bytes);
#ifdef __linux__
  neighbours.leave(static_cast<const char*>(at), size);
#endif
  munmap(at, size);
}

}  // namespace nplora
