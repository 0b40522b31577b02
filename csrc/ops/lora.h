// Products with a frozen weight and its low-rank update: the forward pass and the backward pass of one layer,
// or of a stack of layers (layers that read the same x). `add_outer` adds a product aᵀ b to a matrix, for the
// gradients of the factors.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora {

// The update scale * A B with A (d_out, r) and B (r, d_in). There is no update if r = 0. If `scale` is 0, `a`
// and `b` are not read.
template <class T>
struct LowRank {
  Matrix<const T> a, b;
  double scale = 0;
  double dropout = 0;  // the dropout probability of the x that is multiplied by B
  uint64_t key = 0;    // the key of the dropout mask
  // Copies of a and b in bfloat16, without gaps between the rows, or null. Small batches read the copies
  // instead of a and b, because the copies have half the size. The copies must be exact: if bfloat16 cannot
  // represent all values of a and b, the pointers must be null.
  const kernels::Bf16 *narrow_a = nullptr, *narrow_b = nullptr;

  size_t rank() const { return scale == 0 ? 0 : a.cols; }
};

// One group of rows in a small batch. The group consists of the `rows` rows of x that follow the rows of the
// previous group. All these rows have the same update.
template <class T>
struct GroupUpdate {
  size_t rows;
  LowRank<T> low;
};

// One layer of a forward pass: z = drop(x) Bᵀ, y = x Wᵀ + scale z Aᵀ [+ bias]. Here, drop(x) is x after
// dropout. The shapes are x (n, d_in), y (n, d_out) and z (n, r). `bias` may be null. If the caller does not
// need z, z.data may be null. In a small batch, `groups` may replace `low`: each group of rows of x then has
// its own update. The groups together have n rows. With groups, z is not stored. If `multiplied` is true, y
// already holds x Wᵀ, and the forward pass only adds the update and the bias to y. `multiplied` may be true
// only for a large batch, and only if the update is not merged on the fly.
template <class T>
struct ForwardPart {
  WeightView w;
  LowRank<T> low;
  const T* bias;
  Matrix<T> y, z;
  std::span<const GroupUpdate<T>> groups = {};
  bool multiplied = false;
};

// Computes the outputs of the layers `parts`, which all read the same x (n, d_in). `int8` matters only for a
// large batch and a weight with Compute::kInt8: if `int8` is true, the products with W are computed in int8;
// if `int8` is false, they are computed as for Compute::kBfloat16. Training may set `int8`, because products
// in int8 are faster. But these products round W a second time: the values of W, already rounded to the
// storage format, are rounded again to int8 codes with one scale for each row. Inference does not set `int8`,
// because this second rounding would make the answers of the model less accurate.
template <class T>
void lora_forward(std::span<const ForwardPart<T>> parts, Matrix<const T> x, bool int8);

// Does the same as lora_forward, but for inference: large batches are never computed in int8. `batch` is the
// number of rows of the whole batch. x may hold only a part of the batch. `batch` changes the method only in
// one way: the method for small batches is used if `batch` is at most kSmallBatch (see kInferenceTokens).
template <class T>
void lora_infer(std::span<const ForwardPart<T>> parts, Matrix<const T> x, size_t batch);

// One group of rows. The group consists of the `rows` rows of x that follow the rows of the previous group,
// and `parts` are the layers that compute the outputs of these rows.
template <class T>
struct GroupParts {
  size_t rows;
  std::vector<ForwardPart<T>> parts;
};

// Does the same as lora_infer for several groups of rows of x. Each group has its own layers. Usually, the
// groups share the weights and have different updates. For each i, the outputs of layer i for all rows of x
// are in one array. The `y` of layer i in a group is a view of this group's rows of the array.
template <class T>
void lora_forward_groups(std::span<const GroupParts<T>> groups, Matrix<const T> x);

// One layer of a backward pass: dz = scale dy A, da += scale dyᵀ z, db += dzᵀ drop(x). The data of da or db
// is null if that gradient is not needed.
template <class T>
struct BackwardPart {
  WeightView w;
  LowRank<T> low;
  Matrix<const T> dy, z;
  Matrix<T> da, db;
};

// Computes the gradients of all layers, and dx = the sum of dy W + undrop(dz B) over all layers, where
// `undrop` is the backward pass of `drop`. If dx is not needed, its data is null. If `int8` is false, the
// products with a weight of Compute::kInt8 are computed as for Compute::kBfloat16. If `dither_key` is given,
// dy is rounded stochastically for int8 products. The random bits for an element of dy depend on the key and
// on the position of the element. If dy is the gradient of logits, `int8` must be false or `dither_key` must
// be given. Each row of this gradient has one large element and many small elements. In int8, rounding to
// nearest would turn all small elements into 0.
template <class T>
void lora_backward(std::span<const BackwardPart<T>> parts, Matrix<const T> x, Matrix<T> dx, bool int8,
                   std::optional<uint64_t> dither_key = {});

// Adds a scaled product: out (p, q) += scale aᵀ b, where a is (n, p) and b is (n, q).
template <class T>
void add_outer(Matrix<const T> a, Matrix<const T> b, double scale, Matrix<T> out);

}  // namespace nplora
