#include "bindings/arrays.h"
#include "ops/activation.h"
#include "ops/finite.h"

namespace nplora::bindings {

namespace {

template <class T>
void register_functions(py::module_& m) {
  using py::arg;
  m.def(
      "dropout",
      [](const Array<T>& x, double probability, uint64_t key, Array<T> out) {
        require(probability >= 0 && probability < 1, "probability must be at least 0 and below 1");
        require_aligned(x);
        require_size("out", out, size_t(x.size()));
        T* to = out.mutable_data();
        without_gil([&] { dropout(size_t(x.size()), x.data(), probability, key, to); });
      },
      arg("x").noconvert(), arg("probability"), arg("key"), arg("out").noconvert(),
      "out = x / (1 - probability) for kept elements, and 0 for dropped elements");
  m.def(
      "gelu",
      [](const Array<T>& x, bool tanh, Array<T> out) {
        require_aligned(x);
        require_size("out", out, size_t(x.size()));
        T* to = out.mutable_data();
        without_gil([&] { gelu(size_t(x.size()), x.data(), tanh, to); });
      },
      arg("x").noconvert(), arg("tanh"), arg("out").noconvert(), "out = x Phi(x)");
  m.def(
      "gelu_backward",
      [](const Array<T>& x, const Array<T>& dy, bool tanh, Array<T> out) {
        require_aligned(x);
        require_size("dy", dy, size_t(x.size()));
        require_size("out", out, size_t(x.size()));
        T* to = out.mutable_data();
        without_gil([&] { gelu_backward(size_t(x.size()), x.data(), dy.data(), tanh, to); });
      },
      arg("x").noconvert(), arg("dy").noconvert(), arg("tanh"), arg("out").noconvert(), "out = dy gelu'(x)");
}

Storage storage_of_bits(const std::string& name) {
  const Storage storage = storage_of(name);
  require(!is_blocks(storage) && bytes_per_element(storage) == 2, "storage must be 'bfloat16' or 'float16'");
  return storage;
}

template <class T>
void register_first_nonfinite(py::module_& m) {
  using py::arg;
  m.def(
      "first_nonfinite",
      [](const Array<T>& values, const std::string& name) {
        const Storage storage = storage_of(name);
        require(!is_blocks(storage) && bytes_per_element(storage) == sizeof(T),
                "values is not an array of " + name);
        require_aligned(values);
        const size_t n = size_t(values.size());
        size_t first = n;
        without_gil([&] { first = first_nonfinite(storage, n, values.data()); });
        return first == n ? py::ssize_t(-1) : py::ssize_t(first);
      },
      arg("values").noconvert(), arg("storage"),
      "The index of the first NaN or infinity, or -1 if there is none");
}

}  // namespace

void register_elementwise(py::module_& m) {
  using py::arg;
  register_functions<float>(m);
  register_functions<double>(m);
  register_first_nonfinite<float>(m);
  register_first_nonfinite<double>(m);
  register_first_nonfinite<uint16_t>(m);
  m.def(
      "widen",
      [](const Array<uint16_t>& bits, const std::string& name, Array<float> out) {
        const Storage storage = storage_of_bits(name);
        require_aligned(bits);
        require_size("out", out, size_t(bits.size()));
        float* to = out.mutable_data();
        without_gil([&] { widen_bits(size_t(bits.size()), bits.data(), storage, to); });
      },
      arg("bits").noconvert(), arg("storage"), arg("out").noconvert(),
      "Convert bit patterns of a 16-bit format to float32");
  m.def(
      "narrow",
      [](const Array<float>& values, const std::string& name, Array<uint16_t> out) {
        const Storage storage = storage_of_bits(name);
        require_aligned(values);
        require_size("out", out, size_t(values.size()));
        uint16_t* to = out.mutable_data();
        without_gil([&] { narrow_bits(size_t(values.size()), values.data(), storage, to); });
      },
      arg("values").noconvert(), arg("storage"), arg("out").noconvert(),
      "Convert float32 to bit patterns of a 16-bit format, rounded to nearest even");
}

}  // namespace nplora::bindings
