#include "base/buffer_cache.h"

#include <algorithm>
#include <new>
#include <utility>

namespace nplora {

namespace {

// The largest size of an idle buffer that `take` reuses for a request of `bytes`. This size is a quarter
// larger than the request, because batches differ a little in their number of tokens.
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

// Makes room for a new buffer of `bytes`: frees idle buffers until the sum of used, idle and new memory is
// at most the peak of used memory and the spare memory. The new buffer counts as used in this peak. The
// largest buffer that is smaller than the new one is freed first, because the new one can often replace it.
void BufferCache::make_room(size_t bytes) {
  const size_t peak = std::max(most_used_, used_bytes_ + bytes), least = std::min(peak, kSpareBytes);
  const size_t most = peak + (keepers_ > 0 ? std::max(peak / 8, least) : least);
  while (!idle_.empty() && used_bytes_ + idle_bytes_ + bytes > most) {
    const auto larger = idle_.lower_bound(bytes);
    const auto freed = std::prev(larger == idle_.begin() ? idle_.end() : larger);
    idle_bytes_ -= freed->first;
    idle_.erase(freed);
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
    // If there is no memory for an entry in the list of idle buffers, the buffer is freed.
  }
}

void BufferCache::keep_more(bool on) {
  const std::lock_guard lock(mutex_);
  keepers_ += on ? 1 : -1;
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
