// Large buffers that are reused: each training step takes the buffers that the previous step has given back.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <optional>

#include "base/aligned_buffer.h"

namespace nplora {

// A buffer is used from `take` until `give_back`, and idle afterwards. All buffers together take at most P +
// min(P, kSpareBytes) bytes, where P is the largest number of bytes that were used at one time since the last
// call of `release`. The spare memory, min(P, kSpareBytes), is for code that needs a few buffers of different
// sizes one after the other, for example a forward pass over a prompt. Without spare memory, this forward
// pass would free and map nearly all buffers in each layer.
class BufferCache {
 public:
  static constexpr size_t kSpareBytes = size_t{4} << 20;

  // Returns a buffer of at least this many bytes, with undefined contents. Reuses an idle buffer if its size
  // is at most a quarter above `bytes`. Otherwise, allocates a new buffer. If the buffers would then take too
  // much memory, resizes an idle buffer instead, or frees idle buffers.
  AlignedBuffer take(size_t bytes);
  void give_back(AlignedBuffer buffer) noexcept;

  // Returns the idle buffers to the system.
  void release() noexcept;

 private:
  using Idle = std::multimap<size_t, AlignedBuffer>;  // the keys are sizes in bytes

  size_t most_idle_beside(size_t bytes) const;
  std::optional<AlignedBuffer> remove_resized(size_t bytes);
  AlignedBuffer remove(Idle::iterator chosen);

  std::mutex mutex_;
  Idle idle_;
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_used_ = 0;
};

// The buffer cache of this process. The cache is never destroyed, because arrays may give their buffers back
// while the process ends.
BufferCache& buffer_cache();

}  // namespace nplora
