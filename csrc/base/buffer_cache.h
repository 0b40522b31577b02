// Large buffers that are reused: the next training step takes the buffers that this step gives back.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#include "base/aligned_buffer.h"

namespace nplora {

// Used and idle buffers together take at most kSpareBytes more memory than the peak of the used buffers
// alone, and at most twice this peak. Without spare memory, a pass that needs a few buffers of different
// sizes one after the other, such as reading a prompt, would free and map nearly all of them in each layer.
// With `keep_more`, the spare memory is at least an eighth of the peak.
class BufferCache {
 public:
  static constexpr size_t kSpareBytes = size_t{4} << 20;

  // Returns a buffer of at least this many bytes, with undefined contents. Reuses an idle buffer that is not
  // much larger; if there is none, allocates a new buffer.
  AlignedBuffer take(size_t bytes);
  void give_back(AlignedBuffer buffer) noexcept;

  // Keeps more idle buffers until each call with `true` is followed by one with `false`. This is for batches
  // of changing sizes. They would otherwise return most of their memory to the system in each step, and get it
  // back as new pages.
  void keep_more(bool on);

  // Returns the idle buffers to the system.
  void release() noexcept;

 private:
  void make_room(size_t bytes);

  std::mutex mutex_;
  std::multimap<size_t, AlignedBuffer> idle_;  // by size
  size_t used_bytes_ = 0, idle_bytes_ = 0, most_used_ = 0;
  int keepers_ = 0;  // calls of keep_more(true) that wait for their keep_more(false)
};

// The buffer cache of this process. The cache is never destroyed, because arrays may give their buffers back
// while the process ends.
BufferCache& buffer_cache();

}  // namespace nplora
