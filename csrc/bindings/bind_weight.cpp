#include <memory>
#include <vector>

#include "base/range.h"
#include "bindings/made_whole.h"
#include "bindings/nf4_arrays.h"
#include "ops/blocks.h"

namespace nplora::bindings {

namespace {

constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};

}  // namespace

Storage storage_of(const std::string& name) {
  for (size_t i = 0; i <= static_cast<size_t>(Storage::kNf4); ++i)
    if (name == name_of(static_cast<Storage>(i))) return static_cast<Storage>(i);
  throw std::invalid_argument("unknown storage format '" + name + "'");
}

const char* name_of(Storage storage) {
  return is_blocks(storage) ? info(format_of(storage)).name : kNames[static_cast<size_t>(storage)];
}

namespace {

// The names of the compute types. "float" means float64 for a weight that is stored in float64, and float32
// for all other weights.
constexpr const char* kComputes[] = {"float", "bfloat16", "int8"};
Compute compute_of(const std::string& name) {
  for (size_t i = 0; i < std::size(kComputes); ++i)
    if (name == kComputes[i]) return static_cast<Compute>(i);
  throw std::invalid_argument("unknown compute type '" + name + "'");
}

bool is_16_bit(Storage storage) {
  return !is_blocks(storage) && bytes_per_element(storage) == 2;
}

// Whether a NumPy array with elements of type T can hold the values of a storage format. For float64, T must
// be double. For a 16-bit format, T must be uint16_t (bit patterns) or float. For all other formats, T must
// be float.
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
  require(fits<T>(storage) && !is_blocks(storage), "this dtype cannot be stored as " + name);
  const Matrix<const T> values = read(w);
  std::unique_ptr<PackedWeight> packed;
  without_gil([&] { packed = std::make_unique<PackedWeight>(values, storage, compute); });
  return packed;
}

// A weight whose values stay in the caller's arrays. The weight keeps the arrays alive and does not copy
// them. No code may write to the arrays. (pybind11's keep_alive is not used, because it also runs after a
// call with wrong arguments, and then crashes.)
template <class... Arrays>
std::unique_ptr<PackedWeight> as_it_lies(const WeightView& w, const Arrays&... arrays) {
  return std::make_unique<PackedWeight>(w, std::make_shared<py::tuple>(py::make_tuple(arrays...)));
}

template <class T>
std::unique_ptr<PackedWeight> of_array(const Array<T>& w, const std::string& name,
                                       const std::string& compute) {
  const Storage storage = storage_of(name);
  require(!is_blocks(storage) && bytes_per_element(storage) == sizeof(T), "w is not an array of " + name);
  const Matrix<const T> rows = read(w);
  return as_it_lies({storage, false, rows.data, rows.rows, rows.cols, rows.stride, compute_of(compute)}, w);
}

std::unique_ptr<PackedWeight> of_blocks(const Array<uint8_t>& blocks, const std::string& name, size_t d_in,
                                        const std::string& compute) {
  const Storage storage = storage_of(name);
  require(is_blocks(storage) && storage != Storage::kNf4,
          "expected a format with rows of blocks, got " + name);
  const Matrix<const uint8_t> rows = read(blocks);
  const BlockFormatInfo& of = info(format_of(storage));
  require(rows.cols % of.bytes == 0 && d_in == rows.cols / of.bytes * of.elements,
          "the rows of blocks do not hold d_in values");
  return as_it_lies({storage, false, rows.data, rows.rows, d_in, rows.cols, compute_of(compute)}, blocks);
}

size_t product(size_t d_out, size_t d_in) {
  require(d_in == 0 || d_out <= SIZE_MAX / d_in, "d_out and d_in are too large");
  return d_out * d_in;
}

WeightView nf4_view(const kernels::Nf4& parts, size_t d_out, size_t d_in, const std::string& compute) {
  return {Storage::kNf4, false, parts.codes, d_out, d_in, 0, compute_of(compute), parts};
}

std::unique_ptr<PackedWeight> of_nf4(const Array<uint8_t>& codes, const Array<float>& absmax, size_t d_out,
                                     size_t d_in, const std::string& compute) {
  const kernels::Nf4 parts = nf4_of(product(d_out, d_in), codes, absmax);
  return as_it_lies(nf4_view(parts, d_out, d_in, compute), codes, absmax);
}

std::unique_ptr<PackedWeight> of_nested_nf4(const Array<uint8_t>& codes, const Array<uint8_t>& absmax_codes,
                                            const Array<float>& book, const Array<float>& scales,
                                            float offset, size_t d_out, size_t d_in,
                                            const std::string& compute) {
  const kernels::Nf4 parts = nested_nf4_of(product(d_out, d_in), codes, absmax_codes, book, scales, offset);
  return as_it_lies(nf4_view(parts, d_out, d_in, compute), codes, absmax_codes, book, scales);
}

