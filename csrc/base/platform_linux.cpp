// Platform functions for Linux that POSIX alone cannot implement.
#include <sched.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>

#include "base/platform.h"

namespace nplora::platform {

namespace {

constexpr int kCollapse = 25;  // MADV_COLLAPSE (Linux 6.1), which older headers lack

std::string huge_page_setting(const char* name) {
  // std::ifstream would make a wheel 160 KB larger if it contains the C++ library.
  char line[128] = "";
  const std::string path = std::string("/sys/kernel/mm/transparent_hugepage/") + name;
  if (FILE* file = std::fopen(path.c_str(), "re")) {
    if (!std::fgets(line, sizeof line, file)) line[0] = 0;
    std::fclose(file);
  }
  line[std::strcspn(line, "\n")] = 0;
  return line;
}

}  // namespace

char* remap_pages(char* at, size_t old_bytes, size_t new_bytes, size_t alignment) {
  static std::atomic<bool> moves_to_target = true;
  const bool any_page_fits = alignment <= page_size();
  void* const remapped = mremap(at, old_bytes, new_bytes, any_page_fits ? MREMAP_MAYMOVE : 0);
  if (remapped != MAP_FAILED) return static_cast<char*>(remapped);
  if (any_page_fits || new_bytes <= old_bytes || !moves_to_target) return nullptr;
  char* const target = map_pages(new_bytes, alignment);
  if (target == nullptr) return nullptr;
  if (mremap(at, old_bytes, new_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target) != MAP_FAILED) return target;
  // The failed mremap may already have unmapped the target, and another thread may then have mapped other
  // memory at the same addresses. So the target must not be unmapped here. No page of the target was used, so
  // only address space is lost. This happens only once, because later calls do not try to move a mapping to a
  // target.
  moves_to_target = false;
  return nullptr;
}

void prefer_huge_pages(char* at, size_t bytes) {
  madvise(at, bytes, MADV_HUGEPAGE);
}

void keep_small_pages(char* at, size_t bytes) {
  madvise(at, bytes, MADV_NOHUGEPAGE);
}

// MADV_COLLAPSE ignores the administrator's settings for huge pages, so these settings are read first.
std::optional<bool> can_collapse_pages(size_t huge_page) {
  std::string enabled =
      huge_page_setting(("hugepages-" + std::to_string(huge_page >> 10) + "kB/enabled").c_str());
  if (enabled.empty() || enabled.find("[inherit]") != std::string::npos)
    enabled = huge_page_setting("enabled");
  if (enabled.empty() || enabled.find("[never]") != std::string::npos) return false;
  if (huge_page_setting("hpage_pmd_size") != std::to_string(huge_page)) return false;
  char* const trial = map_pages(huge_page, huge_page);
  if (trial == nullptr) return std::nullopt;
  *trial = 1;
  // The error EINVAL means that the Linux kernel does not know kCollapse. Other errors mean that no huge page
  // is free.
  const bool knows = madvise(trial, huge_page, kCollapse) == 0 || errno != EINVAL;
  unmap_pages(trial, huge_page);
  return knows;
}

void collapse_pages(char* at, size_t bytes) {
  madvise(at, bytes, kCollapse);
}

// std::thread::hardware_concurrency counts all processors of the machine, including processors that this
// process may not use because of taskset or a container.
size_t usable_processors() {
  for (size_t most = 1024; most <= size_t{1} << 20; most *= 4) {  // Linux supports fewer than 2^20 processors
    cpu_set_t* const allowed = CPU_ALLOC(most);
    if (allowed == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(most);
    const int count = sched_getaffinity(0, bytes, allowed) == 0 ? CPU_COUNT_S(bytes, allowed) : 0;
    CPU_FREE(allowed);
    if (count > 0) return static_cast<size_t>(count);
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

int current_processor() {
  return sched_getcpu();
}

bool avoid_processor(std::span<const Thread> threads, int processor) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;
  CPU_CLR(static_cast<size_t>(processor), &allowed);
  if (CPU_COUNT(&allowed) == 0) return false;
  for (const Thread thread : threads) pthread_setaffinity_np(thread, sizeof allowed, &allowed);
  return true;
}

#if defined(__x86_64__)

namespace {

constexpr long kTileData = 18;  // the number that Linux calls XFEATURE_XTILEDATA

}  // namespace

bool offers_tiles() {
  constexpr long kSupported = 0x1021;  // Linux calls this request ARCH_GET_XCOMP_SUPP
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1) != 0;
}

bool request_tiles() {
  constexpr long kRequestPermission = 0x1023;  // Linux calls this request ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool offers_tiles() {
  return false;
}

bool request_tiles() {
  return false;
}

#endif

bool has_arm_dot_products() {
  constexpr unsigned long kDotProducts = 1ul << 20;  // a bit in AT_HWCAP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
}

bool has_arm_bf16() {
  constexpr unsigned long kBf16 = 1ul << 14;  // a bit in AT_HWCAP2
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
}

bool has_arm_i8mm() {
  constexpr unsigned long kI8mm = 1ul << 13;  // a bit in AT_HWCAP2
  return (getauxval(AT_HWCAP2) & kI8mm) != 0;
}

}  // namespace nplora::platform
