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
  if (const auto found = idle_.lower_bound(bytes); found != idle_.end() && found->first <= most_for(bytes)) {
    buffer = remove(found);
  } else {
    const size_t most_idle = most_idle_beside(bytes);
    if (idle_bytes_ > most_idle && nearest(bytes)->second.resize(bytes)) buffer = remove(nearest(bytes));
    while (idle_bytes_ > most_idle) remove(std::prev(idle_.end()));
    if (buffer.size() == 0) buffer = AlignedBuffer(bytes);
  }
  used_bytes_ += buffer.size();
  most_used_ = std::max(most_used_, used_bytes_);
  return buffer;
}

// The largest number of idle bytes if a new buffer of `bytes` bytes is used. All buffers together may take
// peak + kSpareBytes, but at most 2 * peak. Here, `peak` is the largest number of bytes that were in use at
// one time, including the new buffer.
size_t BufferCache::most_idle_beside(size_t bytes) const {
  const size_t used = used_bytes_ + bytes, peak = std::max(most_used_, used);
  return peak + std::min(peak, kSpareBytes) - used;
}

// The idle buffer whose size is nearest to `bytes`. There must be an idle buffer.
BufferCache::Idle::iterator BufferCache::nearest(size_t bytes) {
  const auto above = idle_.lower_bound(bytes);
  if (above == idle_.begin()) return above;
  const auto below = std::prev(above);
  return above == idle_.end() || bytes - below->first < above->first - bytes ? below : above;
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
