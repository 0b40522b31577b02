// Large buffers that are used again: what one training step gives back, the next one takes.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#include "base/aligned_buffer.h"

namespace nplora {

// Buffers in use and idle ones together never take more memory than those in use have taken at most.
class BufferCache {
 public:
  // A buffer of at least so many bytes, with undefined contents: an idle one that is not much larger, else a fresh one.
  AlignedBuffer take(size_t bytes);
  void give_back(AlignedBuffer buffer) noexcept;

  // Returns the idle buffers to the system.
  void release() noexcept;

 private:
  void make_room(size_t bytes);

  std::mutex mutex_;
  std::multimap<size_t, AlignedBuffer> idle_;  // by size
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_used_ = 0;
};

// The one of this process. Never destroyed: arrays may give their buffers back while the process ends.
BufferCache& buffer_cache();

}  // namespace nplora