template <class T>
void unpack(const PackedWeight& w, Array<T> out) {
  require(fits<T>(w.storage()),
          std::string("a weight stored as ") + name_of(w.storage()) + " cannot be unpacked to this dtype");
  require_shape("out", out, w.d_out(), w.d_in());
  const Matrix<T> to = write(out);
  without_gil([&] { w.unpack(to); });
}

template <class T>
void gather_rows(const PackedWeight& w, const Array<int64_t>& ids, Array<T> out) {
  require_aligned(ids);
  require(sizeof(T) == 8 ? w.storage() == Storage::kFloat64 : w.storage() != Storage::kFloat64,
          "out has the wrong dtype");
  const size_t n = size_t(ids.size());
  require_shape("out", out, n, w.d_in());
  // Other code may change the array `ids` while the GIL is released, so the indices are copied before they
  // are checked.
  const std::vector<int64_t> id(ids.data(), ids.data() + n);
  for (size_t i = 0; i < n; ++i)
    if (id[i] < 0 || size_t(id[i]) >= w.d_out())
      throw py::index_error("row " + std::to_string(id[i]) + " is out of range for a weight of " +
                            std::to_string(w.d_out()) + " rows");
  const Matrix<T> to = write(out);
  without_gil([&] { w.gather_rows(id.data(), to); });
}

}  // namespace

void register_weight(py::module_& m) {
  using py::arg;
  py::class_<PackedWeight>(
      m, "PackedWeight", py::is_final(), made_whole(),
      "A frozen matrix in its storage format: a copy in panels, or the caller's arrays without a copy.")
      .def(py::init(&pack<float>), arg("w").noconvert(), arg("storage"), arg("compute") = "float")
      .def(py::init(&pack<double>), arg("w").noconvert(), arg("storage"), arg("compute") = "float")
      .def(py::init(&pack<uint16_t>), arg("w").noconvert(), arg("storage"), arg("compute") = "float")
      .def_property_readonly("shape",
                             [](const PackedWeight& w) { return py::make_tuple(w.d_out(), w.d_in()); })
      .def_property_readonly("storage", [](const PackedWeight& w) { return name_of(w.storage()); })
      .def_property_readonly(
          "compute", [](const PackedWeight& w) { return kComputes[static_cast<size_t>(w.compute())]; })
      .def_property_readonly("nbytes", &PackedWeight::nbytes)
      .def("keep_int8",
           [](const PackedWeight& w) {
             require(w.compute() == Compute::kInt8, "the weight does not compute in int8");
             without_gil([&] { w.keep_int8(); });
           })
      .def("drop_int8", [](const PackedWeight& w) { without_gil([&] { w.drop_int8(); }); })
      .def_property_readonly("keeps_int8", &PackedWeight::keeps_int8)
      .def_property_readonly("int8_nbytes", &PackedWeight::int8_nbytes)
      .def_static("of_array", &of_array<float>, arg("w").noconvert(), arg("storage"), arg("compute"))
      .def_static("of_array", &of_array<double>, arg("w").noconvert(), arg("storage"), arg("compute"))
      .def_static("of_array", &of_array<uint16_t>, arg("w").noconvert(), arg("storage"), arg("compute"))
      .def_static("of_blocks", &of_blocks, arg("blocks").noconvert(), arg("storage"), arg("d_in"),
                  arg("compute"))
      .def_static("of_nf4", &of_nf4, arg("codes").noconvert(), arg("absmax").noconvert(), arg("d_out"),
                  arg("d_in"), arg("compute"))
      .def_static("of_nested_nf4", &of_nested_nf4, arg("codes").noconvert(), arg("absmax_codes").noconvert(),
                  arg("book").noconvert(), arg("scales").noconvert(), arg("offset"), arg("d_out"),
                  arg("d_in"), arg("compute"))
      .def("unpack", &unpack<float>, arg("out").noconvert())
      .def("unpack", &unpack<double>, arg("out").noconvert())
      .def("unpack", &unpack<uint16_t>, arg("out").noconvert())
      .def("gather_rows", &gather_rows<float>, arg("ids").noconvert(), arg("out").noconvert())
      .def("gather_rows", &gather_rows<double>, arg("ids").noconvert(), arg("out").noconvert())
      .def(
          "row_sums_of_squares",
          [](const PackedWeight& w, Array<double> out) {
            require_size("out", out, w.d_out());
            double* to = out.mutable_data();
            without_gil([&] { w.row_sums_of_squares(to); });
          },
          arg("out").noconvert());
}

}  // namespace nplora::bindings
