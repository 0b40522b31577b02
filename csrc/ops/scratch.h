// Temporary memory for a thread while it works on a task.
#pragma once

#include <cstddef>
#include <memory>

#include "base/aligned_buffer.h"

namespace nplora {

// The use of a scratch buffer. A thread has one buffer for each use. The contents of a buffer are valid only
// until the call that wrote them ends. The comments give the largest size of each buffer. A size without a
// unit is a number of elements. L is the number of SIMD lanes (at most 32), and r is the sum of the ranks of
// a stack.
enum class Scratch {
  // Holds x of a token block: transposed into lanes, converted to pairs of bfloat16 values, or converted to
  // int8. The largest size is kLanesBytes bytes or 64 d_in elements (64 tokens), whichever is larger. In the
  // backward pass, this buffer holds dy, z and dz in pairs, dy in int8, and the factors A and B. For
  // attention in bfloat16, this buffer holds the keys and values of a batch in pairs. For
  // filtered_cross_entropy, this buffer holds one weight for each word that is not skipped: in each row, at
  // most a quarter of all words, plus the target.
  kLanes,
  // Holds z of a token block in lanes or pairs, with r elements for each token. If outputs are in the lanes,
  // this buffer also holds the factors of a stack, with r (d_in + d_out) elements. In a merge, this buffer
  // holds B in panels.
  kLowLanes,
  // Holds z or dz of a token block, with r elements for each token. The buffer also holds A in the forward
  // pass, and the sums of the gradients of A and B in the backward pass. The sums have r (d_in + d_out)
  // elements.
  kLowGradients,
  // For a single token, holds L / 2 partial sums for each of kStreamedRows rows of W. For a batch of up to 8
  // tokens, holds L / 2 partial sums for each pair of a token and a row (48 rows of W, or r rows of B).
  kSums,
  // Holds decoded or transposed blocks of W. The blocks take kBlocksBytes bytes; in a small batch, they take
  // 48 * kStreamedRows elements.
  kWeight,
  // Holds a block of W before the block is transposed, or a block to which the update A·B is added. The
  // buffer has 48 * kDepthBlock elements.
  kDecoded,
  kFewRows,  // a few rows of a block of W, before they are converted to pairs: 18 KB
  // Holds one of three things. (1) B (r, d_in), r * d_in elements, plain or in pairs. (2) The transpose of z
  // or dz of a few tokens, 32 * r elements. (3) Rows of A times the scale, kDepthBlock * r elements.
  kFactor,
  kDropped,       // rows of x after dropout: 32 d_in elements
  kDroppedLanes,  // rows of x after dropout, put into lanes or into pairs: 32 d_in elements
  // Holds rows of x that will be transposed into lanes (48 L or 8 d_in elements), or rows of x in pairs (16
  // d_in elements). For attention in pairs, this buffer holds a tile: 96 (head_dim + 24) elements. For
  // activations of bfloat16 values, it holds 2,048 floats.
  kPairing,
  kAligned,     // a small batch of x, whose rows begin at cache lines: 8 (d_in + 16) elements
  kCodes,       // a small batch of x in int8: 8 d_in elements
  kCodeScales,  // the scales and sums of the codes in kCodes: d_in elements
  // Holds a tile of attention, with 48 * (5 head_dim + 130) elements, or the scores of a single query, with
  // heads * (256 + head_dim) elements.
  kAttention,
  // If the keys of a single query are cut into pieces, this buffer holds the results of each piece, with
  // heads * (head_dim + 2) elements for each piece. In the backward pass of attention, this buffer holds one
  // element for each head and token of the batch.
  kAttentionParts,
  kCount
};

// Returns memory of this thread for one use, with undefined contents. The buffer is not freed after the task
// and never shrinks, so a repeated call with the same shapes allocates nothing.
void* scratch_bytes(Scratch use, size_t bytes);

// While a ScratchFrame exists, this thread uses a separate set of scratch buffers. A signal handler that
// calls the library needs a frame, because the signal may interrupt a task that is using the thread's own
// buffers.
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

// Hands out parts of a buffer. If `data` is null, `take` only adds up the requested sizes, and returns null
// pointers.
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

// Calls divide(t, e) twice, with an arena of type T and an arena of type E. In the first call, the arenas
// only add up the sizes that `divide` takes. In the second call, the arenas hand out parts of two scratch
// buffers of these sizes.
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
