#include "base/buffer_cache.h"

#include <algorithm>
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
  AlignedBuffer buffer;
  const auto found = idle_.lower_bound(bytes);
  if (found != idle_.end() && found->first <= most_for(bytes)) {
    buffer = std::move(found->second);
    idle_.erase(found);
    idle_bytes_ -= buffer.size();
  } else {
    make_room(bytes);
    buffer = AlignedBuffer(bytes);
  }
  used_bytes_ += buffer.size();
  most_used_ = std::max(most_used_, used_bytes_);
  return buffer;
}

// Makes room for a new buffer of `bytes` bytes. Frees idle buffers, the largest first, until all buffers,
// including the new buffer, take at most `most` bytes in total. `most` is peak + kSpareBytes, but at most
// 2 * peak. Here, `peak` is the largest number of bytes that were in use at one time, if the new buffer is
// counted as used.
void BufferCache::make_room(size_t bytes) {
  const size_t peak = std::max(most_used_, used_bytes_ + bytes), most = peak + std::min(peak, kSpareBytes);
  while (!idle_.empty() && used_bytes_ + idle_bytes_ + bytes > most) {
    const auto largest = std::prev(idle_.end());
    idle_bytes_ -= largest->first;
    idle_.erase(largest);
  }
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
