// Causal attention of queries in groups that share keys and values (Vaswani et al. 2017; Ainslie et al. 2023), tile by tile: of the
// scores, no more than a tile is ever kept (Dao et al. 2022; Dao 2023). Rows are tokens; a row of q is (heads, head_dim), of k and
// v (kv_heads, head_dim). Query head h reads the keys and values of head h / (heads / kv_heads).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"

namespace nplora {

struct AttentionShape {
  size_t heads, kv_heads, head_dim;
  float scale;    // of the scores, usually 1 / sqrt(head_dim)
  size_t window;  // a token sees itself and the window - 1 before it; 0: all before it

  size_t group() const { return heads / kv_heads; }
};

// Sequence i is rows starts[i] ... starts[i + 1] - 1.
struct Sequences {
  const int64_t* starts;
  size_t count;
};

// out = softmax(scale q kᵀ) v within each sequence, lse (n, heads) = log Σ exp(scores), which backward needs.
// Scores and outputs sum head_dim and as many products as there are keys in order, in float32: errors are below gamma of these
// numbers times the sums of magnitudes. Inf or NaN in a row may reach all rows of its sequence, and no other.
void attention(const AttentionShape& shape, Sequences sequences, Matrix<const float> q, Matrix<const float> k,
               Matrix<const float> v, Matrix<float> out, Matrix<float> lse);

struct AttentionSaved {
  Matrix<const float> q, k, v, out, lse;
};
void attention_backward(const AttentionShape& shape, Sequences sequences, Matrix<const float> dout,
                        const AttentionSaved& saved, Matrix<float> dq, Matrix<float> dk, Matrix<float> dv);

// Keys and values that were computed before, each (slots, capacity, kv_heads * head_dim).
struct KeyValueCache {
  const float *keys, *values;
  size_t capacity;
};
// Row i of q sees the first lengths[i] tokens of slots[i], of which it is the last.
void attention_cached(const AttentionShape& shape, Matrix<const float> q, KeyValueCache cache,
                      const int64_t* slots, const int64_t* lengths, Matrix<float> out);

}  // namespace nplora
