#include "base/buffer_cache.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <new>
#include <utility>

namespace nplora {

namespace {

// The size of the largest idle buffer that take(bytes) may reuse: 1.25 * bytes, because batches differ a
// little in their number of tokens.
constexpr size_t most_for(size_t bytes) {
  return bytes + bytes / 4;
}

}  // namespace

AlignedBuffer BufferCache::take(size_t bytes) {
  const std::lock_guard lock(mutex_);
  std::optional<AlignedBuffer> buffer;
  if (const auto found = idle_.lower_bound(bytes); found != idle_.end() && found->first <= most_for(bytes)) {
    buffer = remove(found);
  } else {
    const size_t most_idle = most_idle_beside(bytes);
    if (idle_bytes_ > most_idle) buffer = remove_resized(bytes);
    while (idle_bytes_ > most_idle) remove(std::prev(idle_.end()));
    if (!buffer) buffer = AlignedBuffer(bytes);
  }
  used_bytes_ += buffer->size();
  most_used_ = std::max(most_used_, used_bytes_);
  return *std::move(buffer);
}

// Returns how many bytes may stay idle if a new buffer of `bytes` bytes is in use. All buffers together may
// take peak + kSpareBytes, but at most 2 * peak. Here, `peak` is the largest number of bytes that were in use
// at one time, including the new buffer.
size_t BufferCache::most_idle_beside(size_t bytes) const {
  const size_t used = used_bytes_ + bytes, peak = std::max(most_used_, used);
  return peak + std::min(peak, kSpareBytes) - used;
}

// Resizes an idle buffer to `bytes` bytes, and removes it from the idle buffers. Tries the next larger and
// the next smaller buffer, beginning with the one whose size is nearer to `bytes`. Returns std::nullopt if
// neither can be resized.
std::optional<AlignedBuffer> BufferCache::remove_resized(size_t bytes) {
  const auto larger = idle_.lower_bound(bytes);
  const auto smaller = larger == idle_.begin() ? idle_.end() : std::prev(larger);
  const auto distance = [&](Idle::iterator chosen) {
    if (chosen == idle_.end()) return SIZE_MAX;
    return std::max(chosen->first, bytes) - std::min(chosen->first, bytes);
  };
  std::array both{larger, smaller};
  if (distance(smaller) < distance(larger)) std::swap(both[0], both[1]);
  for (const auto chosen : both)
    if (chosen != idle_.end() && chosen->second.resize(bytes)) return remove(chosen);
  return std::nullopt;
}

AlignedBuffer BufferCache::remove(Idle::iterator chosen) {
  idle_bytes_ -= chosen->first;
  AlignedBuffer buffer = std::move(chosen->second);
  idle_.erase(chosen);
  return buffer;
}

void BufferCache::give_back(AlignedBuffer buffer) noexcept {
  const std::lock_guard lock(mutex_);
  const size_t bytes = buffer.size();
  used_bytes_ -= bytes;
  try {
    idle_.emplace(bytes, std::move(buffer));
    idle_bytes_ += bytes;
  } catch (const std::bad_alloc&) {
    // There is no memory for an entry in the list of idle buffers, so the buffer is freed.
  }
}

void BufferCache::release() noexcept {
  const std::lock_guard lock(mutex_);
  idle_.clear();
  idle_bytes_ = 0;
  most_used_ = used_bytes_;
}

BufferCache& buffer_cache() {
  static auto& cache = *new BufferCache;
  return cache;
}

}  // namespace nplora
