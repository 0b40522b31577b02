#include <memory>
#include <vector>

#include "bindings/arrays.h"

namespace nplora::bindings {

Storage storage_of(const std::string& name) {
  for (Storage s : {Storage::kFloat32, Storage::kFloat64, Storage::kBfloat16, Storage::kFloat16})
    if (name == name_of(s)) return s;
  throw std::invalid_argument("unknown storage format '" + name + "'");
}

const char* name_of(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return "float32";
    case Storage::kFloat64:
      return "float64";
    case Storage::kBfloat16:
      return "bfloat16";
    case Storage::kFloat16:
      return "float16";
  }
  return "?";
}

namespace {

// "float" is the weight's own: float32, or float64 for float64 storage.
Compute compute_of(const std::string& name) {
  if (name == "float") return Compute::kFloat;
  require(name == "bfloat16", "unknown compute type '" + name + "'");
  return Compute::kBfloat16;
}

bool is_16_bit(Storage storage) {
  return bytes_per_element(storage) == 2;
}

// Which arrays hold the values of a storage format: double for float64, bit patterns or float for 16 bits,
// else float.
template <class T>
bool fits(Storage storage) {
  if (sizeof(T) == 8) return storage == Storage::kFloat64;
  if (sizeof(T) == 2) return is_16_bit(storage);
  return storage != Storage::kFloat64;
}

template <class T>
std::unique_ptr<PackedWeight> pack(const Array<T>& w, const std::string& name,
                                   const std::string& compute_name) {
  const Storage storage = storage_of(name);
  const Compute compute = compute_of(compute_name);
  require(compute == Compute::kFloat || storage != Storage::kFloat64, "a float64 weight computes in float64");
  require(fits<T>(storage), "this dtype can't be stored as " + name);
  const Matrix<const T> values = read(w);
  std::unique_ptr<PackedWeight> packed;
  without_gil([&] { packed = std::make_unique<PackedWeight>(values, storage, compute); });
  return packed;
}

template <class T>
void unpack(const PackedWeight& w, Array<T> out) {
  require(fits<T>(w.storage()),
          std::string("a weight stored as ") + name_of(w.storage()) + " can't be unpacked to this dtype");
  require_shape("out", out, w.d_out(), w.d_in());
  const Matrix<T> to = write(out);
  without_gil([&] { w.unpack(to); });
}

template <class T>
void gather_rows(const PackedWeight& w, const Array<int64_t>& ids, Array<T> out) {
  require(sizeof(T) == 8 ? w.storage() == Storage::kFloat64 : w.storage() != Storage::kFloat64,
          "out has the wrong dtype");
  const size_t n = size_t(ids.size());
  require_shape("out", out, n, w.d_in());
  const std::vector<int64_t> id(ids.data(), ids.data() + n);  // a copy: nobody writes to it after the check
  for (size_t i = 0; i < n; ++i)
    if (id[i] < 0 || size_t(id[i]) >= w.d_out())
      throw py::index_error("row " + std::to_string(id[i]) + " is out of range for a weight of " +
                            std::to_string(w.d_out()) + " rows");
  const Matrix<T> to = write(out);
  without_gil([&] { w.gather_rows(id.data(), to); });
}

}  // namespace

void register_weight(py::module_& m) {
  py::class_<PackedWeight>(m, "PackedWeight", "A frozen matrix in its storage format, packed in panels.")
      .def(py::init(&pack<float>), py::arg("w").noconvert(), py::arg("storage"), py::arg("compute") = "float")
      .def(py::init(&pack<double>), py::arg("w").noconvert(), py::arg("storage"),
           py::arg("compute") = "float")
      .def(py::init(&pack<uint16_t>), py::arg("w").noconvert(), py::arg("storage"),
           py::arg("compute") = "float")
      .def_property_readonly("shape",
                             [](const PackedWeight& w) { return py::make_tuple(w.d_out(), w.d_in()); })
      .def_property_readonly("storage", [](const PackedWeight& w) { return name_of(w.storage()); })
      .def_property_readonly(
          "compute",
          [](const PackedWeight& w) { return w.compute() == Compute::kFloat ? "float" : "bfloat16"; })
      .def_property_readonly("nbytes", &PackedWeight::nbytes)
      .def("unpack", &unpack<float>, py::arg("out").noconvert())
      .def("unpack", &unpack<double>, py::arg("out").noconvert())
      .def("unpack", &unpack<uint16_t>, py::arg("out").noconvert())
      .def("gather_rows", &gather_rows<float>, py::arg("ids").noconvert(), py::arg("out").noconvert())
      .def("gather_rows", &gather_rows<double>, py::arg("ids").noconvert(), py::arg("out").noconvert())
      .def(
          "row_sums_of_squares",
          [](const PackedWeight& w, Array<double> out) {
            require_size("out", out, w.d_out());
            double* to = out.mutable_data();
            without_gil([&] { w.row_sums_of_squares(to); });
          },
          py::arg("out").noconvert());
}

}  // namespace nplora::bindings
