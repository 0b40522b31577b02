// Temporary memory for a thread while it works on a task.
#pragma once

#include <cstddef>
#include <memory>

#include "base/aligned_buffer.h"

namespace nplora {

// The use of a buffer. Buffers of different uses exist at the same time; no buffer outlives its call. The
// comments give the largest size of each buffer, in elements: L is the number of lanes (at most 32), r the
// sum of a stack's ranks.
enum class Scratch {
  // x of a token block in lanes or pairs: kLanesBytes, or 64 d_in. In backward: dy, z and dz in pairs, and
  // the factors.
  kLanes,
  // z of a token block in lanes or pairs: r for each token. A stack's factors: r (d_in + d_out). B in panels.
  kLowLanes,
  // z or dz of a token block: r for each token. A, or the sums of both gradients: r (d_in + d_out).
  kLowGradients,
  kSums,     // partial sums of outputs: L / 2 for each of kStreamedRows rows, or of r ranks
  kWeight,   // decoded or transposed blocks of W: kBlocksBytes, or 48 kStreamedRows
  kDecoded,  // a block of W before it is transposed, or with an update added: 48 kDepthBlock
  kFewRows,  // a few rows of a block before they are paired: 18 KB
  // B in pairs, or before pairing: r d_in. z or dz of a few tokens transposed: 32 r. Scaled rows of A:
  // kDepthBlock r.
  kFactor,
  kDropped,       // rows of x after dropout: 32 d_in
  kDroppedLanes,  // rows of x after dropout, in lanes or pairs: 32 d_in
  kPairing,       // rows of x before they are put into lanes: 48 L, or 8 d_in
  kCodes,         // a small batch of x in int8: 8 d_in
  kCodeScales,    // the scales and sums of its sub-blocks: 32 d_in / 32
  // A tile of attention: 48 (5 head_dim + 130). Scores of single queries: heads (256 + head_dim).
  kAttention,
  // Each piece of a single query's keys: heads (head_dim + 2). In backward: heads for each token of the
  // batch.
  kAttentionParts,
  kCount
};

// n elements of this thread's memory for one use, with undefined contents. The buffer is kept for the next
// task and only grows, so nothing is allocated after the first call of a shape.
void* scratch_bytes(Scratch use, size_t bytes);

// While a frame exists, this thread uses other buffers. It is for calls that a signal handler makes in the
// middle of a task.
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

// Hands out parts of a buffer. Without a buffer, it returns null pointers and only counts the size.
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

// Calls divide(arena of T, arena of E) twice: once to count, then to take the parts from two buffers of that
// size.
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
