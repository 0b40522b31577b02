#include "bindings/arrays.h"
#include "ops/lora.h"
#include "ops/merge.h"

namespace nplora::bindings {

namespace {

template <class T>
LowRank<T> low_rank(const WeightView& w, const Array<T>& a, const Array<T>& b, double scale, double dropout,
                    uint64_t key) {
  const LowRank<T> low{read(a), read(b), scale, dropout, key};
  require_shape("a", a, w.d_out, low.b.rows);
  require_shape("b", b, low.a.cols, w.d_in);
  require(dropout >= 0 && dropout < 1, "dropout must be at least 0 and below 1");
  return low;
}

template <class T>
const T* bias_data(const WeightView& w, const std::optional<Array<T>>& bias) {
  if (!bias) return nullptr;
  require_size("bias", *bias, w.d_out);
  return bias->data();
}

template <class T>
void bind_forward(const WeightView& w, const Array<T>& x, const LowRank<T>& low, const T* bias, Array<T>& y,
                  Matrix<T> z) {
  const Matrix<const T> from = read(x);
  require_shape("x", x, from.rows, w.d_in);
  require_shape("out", y, from.rows, w.d_out);
  const Matrix<T> to = write(y);
  without_gil([&] { lora_forward(w, from, low, bias, to, z); });
}

template <class T>
void matmul(const WeightArgument<T>& weight, const Array<T>& x, const std::optional<Array<T>>& bias,
            Array<T> out) {
  const WeightView w = view<T>(weight);
  bind_forward<T>(w, x, {}, bias_data(w, bias), out, {});
}

template <class T>
void matmul_t(const WeightArgument<T>& weight, const Array<T>& dy, Array<T> out) {
  const WeightView w = view<T>(weight);
  const Matrix<const T> from = read(dy);
  require_shape("dy", dy, from.rows, w.d_out);
  require_shape("out", out, from.rows, w.d_in);
  const Matrix<T> to = write(out);
  without_gil([&] { lora_backward<T>(w, from, {}, {}, {}, to, {}, {}); });
}

template <class T>
void forward(const WeightArgument<T>& weight, const Array<T>& x, const Array<T>& a, const Array<T>& b,
             double scale, const std::optional<Array<T>>& bias, double dropout, uint64_t key, Array<T> y,
             Array<T> z) {
  const WeightView w = view<T>(weight);
  const LowRank<T> low = low_rank(w, a, b, scale, dropout, key);
  require_shape("z", z, read(x).rows, low.a.cols);
  bind_forward<T>(w, x, low, bias_data(w, bias), y, write(z));
}

template <class T>
void backward(const WeightArgument<T>& weight, const Array<T>& dy, const std::optional<Array<T>>& x,
              const Array<T>& z, const Array<T>& a, const Array<T>& b, double scale, double dropout,
              uint64_t key, std::optional<Array<T>> dx, std::optional<Array<T>> da,
              std::optional<Array<T>> db) {
  const WeightView w = view<T>(weight);
  const LowRank<T> low = low_rank(w, a, b, scale, dropout, key);
  const Matrix<const T> from = read(dy);
  require_shape("dy", dy, from.rows, w.d_out);
  require_shape("z", z, from.rows, low.a.cols);
  require(x || !db, "x is needed for the gradient of b");
  if (x) require_shape("x", *x, from.rows, w.d_in);
  if (dx) require_shape("dx", *dx, from.rows, w.d_in);
  if (da) require_shape("da", *da, w.d_out, low.a.cols);
  if (db) require_shape("db", *db, low.b.rows, w.d_in);
  const Matrix<const T> inputs = x ? read(*x) : Matrix<const T>{};
  const Matrix<const T> zs = read(z);
  const Matrix<T> to_dx = write(dx), to_da = write(da), to_db = write(db);
  without_gil([&] { lora_backward(w, from, inputs, zs, low, to_dx, to_da, to_db); });
}

template <class T>
void outer(const Array<T>& a, const Array<T>& b, double scale, Array<T> out) {
  const Matrix<const T> left = read(a), right = read(b);
  require(left.rows == right.rows, "a and b must have the same number of rows");
  require_shape("out", out, left.cols, right.cols);
  const Matrix<T> to = write(out);
  without_gil([&] { add_outer(left, right, scale, to); });
}

// The rows of an array that is written in place: contiguous rows, any distance from one to the next.
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

// W holds T, the factors hold F: float for the two 16-bit storages.
template <class T, class F>
void merge(py::array_t<T> w, const Array<F>& a, const Array<F>& b, double scale, const std::string& name) {
  const Storage storage = storage_of(name);
  require(bytes_per_element(storage) == sizeof(T), "w is not an array of " + name);
  const Matrix<T> to = rows_of(w);
  const Matrix<const F> left = read(a), right = read(b);
  require_shape("a", a, to.rows, right.rows);
  require_shape("b", b, left.cols, to.cols);
  without_gil([&] {
    if constexpr (sizeof(T) == 2)
      merge_lora(to, storage, left, right, scale);
    else
      merge_lora(to, left, right, scale);
  });
}

template <class T>
void register_products(py::module_& m) {
  using py::arg;
  m.def("matmul", &matmul<T>, arg("w").noconvert(), arg("x").noconvert(), arg("bias").noconvert().none(true),
        arg("out").noconvert(), "out = x W^T [+ bias]");
  m.def("matmul_t", &matmul_t<T>, arg("w").noconvert(), arg("dy").noconvert(), arg("out").noconvert(),
        "out = dy W");
  m.def("add_outer", &outer<T>, arg("a").noconvert(), arg("b").noconvert(), arg("scale"),
        arg("out").noconvert(), "out += scale a^T b");
  m.def("lora_forward", &forward<T>, arg("w").noconvert(), arg("x").noconvert(), arg("a").noconvert(),
        arg("b").noconvert(), arg("scale"), arg("bias").noconvert().none(true), arg("dropout"), arg("key"),
        arg("y").noconvert(), arg("z").noconvert(), "z = drop(x) B^T; y = x W^T + scale z A^T [+ bias]");
  m.def("lora_backward", &backward<T>, arg("w").noconvert(), arg("dy").noconvert(),
        arg("x").noconvert().none(true), arg("z").noconvert(), arg("a").noconvert(), arg("b").noconvert(),
        arg("scale"), arg("dropout"), arg("key"), arg("dx").noconvert().none(true),
        arg("da").noconvert().none(true), arg("db").noconvert().none(true),
        "dz = scale dy A; dx = dy W + undrop(dz B); da += scale dy^T z; db += dz^T drop(x)");
}

template <class T, class F>
void register_merge(py::module_& m) {
  using py::arg;
  m.def("merge_lora", &merge<T, F>, arg("w").noconvert(), arg("a").noconvert(), arg("b").noconvert(),
        arg("scale"), arg("storage"), "W += scale A B in place");
}

}  // namespace

void register_lora(py::module_& m) {
  register_products<float>(m);
  register_products<double>(m);
  register_merge<float, float>(m);
  register_merge<double, double>(m);
  register_merge<uint16_t, float>(m);
}

}  // namespace nplora::bindings
