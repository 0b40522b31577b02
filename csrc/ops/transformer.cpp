#include "ops/transformer.h"

#include <algorithm>

#include "base/parallel.h"
#include "base/profile.h"
#include "base/range.h"
#include "kernels/kernel_table.h"
#include "ops/scratch.h"

namespace nplora {

namespace {

const kernels::Transformer& kernel() {
  return kernels::table().transformer;
}

constexpr size_t kElementsPerTask = 16384;
// The number of elements that are converted at a time. Four float arrays of this length take 16 KB, half of
// an L1 of 32 KB.
constexpr size_t kConvertedElements = 1024;

// The costs of a norm, of a rotation and of an activation for one element, in floating-point operations.
constexpr double kNormOperations = 12, kRotationOperations = 8, kSigmoidOperations = 20;

// Calls body(row) for n rows of `cols` elements each.
template <class Body>
void for_rows(size_t n, size_t cols, double operations_per_element, const Body& body) {
  const size_t rows = std::max<size_t>(1, kElementsPerTask / std::max<size_t>(1, cols));
  parallel_for(ceil_div(n, rows), useful_threads(operations_per_element * double(n) * double(cols)),
               Interruptible::kYes, [&](size_t task) {
                 const Range block = nth_block(n, rows, task);
                 for (size_t i = block.first; i < block.first + block.count; ++i) body(i);
               });
}

// Cuts n elements into pieces of kElementsPerTask elements, and calls body(first, count) for each piece.
template <class Body>
void for_pieces(size_t n, double operations_per_element, const Body& body) {
  parallel_for(ceil_div(n, kElementsPerTask), useful_threads(operations_per_element * double(n)),
               Interruptible::kYes, [&](size_t task) {
                 const Range piece = nth_block(n, kElementsPerTask, task);
                 body(piece.first, piece.count);
               });
}

}  // namespace

void rms_norm(Matrix<const float> x, const float* weight, float eps, Matrix<float> y) {
  const Timed timed(Activity::kNorm);
  for_rows(x.rows, x.cols, kNormOperations,
           [&](size_t i) { kernel().rms_norm(x.cols, x.row(i), weight, eps, y.row(i)); });
}

void rms_norm_backward(Matrix<const float> dy, Matrix<const float> x, const float* weight, float eps,
                       Matrix<float> dx, bool accumulate) {
  const Timed timed(Activity::kNorm);
  for_rows(x.rows, x.cols, 2 * kNormOperations, [&](size_t i) {
    kernel().rms_norm_backward(x.cols, dy.row(i), x.row(i), weight, eps, dx.row(i), accumulate);
  });
}

void layer_norm(Matrix<const float> x, const float* weight, const float* bias, float eps, Matrix<float> y) {
  const Timed timed(Activity::kNorm);
  for_rows(x.rows, x.cols, kNormOperations,
           [&](size_t i) { kernel().layer_norm(x.cols, x.row(i), weight, bias, eps, y.row(i)); });
}

void add_layer_norm(Matrix<const float> x, Matrix<float> sum, const float* weight, const float* bias,
                    float eps, Matrix<float> y) {
  const Timed timed(Activity::kNorm);
  for_rows(x.rows, x.cols, kNormOperations, [&](size_t i) {
    kernel().scaled(x.cols, 1, x.row(i), sum.row(i), true);
    kernel().layer_norm(x.cols, sum.row(i), weight, bias, eps, y.row(i));
  });
}

void layer_norm_backward(Matrix<const float> dy, Matrix<const float> x, const float* weight, float eps,
                         Matrix<float> dx, bool accumulate) {
  const Timed timed(Activity::kNorm);
  for_rows(x.rows, x.cols, 2 * kNormOperations, [&](size_t i) {
    kernel().layer_norm_backward(x.cols, dy.row(i), x.row(i), weight, eps, dx.row(i), accumulate);
  });
}

void rope(Matrix<float> x, size_t head_dim, const int64_t* positions, RotaryTable table, bool inverse) {
  const Timed timed(Activity::kRope);
  const size_t heads = x.cols / head_dim, half = table.rotary_dim / 2;
  for_rows(x.rows, x.cols, kRotationOperations, [&](size_t i) {
    const float* angles = table.data + size_t(positions[i]) * table.rotary_dim;
    kernel().rotate(heads, head_dim, half, angles, table.interleaved, inverse, x.row(i));
  });
}

void gated(Activation act, size_t n, const float* gate, const float* up, float* out) {
  const Timed timed(Activity::kActivation);
  const auto kernel_of_act = kernel().gated[size_t(act)];
  for_pieces(n, kSigmoidOperations, [&](size_t first, size_t count) {
    kernel_of_act(count, gate + first, up ? up + first : nullptr, out + first);
  });
}

void gated_backward(Activation act, size_t n, const float* dout, const float* gate, const float* up,
                    float* dgate, float* dup) {
  const Timed timed(Activity::kActivation);
  const auto kernel_of_act = kernel().gated_backward[size_t(act)];
  for_pieces(n, kSigmoidOperations, [&](size_t first, size_t count) {
    kernel_of_act(count, dout + first, gate + first, up ? up + first : nullptr, dgate + first,
                  dup ? dup + first : nullptr);
  });
}

namespace {

// Copies of `count` elements of `gate` and `up`, converted from bfloat16 to float. `count` is at most
// kConvertedElements. If `up_bits` is null, `up` is null.
struct Widened {
  Widened(size_t count, const uint16_t* gate_bits, const uint16_t* up_bits)
      : gate(scratch<float>(Scratch::kPairing, 2 * kConvertedElements)),
        up(up_bits ? gate + kConvertedElements : nullptr) {
    const auto widen = kernels::table().convert.widen_bfloat16;
    widen(count, gate_bits, gate);
    if (up) widen(count, up_bits, up);
  }

