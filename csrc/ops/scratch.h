// Memory that a thread needs while it works on a task.
#pragma once

#include <cstddef>
#include <memory>

#include "base/aligned_buffer.h"

namespace nplora {

// What a buffer is for. Buffers of different uses are live at the same time; none outlives its call. The most that each
// takes, in elements, with L lanes (at most 32) and r the sum of a stack's ranks:
enum class Scratch {
  // x of a token block in lanes or pairs: kLanesBytes, or 64 d_in; backward, dy, z and dz in pairs, and factors
  kLanes,
  kLowLanes,  // z of a token block in lanes or pairs: r for each token; a stack's factors: r (d_in + d_out); B in panels
  kLowGradients,  // z or dz of a token block: r for each token; and A, or the sums of both gradients: r (d_in + d_out)
  kSums,     // outputs before they are written: L / 2 for each of kStreamedRows, or of r
  kWeight,   // decoded or transposed blocks of W: kBlocksBytes, or 48 kStreamedRows
  kDecoded,  // a block of W before it is transposed, or with an update added: 48 kDepthBlock
  kFewRows,  // a few of its rows before they are in pairs: 18 KB
  // B in pairs, or before it is: r d_in; z or dz of a few tokens transposed: 32 r; scaled rows of A: kDepthBlock r
  kFactor,
  kDropped,       // rows of x after dropout: 32 d_in
  kDroppedLanes,  // and those in lanes or pairs: 32 d_in
  kPairing,       // rows of x before they are in lanes: 48 L, or 8 d_in
  kCodes,         // a small batch of x in int8: 8 d_in
  kCodeScales,    // and the scales and sums of its sub-blocks: 32 d_in / 32
  kAttention,  // a tile of attention: 48 (5 head_dim + 130); or scores of single queries: heads (256 + head_dim)
  kAttentionParts,  // heads (head_dim + 2) for each piece of keys that a query meets; or heads for each token of the batch
  kCount
};

// n elements of this thread's memory for one use, with undefined contents. It is kept for the next task and only grows:
// nothing is allocated after the first call of a shape.
void* scratch_bytes(Scratch use, size_t bytes);

// While one lives, this thread has other buffers: for calls from inside a task, as a signal handler makes them.
class ScratchFrame {
 public:
  ScratchFrame();
  ~ScratchFrame();
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;

 private:
  std::unique_ptr<AlignedBuffer[]> buffers_;
  AlignedBuffer* outer_;
};

template <class T>
T* scratch(Scratch use, size_t n) {
  return static_cast<T*>(scratch_bytes(use, n * sizeof(T)));
}

// A buffer that is given out part by part; without one, the parts are null, and only counted.
template <class T>
struct Arena {
  T* data = nullptr;
  size_t used = 0;

  T* take(size_t count) {
    T* taken = data ? data + used : nullptr;
    used += count;
    return taken;
  }
};

// divide(arena of T, arena of E) runs twice: to count, and then to take parts of two buffers of that size.
template <class T, class E, class Divide>
void divide_scratch(Scratch use_t, Scratch use_e, const Divide& divide) {
  Arena<T> t;
  Arena<E> e;
  divide(t, e);
  t = {scratch<T>(use_t, t.used)};
  e = {scratch<E>(use_e, e.used)};
  divide(t, e);
}

}  // namespace nplora
