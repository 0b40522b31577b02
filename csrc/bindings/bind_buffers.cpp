#include <memory>

#include "base/buffer_cache.h"
#include "bindings/arrays.h"

namespace nplora::bindings {

py::array empty_array(const py::dtype& dtype, const std::vector<py::ssize_t>& shape) {
  constexpr uint64_t kHoldsReferences = 1;  // the flag NPY_ITEM_REFCOUNT of NumPy
  require(!(dtype.flags() & kHoldsReferences), "expected a dtype without Python objects");
  size_t bytes = size_t(dtype.itemsize());
  for (const py::ssize_t n : shape) {
    require(n >= 0, "expected a shape without negative numbers");
    if (__builtin_mul_overflow(bytes, size_t(n), &bytes)) throw std::bad_alloc();
  }
  auto buffer = std::make_unique<AlignedBuffer>(buffer_cache().take(bytes));
  void* data = buffer->as<void>();
  const py::capsule owner(buffer.get(), [](void* held) {
    const std::unique_ptr<AlignedBuffer> buffer(static_cast<AlignedBuffer*>(held));
    buffer_cache().give_back(std::move(*buffer));
  });
  buffer.release();  // NOLINT: the capsule now owns the buffer
  return py::array(dtype, shape, data, owner);
}

void register_buffers(py::module_& m) {
  m.def("empty", &empty_array, py::arg("dtype"), py::arg("shape"),
        "An array with undefined contents, which may reuse the memory of a deleted array");
  m.def("release_buffers", [] { buffer_cache().release(); }, "Return idle buffers to the system");
  m.def("allocations", &AlignedBuffer::allocations,
        "How many times this process has allocated or resized a buffer");
}

}  // namespace nplora::bindings
