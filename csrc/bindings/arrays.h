// NumPy arrays that Python passes to C++. An array must have the exact dtype and be in C order.
// python/nplora/_check.py has usually checked the shapes already, with better error messages. The C++ code
// checks the shapes again.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "base/matrix.h"
#include "ops/weight.h"

namespace nplora::bindings {

namespace py = pybind11;

// An array that is never converted. An argument is refused if its dtype is not T, or if it is not in C order.
// So writes always reach the caller's buffer.
template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Takes the GIL back. If the interpreter has started to shut down while this thread had no GIL, Python before
// 3.14 ends a daemon thread here with pthread_exit, and glibc then unwinds the stack. The unwinding would run
// the destructors of Python objects in the calling functions, although the thread does not have the GIL. So
// this function stops the unwinding, and the thread sleeps until the process ends, as in Python 3.14.
inline void take_gil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {  // after pthread_exit; glibc does not allow code to leave this catch block
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }
}

// Runs `f` without the GIL. pybind11's gil_scoped_release is not used, because its destructor takes the GIL
// back, and pthread_exit must not unwind the stack through a destructor.
template <class F>
void without_gil(const F& f) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    f();
  } catch (...) {
    error = std::current_exception();
  }
  take_gil(state);
  if (error) std::rethrow_exception(error);
}

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}
inline void require(bool condition, const std::string& message) {
  require(condition, message.c_str());
}

template <class T>
void require_shape(const char* name, const Array<T>& array, size_t rows, size_t cols) {
  if (array.ndim() == 2 && size_t(array.shape(0)) == rows && size_t(array.shape(1)) == cols) return;
  throw std::invalid_argument(std::string(name) + " must have shape (" + std::to_string(rows) + ", " +
                              std::to_string(cols) + ")");
}

inline void require_aligned(const py::array& array) {
  require(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_, "expected an aligned array");
}

// Requires an array of n elements, aligned for their type.
template <class T>
void require_size(const char* name, const Array<T>& array, size_t n) {
  require_aligned(array);
  if (size_t(array.size()) == n) return;
  throw std::invalid_argument(std::string(name) + " must have " + std::to_string(n) + " elements");
}

template <class T>
Matrix<const T> read(const Array<T>& array) {
  require(array.ndim() == 2, "expected an array with 2 axes");
  require_aligned(array);
  const size_t cols = size_t(array.shape(1));
  return {array.data(), size_t(array.shape(0)), cols, cols};
}

// mutable_data() raises if the array is read-only.
template <class T>
Matrix<T> write(Array<T>& array) {
  require(array.ndim() == 2, "expected an array with 2 axes");
  require_aligned(array);
  const size_t cols = size_t(array.shape(1));
  return {array.mutable_data(), size_t(array.shape(0)), cols, cols};
}

template <class T>
Matrix<T> write(std::optional<Array<T>>& array) {
  return array ? write(*array) : Matrix<T>{};
}

// Arrays below this size use NumPy's own memory, because malloc is as fast as the buffer cache for small
// arrays.
inline constexpr size_t kLeastBufferBytes = size_t{1} << 16;

// An array whose memory returns to the buffer cache when the last view of the array is gone.
py::array empty_array(const py::dtype& dtype, const std::vector<py::ssize_t>& shape);

template <class T>
Array<T> empty_rows(size_t rows, size_t cols) {
  const std::vector<py::ssize_t> shape{py::ssize_t(rows), py::ssize_t(cols)};
  if (rows * cols * sizeof(T) < kLeastBufferBytes) return Array<T>(shape);
  return empty_array(py::dtype::of<T>(), shape);
}

Storage storage_of(const std::string& name);
const char* name_of(Storage storage);

// A weight in the form that Python passes: a packed weight, or an array.
template <class T>
using WeightArgument = std::variant<const PackedWeight*, Array<T>>;

template <class T>
WeightView view(const WeightArgument<T>& w) {
  if (const auto* packed = std::get_if<const PackedWeight*>(&w)) {
    require(*packed != nullptr, "expected a weight");
    if (((*packed)->storage() == Storage::kFloat64) != (sizeof(T) == 8))
      throw std::invalid_argument(std::string("a weight stored as ") + name_of((*packed)->storage()) +
                                  " does not fit these arrays' dtype");
    return (*packed)->view();
  }
  return view_of(read(std::get<Array<T>>(w)));
}

void register_buffers(py::module_& m);
void register_weight(py::module_& m);
void register_lora(py::module_& m);
void register_inference(py::module_& m);
void register_optimizer(py::module_& m);
void register_elementwise(py::module_& m);
void register_runtime(py::module_& m);
void register_constants(py::module_& m);
void register_blocks(py::module_& m);
void register_transformer(py::module_& m);
void register_profile(py::module_& m);

}  // namespace nplora::bindings
