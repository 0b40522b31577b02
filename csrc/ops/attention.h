// Causal attention, tile by tile (Vaswani et al. 2017). Groups of query heads share keys and values (Ainslie
// et al. 2023). Only one tile of scores exists at a time (Dao et al. 2022; Dao 2023). Rows are tokens: a row
// of q is (heads, head_dim), a row of k or v is (kv_heads, head_dim). Query head h reads the keys and values
// of head h / (heads / kv_heads).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"

namespace nplora {

struct AttentionShape {
  size_t heads, kv_heads, head_dim;
  float scale;    // scores are multiplied by it, usually 1 / sqrt(head_dim)
  size_t window;  // a token sees itself and the window - 1 tokens before it; 0: all tokens before it

  size_t group() const { return heads / kv_heads; }
};

// Sequence i is rows starts[i] ... starts[i + 1] - 1.
struct Sequences {
  const int64_t* starts;
  size_t count;
};

// out = softmax(scale q kᵀ) v within each sequence, lse (n, heads) = log Σ exp(scores), which backward needs.
// Scores are sums of head_dim products, outputs are sums of as many products as there are keys. All sums run
// in order, in float32: errors are below gamma(number of products) times the sums of magnitudes. Inf or NaN
// in a row may reach all rows of its own sequence, but no other sequence.
void attention(const AttentionShape& shape, Sequences sequences, Matrix<const float> q, Matrix<const float> k,
               Matrix<const float> v, Matrix<float> out, Matrix<float> lse);

struct AttentionSaved {
  Matrix<const float> q, k, v, out, lse;
};
void attention_backward(const AttentionShape& shape, Sequences sequences, Matrix<const float> dout,
                        const AttentionSaved& saved, Matrix<float> dq, Matrix<float> dk, Matrix<float> dv);

// The keys and values of earlier tokens, each (slots, capacity, kv_heads * head_dim).
struct KeyValueCache {
  const float *keys, *values;
  size_t capacity;
};
// Row i of q is the last of the first lengths[i] tokens of slots[i], and sees all these tokens.
void attention_cached(const AttentionShape& shape, Matrix<const float> q, KeyValueCache cache,
                      const int64_t* slots, const int64_t* lengths, Matrix<float> out);

}  // namespace nplora
