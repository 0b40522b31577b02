#include "ops/scratch.h"

#include "base/aligned_buffer.h"

namespace nplora {

void* scratch_bytes(Scratch use, size_t bytes) {
  static thread_local AlignedBuffer buffers[static_cast<size_t>(Scratch::kCount)];
  AlignedBuffer& buffer = buffers[static_cast<size_t>(use)];
  if (buffer.size() < bytes) {
    buffer = AlignedBuffer();  // free first: the two need not live together
    buffer = AlignedBuffer(bytes);
  }
  return buffer.as<void>();
}

}  // namespace nplora
