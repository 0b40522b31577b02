#include "ops/scratch.h"

#include <utility>

namespace nplora {

namespace {

constexpr size_t kUses = static_cast<size_t>(Scratch::kCount);

thread_local AlignedBuffer own[kUses];
thread_local AlignedBuffer* current = nullptr;  // the buffers of the innermost ScratchFrame, or null

}  // namespace

void* scratch_bytes(Scratch use, size_t bytes) {
  AlignedBuffer& buffer = (current ? current : own)[static_cast<size_t>(use)];
  if (buffer.size() < bytes) {
    buffer = AlignedBuffer();  // the old buffer is freed first, so that both buffers never exist together
    buffer = AlignedBuffer(bytes);
  }
  return buffer.as<void>();
}

ScratchFrame::ScratchFrame()
    : buffers_(std::make_unique<AlignedBuffer[]>(kUses)), outer_(std::exchange(current, buffers_.get())) {}

ScratchFrame::~ScratchFrame() {
  current = outer_;
}

}  // namespace nplora
