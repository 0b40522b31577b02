#include <cstdint>
#include <cstdio>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/low_rank.h"
#include "bindings/named_tuple.h"
#include "ops/kernel_plan.h"
#include "ops/lora.h"
#include "ops/merge.h"

namespace nplora::bindings {

namespace {

template <class T>
void matmul(const WeightArgument<T>& weight, const Array<T>& x, const std::optional<Array<T>>& bias,
            Array<T> out, bool int8) {
  const WeightView w = view<T>(weight);
  const Matrix<const T> from = read(x);
  require_shape("x", x, from.rows, w.d_in);
  require_shape("out", out, from.rows, w.d_out);
  const ForwardPart<T> part{w, {}, bias_data(w, bias), write(out), {}};
  without_gil([&] { lora_forward<T>({&part, 1}, from, int8); });
}

template <class T>
void matmul_t(const WeightArgument<T>& weight, const Array<T>& dy, Array<T> out, bool int8) {
  const WeightView w = view<T>(weight);
  const Matrix<const T> from = read(dy);
  require_shape("dy", dy, from.rows, w.d_out);
  require_shape("out", out, from.rows, w.d_in);
  const Matrix<T> to = write(out);
  const BackwardPart<T> part{w, {}, from, {}, {}, {}};
  without_gil([&] { lora_backward<T>({&part, 1}, {}, to, int8); });
}

template <class T>
using Maybe = std::optional<Array<T>>;

// The arguments that Python passes for one layer. Python passes a list of layers that have the same input x
// (a stack of layers).
template <class T>
struct ForwardFields {
  static constexpr const char* kType = "ForwardPart";
  static constexpr const char* kNames[] = {"weight", "a", "b", "scale", "dropout", "key", "bias", "y", "z"};
  using Types = std::tuple<WeightArgument<T>, Array<T>, Array<T>, double, double, uint64_t, Maybe<T>,
                           Array<T>, Maybe<T>>;
};
template <class T>
struct BackwardFields {
  static constexpr const char* kType = "BackwardPart";
  static constexpr const char* kNames[] = {"weight", "a",  "b", "scale", "dropout",
                                           "key",    "dy", "z", "da",    "db"};
  using Types = std::tuple<WeightArgument<T>, Array<T>, Array<T>, double, double, uint64_t, Array<T>,
                           Maybe<T>, Maybe<T>, Maybe<T>>;
};

template <class T>
void forward(const Array<T>& x, const py::list& layers, std::optional<size_t> batch, bool int8) {
  const Matrix<const T> from = read(x);
  auto all = all_fields<ForwardFields<T>>(layers);
  std::vector<ForwardPart<T>> parts;
  for (auto& [weight, a, b, scale, dropout, key, bias, y, z] : all) {
    const WeightView w = view<T>(weight);
    const LowRank<T> low = low_rank(w, a, b, scale, dropout, key);
    require_shape("x", x, from.rows, w.d_in);
    require_shape("y", y, from.rows, w.d_out);
    if (z) require_shape("z", *z, from.rows, low.a.cols);
    parts.push_back({w, low, bias_data(w, bias), write(y), write(z)});
    require(w.compute == parts[0].w.compute, "the weights of a stack must have the same compute type");
  }
  without_gil([&] { batch ? lora_infer<T>(parts, from, *batch) : lora_forward<T>(parts, from, int8); });
}

template <class T>
void backward(const Maybe<T>& x, Maybe<T> dx, const py::list& layers, bool int8,
              std::optional<uint64_t> dither_key) {
  // pybind11 chooses between float and double by the dtype of x or dx. If x and dx are both None, the dtype
  // of dy decides.
  if constexpr (std::is_same_v<T, float>)
    if (!x && !dx && !layers.empty() &&
        py::isinstance<Array<double>>(py::getattr(layers[0], "dy", py::none())))
      return backward<double>({}, {}, layers, int8, dither_key);
  auto all = all_fields<BackwardFields<T>>(layers);
  std::vector<BackwardPart<T>> parts;
  const Matrix<const T> from = x ? read(*x) : Matrix<const T>{};
  const Matrix<T> to = write(dx);
  for (auto& [weight, a, b, scale, dropout, key, dy, z, da, db] : all) {
    const WeightView w = view<T>(weight);
    const LowRank<T> low = low_rank(w, a, b, scale, dropout, key);
    const Matrix<const T> gradient = read(dy);
    require_shape("dy", dy, gradient.rows, w.d_out);
    require(z || !da, "z is needed for the gradient of a");
    if (z) require_shape("z", *z, gradient.rows, low.a.cols);
    require(x || !db, "x is needed for the gradient of b");
    if (x) require_shape("x", *x, gradient.rows, w.d_in);
    if (dx) require_shape("dx", *dx, gradient.rows, w.d_in);
    if (da) require_shape("da", *da, w.d_out, low.a.cols);
    if (db) require_shape("db", *db, low.b.rows, w.d_in);
    parts.push_back({w, low, gradient, z ? read(*z) : Matrix<const T>{}, write(da), write(db)});
    require(gradient.rows == parts[0].dy.rows, "the gradients of a stack must have the same number of rows");
    require(w.compute == parts[0].w.compute, "the weights of a stack must have the same compute type");
  }
  without_gil([&] { lora_backward<T>(parts, from, to, int8, dither_key); });
}

template <class T>
void outer(const Array<T>& a, const Array<T>& b, double scale, Array<T> out) {
  const Matrix<const T> left = read(a), right = read(b);
  require(left.rows == right.rows, "a and b must have the same number of rows");
  require_shape("out", out, left.cols, right.cols);
  const Matrix<T> to = write(out);
  without_gil([&] { add_outer(left, right, scale, to); });
}

// Returns a view of an array, through which `merge` writes to the array in place. Each row of the array must
// be contiguous; there may be gaps between rows.
template <class T>
Matrix<T> rows_of(py::array_t<T>& array) {
  require(array.ndim() == 2, "w must have 2 axes");
  const py::ssize_t rows = array.shape(0), cols = array.shape(1), size = sizeof(T);
  require_aligned(array);
  if (array.size() == 0) return {array.mutable_data(), size_t(rows), size_t(cols), size_t(cols)};
  require(cols <= 1 || array.strides(1) == size, "the rows of w must be contiguous");
  const py::ssize_t stride = rows <= 1 ? cols * size : array.strides(0);
  require(stride >= cols * size && stride % size == 0,
          "the rows of w must follow each other without overlap");
  return {array.mutable_data(), size_t(rows), size_t(cols), size_t(stride / size)};
}

// Adds scale * A B to w in place. The elements of w have type T, and the elements of the factors A and B have
// type F. For the two 16-bit storage formats, T is uint16_t (bit patterns) and F is float.
template <class T, class F>
void merge(py::array_t<T> w, const Array<F>& a, const Array<F>& b, double scale, const std::string& name,
           std::optional<uint64_t> key) {
  const Storage storage = storage_of(name);
  require(!is_blocks(storage) && bytes_per_element(storage) == sizeof(T), "w is not an array of " + name);
  require(!key || sizeof(T) == 2, "stochastic rounding needs a 16-bit storage");
  const Matrix<T> to = rows_of(w);
  const Matrix<const F> left = read(a), right = read(b);
  require_shape("a", a, to.rows, right.rows);
  require_shape("b", b, left.cols, to.cols);
  without_gil([&] {
    if constexpr (sizeof(T) == 2)
      merge_lora(to, storage, left, right, scale, key);
    else
      merge_lora(to, left, right, scale);
  });
}

std::string operations(double count) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g", count);
  return text;
}

std::string in_words(const KernelPlan& plan) {
  if (plan.update == Update::kNone) return "no update";
  const std::string separate = operations(plan.cost.separate), merged = operations(plan.cost.merged);
  if (plan.update == Update::kMergedOnTheFly)
    return "the update is merged into W on the fly (" + merged + " operations, " + separate + " if separate)";
  return "the update is separate (" + separate + " operations, " + merged + " if merged into W on the fly)";
}

std::string in_words(const LayerArithmetic& arithmetic, bool small) {
  std::string text = kArithmeticNames[size_t(arithmetic.product)];
  const bool int8 = arithmetic.product == Arithmetic::kInt8;
  if (int8) text += ", summed in integers and float32";
  if (int8 && small) text += ", with W in its own blocks";
  if (int8) return text + "; the update in " + kArithmeticNames[size_t(arithmetic.update)];
  return arithmetic.product == Arithmetic::kBfloat16 ? text + ", summed in float32" : text;
}

// Describes in words the arithmetic and the KernelPlans of the forward and backward passes.
py::dict explain(const PackedWeight& weight, size_t rows, size_t rank, bool dropout, bool keep_z, bool int8) {
  require(rows >= 1 && rows <= PTRDIFF_MAX, "explain: rows is " + std::to_string(rows) +
                                                ", expected at least 1 and no more than an array can have");
  const WeightView w = weight.view();
  const bool small = rows <= kernels::kSmallBatch;
  const LayerArithmetic forward = forward_arithmetic(w, rows, int8 && keep_z),
                        backward = backward_arithmetic(w, rows, int8);
  const auto shape_of = [&](Arithmetic update) {
    const size_t bytes = update == Arithmetic::kFloat64 ? 8 : update == Arithmetic::kBfloat16 ? 2 : 4;
    return LayerShape{rows, w.d_out, w.d_in, rank, bytes, dropout, is_blocks(w.storage)};
  };
  const LayerShape shape = shape_of(forward.update);
  const char* paths[] = {"few rows: W is read once in place, and each row is summed alone",
                         "tokens in the lanes: x and y are transposed",
                         "outputs in the lanes: blocks of W are transposed"};
  const ForwardPath by_cost = forward_path(rows, w.d_out, w.d_in, shape.element_bytes, shape.decoded);
  const bool transposes = !small && forward.product == Arithmetic::kInt8;
  const auto path = static_cast<size_t>(transposes ? ForwardPath::kRows : by_cost);
  const std::string computes = in_words(forward, small), back = in_words(backward, false);
  py::dict plan;
  plan["computes in"] = computes;
  plan["forward"] = std::string(paths[path]) + "; " + in_words(plan_forward(shape, keep_z));
  plan["backward"] = (back == computes ? "" : "computes in " + back + "; ") + "inputs in the lanes: W is " +
                     (backward.product == Arithmetic::kInt8 ? "rounded to int8; " : "read in place; ") +
                     in_words(plan_backward(shape_of(backward.update)));
  return plan;
}

template <class T>
void register_products(py::module_& m) {
  using py::arg;
  m.def("matmul", &matmul<T>, arg("w").noconvert(), arg("x").noconvert(), arg("bias").noconvert().none(true),
        arg("out").noconvert(), arg("int8") = true, "out = x W^T [+ bias]");
  m.def("matmul_t", &matmul_t<T>, arg("w").noconvert(), arg("dy").noconvert(), arg("out").noconvert(),
        arg("int8") = true, "out = dy W");
  m.def("add_outer", &outer<T>, arg("a").noconvert(), arg("b").noconvert(), arg("scale"),
        arg("out").noconvert(), "out += scale a^T b");
  m.def("lora_forward", &forward<T>, arg("x").noconvert(), arg("layers").noconvert(),
        arg("batch") = py::none(), arg("int8") = true,
        "z = drop(x) B^T; y = x W^T + scale z A^T [+ bias] for layers that read the same x");
  m.def("lora_backward", &backward<T>, arg("x").noconvert().none(true), arg("dx").noconvert().none(true),
        arg("layers").noconvert(), arg("int8") = true, arg("dither_key") = py::none(),
        "dz = scale dy A; dx = sum of dy W + undrop(dz B); da += scale dy^T z; db += dz^T drop(x)");
}

template <class T, class F>
void register_merge(py::module_& m) {
  using py::arg;
  m.def("merge_lora", &merge<T, F>, arg("w").noconvert(), arg("a").noconvert(), arg("b").noconvert(),
        arg("scale"), arg("storage"), arg("key") = py::none(), "W += scale A B in place");
}

}  // namespace

void register_lora(py::module_& m) {
  using py::arg;
  m.def("explain", &explain, arg("weight"), arg("rows"), arg("rank"), arg("dropout"), arg("keep_z"),
        arg("int8") = true, "Describe in words how the forward and backward pass are computed");
  register_fields<ForwardFields<float>>(m);
  register_fields<BackwardFields<float>>(m);
  register_products<float>(m);
  register_products<double>(m);
  register_merge<float, float>(m);
  register_merge<double, double>(m);
  register_merge<uint16_t, float>(m);
}

}  // namespace nplora::bindings
