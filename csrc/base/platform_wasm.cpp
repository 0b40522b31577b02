// Platform functions for WebAssembly, which has one thread, no signals, and memory that only grows.
#include <new>

#include "base/cache_line.h"
#include "base/platform.h"

namespace nplora::platform {

size_t page_size() {
  return size_t{64} << 10;
}

// The alignment is ignored, because WebAssembly has no huge pages.
char* map_pages(size_t bytes, size_t) {
  return static_cast<char*>(::operator new(bytes, std::align_val_t{kCacheLine}, std::nothrow));
}

void unmap_pages(void* at, size_t) {
  ::operator delete(at, std::align_val_t{kCacheLine});
}

char* remap_pages(char*, size_t, size_t, size_t) {
  return nullptr;
}

void prefer_huge_pages(char*, size_t) {}

void keep_small_pages(char*, size_t) {}

std::optional<bool> can_collapse_pages(size_t) {
  return false;
}

void collapse_pages(char*, size_t) {}

bool has_threads() {
  return false;
}

void call_in_forked_child(void (*)()) {}

WithoutSignals::WithoutSignals() = default;
WithoutSignals::~WithoutSignals() = default;

size_t usable_processors() {
  return 1;
}

int current_processor() {
  return -1;
}

bool avoid_processor(std::span<const Thread>, int) {
  return false;
}

void explain_faults(FaultMessage) {}

bool offers_tiles() {
  return false;
}

bool request_tiles() {
  return false;
}

bool has_arm_dot_products() {
  return false;
}

bool has_arm_bf16() {
  return false;
}

bool has_arm_i8mm() {
  return false;
}

}  // namespace nplora::platform
