#include <algorithm>

#include "base/range.h"
#include "bindings/nf4_arrays.h"
#include "ops/blocks.h"

namespace nplora::bindings {

namespace {

using Floats = Array<float>;
using Bytes = Array<uint8_t>;

// Finds a row format by its name. All block formats except nf4 are row formats: their blocks run along the
// rows of a matrix.
BlockFormat row_format(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < kRowFormats; ++i) {
    if (name == kBlockFormats[i].name) return static_cast<BlockFormat>(i);
    known += (i ? ", " : "") + std::string(kBlockFormats[i].name);
  }
  throw std::invalid_argument("unknown block format '" + name + "', expected one of " + known);
}

// Checks that the array `blocks` has the right size for (rows, cols) values.
void require_blocks(BlockFormat format, const Bytes& blocks, size_t rows, size_t cols) {
  const BlockFormatInfo& of = info(format);
  require(cols % of.elements == 0, "rows of " + std::to_string(cols) +
                                       " values are not a whole number of blocks of " +
                                       std::to_string(of.elements) + ", which " + of.name + " needs");
  require_shape("blocks", blocks, rows, cols / of.elements * of.bytes);
}

void quantize_rows(const Floats& values, const std::string& name, Bytes out) {
  const BlockFormat format = row_format(name);
  const Matrix<const float> from = read(values);
  require_blocks(format, out, from.rows, from.cols);
  const Matrix<uint8_t> to = write(out);
  without_gil([&] { quantize(format, from, to); });
}

void dequantize_rows(const Bytes& blocks, const std::string& name, Floats out) {
  const BlockFormat format = row_format(name);
  const Matrix<float> to = write(out);
  require_blocks(format, blocks, to.rows, to.cols);
  const Matrix<const uint8_t> from = read(blocks);
  without_gil([&] { dequantize(format, from, to); });
}

void quantize_to_nf4(const Floats& values, Bytes codes, Floats absmax) {
  const Matrix<const float> from = read(values);
  const size_t n = from.rows * from.cols;
  require_size("codes", codes, ceil_div(n, 2));
  require_size("absmax", absmax, ceil_div(n, BlockNf4::kElements));
  uint8_t* to = codes.mutable_data();
  float* absmax_to = absmax.mutable_data();
  without_gil([&] { quantize_nf4(from, to, absmax_to); });
}

float quantize_nf4_absmax(const Floats& absmax, Bytes codes, Floats book, Floats scales) {
  const size_t n = size_t(absmax.size());
  require_size("codes", codes, n);
  require_size("book", book, kNf4Book);
  require_size("scales", scales, ceil_div(n, kNf4Group));
  require_aligned(absmax);
  uint8_t* to = codes.mutable_data();
  float *book_to = book.mutable_data(), *scales_to = scales.mutable_data();
  float offset = 0, levels[kNf4Book];
  without_gil([&] { offset = quantize_absmax(n, absmax.data(), to, levels, scales_to); });
  std::copy(levels, levels + kNf4Book, book_to);
  return offset;
}

void dequantize_from_nf4(const Bytes& codes, const Floats& absmax, Floats out) {
  const size_t n = size_t(out.size());
  const kernels::Nf4 from = nf4_of(n, codes, absmax);
  require_aligned(out);
  float* to = out.mutable_data();
  without_gil([&] { dequantize_nf4(n, from, to); });
}

void dequantize_from_nested_nf4(const Bytes& codes, const Bytes& absmax_codes, const Floats& book,
                                const Floats& scales, float offset, Floats out) {
  const size_t n = size_t(out.size());
  const kernels::Nf4 from = nested_nf4_of(n, codes, absmax_codes, book, scales, offset);
  require_aligned(out);
  float* to = out.mutable_data();
  without_gil([&] { dequantize_nf4(n, from, to); });
}

py::dict block_formats() {
  py::dict all;
  for (const BlockFormatInfo& of : kBlockFormats) all[of.name] = py::cast(&of);
  return all;
}

py::tuple scale_offsets(const BlockFormatInfo& of) {
  py::tuple offsets(of.scales);
  for (size_t i = 0; i < of.scales; ++i) offsets[i] = of.scale_at[i];
  return offsets;
}

}  // namespace

void register_blocks(py::module_& m) {
  using py::arg;
  py::class_<BlockFormatInfo, std::unique_ptr<BlockFormatInfo, py::nodelete>>(
      m, "BlockFormat", "A block format, as csrc/kernels/formats describes it")
      .def_readonly("name", &BlockFormatInfo::name)
      .def_readonly("ggml_name", &BlockFormatInfo::ggml_name)
      .def_readonly("elements", &BlockFormatInfo::elements)
      .def_readonly("nbytes", &BlockFormatInfo::bytes)
      .def_property_readonly("scale_offsets", &scale_offsets)
      .def_property_readonly("shorter", [](const BlockFormatInfo& of) { return of.facts.shorter; });
  m.def("block_formats", &block_formats, "The block formats, with their names as keys");
  m.def("quantize", &quantize_rows, arg("values").noconvert(), arg("format"), arg("blocks").noconvert(),
        "Quantise float32 values to low-bit blocks");
  m.def("dequantize", &dequantize_rows, arg("blocks").noconvert(), arg("format"), arg("out").noconvert(),
        "Decode low-bit blocks to float32");
  m.def("quantize_nf4", &quantize_to_nf4, arg("values").noconvert(), arg("codes").noconvert(),
        arg("absmax").noconvert(), "Quantise float32 values to NF4");
  m.def("quantize_absmax", &quantize_nf4_absmax, arg("absmax").noconvert(), arg("codes").noconvert(),
        arg("book").noconvert(), arg("scales").noconvert(),
        "Quantise the absmax of NF4 (double quantisation); returns the offset");
  m.def("dequantize_nf4", &dequantize_from_nf4, arg("codes").noconvert(), arg("absmax").noconvert(),
        arg("out").noconvert(), "Decode NF4 to float32");
  m.def("dequantize_nested_nf4", &dequantize_from_nested_nf4, arg("codes").noconvert(),
        arg("absmax_codes").noconvert(), arg("book").noconvert(), arg("scales").noconvert(), arg("offset"),
        arg("out").noconvert(), "Decode NF4 with a quantised absmax to float32");
}

}  // namespace nplora::bindings
