// Platform functions for macOS that POSIX alone cannot implement. macOS offers no huge pages and no Intel
// AMX, and cannot keep a thread off a processor.
#include <sys/sysctl.h>

#include <algorithm>

#include "base/platform.h"

namespace nplora::platform {

namespace {

bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

}  // namespace

char* remap_pages(char*, size_t, size_t, size_t) {
  return nullptr;
}

void prefer_huge_pages(char*, size_t) {}

void keep_small_pages(char*, size_t) {}

std::optional<bool> can_collapse_pages(size_t) {
  return false;
}

void collapse_pages(char*, size_t) {}

size_t usable_processors() {
  return std::max(1u, std::thread::hardware_concurrency());
}

int current_processor() {
  return -1;
}

bool avoid_processor(std::span<const Thread>, int) {
  return false;
}

bool offers_tiles() {
  return false;
}

bool request_tiles() {
  return false;
}

bool has_arm_dot_products() {
  return has_feature("hw.optional.arm.FEAT_DotProd");
}

bool has_arm_bf16() {
  return has_feature("hw.optional.arm.FEAT_BF16");
}

bool has_arm_i8mm() {
  return has_feature("hw.optional.arm.FEAT_I8MM");
}

}  // namespace nplora::platform