  float *gate, *up;
};

// Cuts n elements into pieces of at most kConvertedElements elements, and calls body(first, count) for each
// piece.
template <class Body>
void for_converted(size_t n, const Body& body) {
  for_pieces(n, kSigmoidOperations, [&](size_t first, size_t count) {
    for (size_t i = 0; i < count; i += kConvertedElements)
      body(first + i, std::min(kConvertedElements, count - i));
  });
}

}  // namespace

void gated(Activation act, size_t n, const uint16_t* gate, const uint16_t* up, float* out) {
  const Timed timed(Activity::kActivation);
  const auto kernel_of_act = kernel().gated[size_t(act)];
  for_converted(n, [&](size_t first, size_t count) {
    const Widened values(count, gate + first, up ? up + first : nullptr);
    kernel_of_act(count, values.gate, values.up, out + first);
  });
}

void gated_backward(Activation act, size_t n, const float* dout, const uint16_t* gate, const uint16_t* up,
                    float* dgate, float* dup) {
  const Timed timed(Activity::kActivation);
  const auto kernel_of_act = kernel().gated_backward[size_t(act)];
  for_converted(n, [&](size_t first, size_t count) {
    const Widened values(count, gate + first, up ? up + first : nullptr);
    kernel_of_act(count, dout + first, values.gate, values.up, dgate + first, dup ? dup + first : nullptr);
  });
}

void gated_narrow(Activation act, size_t n, const float* gate, const float* up, float* out,
                  uint16_t* gate_bits, uint16_t* up_bits) {
  const Timed timed(Activity::kActivation);
  const auto kernel_of_act = kernel().gated[size_t(act)];
  const auto narrow = kernels::table().convert.narrow_bfloat16;
  for_converted(n, [&](size_t first, size_t count) {
    narrow(count, gate + first, gate_bits + first);  // before `out` is written: it may be the array `gate`
    if (up) narrow(count, up + first, up_bits + first);
    kernel_of_act(count, gate + first, up ? up + first : nullptr, out + first);
  });
}

}  // namespace nplora
