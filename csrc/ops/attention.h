// Attention, causal or in both directions, tile by tile (Vaswani et al. 2017). Groups of query heads share
// keys and values (Ainslie et al. 2023). Each thread holds only one tile of the score matrix in memory at a
// time (Dao et al. 2022; Dao 2023). Rows are tokens: a row of q is (heads, head_dim), and a row of k or v is
// (kv_heads, head_dim). Query head h uses key-value head h / (heads / kv_heads).
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/matrix.h"

namespace nplora {

struct AttentionShape {
  size_t heads, kv_heads, head_dim;
  float scale;         // the factor for all scores; usually 1 / sqrt(head_dim)
  size_t window;       // a token attends to itself and `window` - 1 tokens before it; 0 means no limit
  bool pairs = false;  // whether matrix products of tiles use bfloat16, with sums in float32
  // If `causal` is false, a token also attends to later tokens of its sequence: to the next `window` - 1
  // tokens if there is a window, otherwise to all of them.
  bool causal = true;
  // `bias` (heads, 2 reach + 1) holds numbers that are added to the scores (Shaw et al. 2018). The number for
  // a score depends on the head and on the distance, which is the position of the key minus the position of
  // the query. Column j of `bias` is for the distance j - reach. A sequence must have at most `reach` + 1
  // tokens, so that every distance has a column. If `bias` is null, nothing is added.
  const float* bias = nullptr;
  size_t reach = 0;

  size_t group() const { return heads / kv_heads; }
  // The biases of one head for a query at position `query`. Element j is the bias for the key at position j.
  const float* bias_of(size_t head, size_t query) const {
    return bias + head * (2 * reach + 1) + reach - query;
  }
};

// Sequence i consists of the rows starts[i] to starts[i + 1] - 1.
struct Sequences {
  const int64_t* starts;
  size_t count;
};

// Computes out = softmax(scale q kᵀ) v within each sequence. Also computes the log-sum-exp of the scores, lse
// (n, heads) = log Σ exp(scores), which the backward pass needs. If lse.data is null, lse is not computed. A
// score is a sum of head_dim products. An output is a sum of products, with one product for each key. All
// sums are in float32. For a sum of m products, the error is below gamma(m) = m u / (1 - m u) times the sum
// of the magnitudes of the products, where u is the unit roundoff. If the products are computed in pairs,
// their operands are first rounded to bfloat16, and the error of this rounding is added. Inf or NaN in a row
// may spread to all rows of the same sequence, but not to other sequences.
void attention(const AttentionShape& shape, Sequences sequences, Matrix<const float> q, Matrix<const float> k,
               Matrix<const float> v, Matrix<float> out, Matrix<float> lse);

// The inputs and the outputs of `attention`, which the backward pass reads.
struct AttentionSaved {
  Matrix<const float> q, k, v, out, lse;
};
// Computes dq, dk and dv from dout, the gradient of `out`.
void attention_backward(const AttentionShape& shape, Sequences sequences, Matrix<const float> dout,
                        const AttentionSaved& saved, Matrix<float> dq, Matrix<float> dk, Matrix<float> dv);

// The number of tokens in a page must be a multiple of kPageUnit, unless each sequence has only one page.
inline constexpr size_t kPageUnit = 16;

// The keys and values of earlier tokens. The arrays `keys` and `values` are (pages, page_tokens, kv_heads *
// head_dim). A slot holds one sequence. The tokens of slot s are in the pages table[s * slot_pages], table[s
// * slot_pages + 1], and so on. Two slots may share pages.
struct KeyValueCache {
  const float *keys, *values;
  size_t page_tokens;
  const int64_t* table;  // (slots, slot_pages)
  size_t slot_pages;
};
// Row i of q is the query of the token at position lengths[i] - 1 in slot slots[i] of the cache. The query
// attends to this token and to all earlier tokens. With a window, it attends only to this token and to the
// `window` - 1 tokens before this token. The size of the pages does not change the bits of `out`. Other rows
// of q can change the bits of a row of `out` only through the length of the run that contains the row. A run
// consists of neighbouring rows with successive tokens of one slot. The attention of a run of fewer than
// kFewestLanes / (heads / kv_heads) rows is computed by another method, which rounds differently (see
// kFewestLanes in attention.cpp).
void attention_cached(const AttentionShape& shape, Matrix<const float> q, KeyValueCache cache,
                      const int64_t* slots, const int64_t* lengths, Matrix<float> out);

}  // namespace nplora
