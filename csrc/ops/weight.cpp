#include "ops/weight.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "base/parallel.h"

namespace nplora {

using kernels::Bf16Pair;
using kernels::kPanelColumns;
using kernels::Panels;

size_t bytes_per_element(Storage storage) {
  switch (storage) {
    case Storage::kFloat32:
      return 4;
    case Storage::kFloat64:
      return 8;
    case Storage::kBfloat16:
    case Storage::kFloat16:
      return 2;
  }
  throw std::logic_error("unknown storage");
}

namespace {

constexpr size_t kRowsPerTask = 64;

// n elements of storage at `from` to T.
template <class T>
void widen(Storage storage, size_t n, const void* from, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    const kernels::Conversions& convert = kernels::table().convert;
    const auto* bits = static_cast<const uint16_t*>(from);
    if (storage == Storage::kFloat32) return void(std::memcpy(to, from, n * sizeof(T)));
    if (storage == Storage::kBfloat16) return convert.widen_bfloat16(n, bits, to);
    if (storage == Storage::kFloat16) return convert.widen_float16(n, bits, to);
  } else if (bytes_per_element(storage) == sizeof(T)) {  // double, or the bit patterns themselves
    return void(std::memcpy(to, from, n * sizeof(T)));
  }
  throw std::logic_error("storage and compute type do not fit");
}

template <class T>
void narrow(Storage storage, size_t n, const T* from, void* to) {
  if constexpr (std::is_same_v<T, float>) {
    const kernels::Conversions& convert = kernels::table().convert;
    auto* bits = static_cast<uint16_t*>(to);
    if (storage == Storage::kFloat32) return void(std::memcpy(to, from, n * sizeof(T)));
    if (storage == Storage::kBfloat16) return convert.narrow_bfloat16(n, from, bits);
    if (storage == Storage::kFloat16) return convert.narrow_float16(n, from, bits);
  } else if (bytes_per_element(storage) == sizeof(T)) {
    return void(std::memcpy(to, from, n * sizeof(T)));
  }
  throw std::logic_error("storage and compute type do not fit");
}

// Where element (row, col) of W lies, col a multiple of kPanelColumns, and how far the next row of that panel
// is.
struct Place {
  const char* at;
  size_t row_stride;
};

Place locate(const WeightView& w, size_t row, size_t col) {
  const auto* data = static_cast<const char*>(w.data);
  const size_t size = bytes_per_element(w.storage);
  if (!w.packed) return {data + (row * w.row_stride + col) * size, w.row_stride};
  const size_t width = std::min(kPanelColumns, w.d_in - col);
  return {data + (col * w.d_out + row * width) * size, width};
}

}  // namespace

namespace {

// The panels of a block, one after the other, widened to T: widths of kPanelColumns but the last, rows contiguous.
template <class T>
void widen_block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols, T* out) {
  for (size_t c = 0; c < cols; c += kPanelColumns) {
    const size_t width = std::min(kPanelColumns, cols - c);
    const Place from = locate(w, row, col + c);
    const size_t pitch = from.row_stride * bytes_per_element(w.storage);
    if (from.row_stride == width) {
      widen(w.storage, rows * width, from.at, out);
    } else {
      for (size_t i = 0; i < rows; ++i) widen(w.storage, width, from.at + i * pitch, out + i * width);
    }
    out += rows * width;
  }
}

template <class T>
bool stored_as(const WeightView& w) {
  return w.storage == (sizeof(T) == 4 ? Storage::kFloat32 : Storage::kFloat64);
}

}  // namespace

template <class T>
Panels<T> block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols, T* scratch) {
  if (stored_as<T>(w)) {
    const Place first = locate(w, row, col);
    const size_t panel_stride = w.packed ? w.d_out * kPanelColumns : kPanelColumns;
    return {reinterpret_cast<const T*>(first.at), first.row_stride, panel_stride};
  }
  widen_block(w, row, rows, col, cols, scratch);
  return {scratch, std::min(kPanelColumns, cols), rows * kPanelColumns};
}

// A full panel of bfloat16 is a panel of pairs as it lies. The last one may have rows of odd width: it is copied, like other
// storage, row by row with a zero behind an odd end.
template <>
Panels<Bf16Pair> block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols,
                       Bf16Pair* scratch) {
  constexpr size_t kPanelPairs = kPanelColumns / 2;
  if (w.storage == Storage::kBfloat16 && w.packed && cols % kPanelColumns == 0)
    return {reinterpret_cast<const Bf16Pair*>(locate(w, row, col).at), kPanelPairs, w.d_out * kPanelPairs};
  const kernels::Conversions& convert = kernels::table().convert;
  Bf16Pair* out = scratch;
  for (size_t c = 0; c < cols; c += kPanelColumns) {
    const size_t width = std::min(kPanelColumns, cols - c), pairs = (width + 1) / 2;
    for (size_t i = 0; i < rows; ++i, out += pairs) {
      float values[kPanelColumns + 1];
      const Place from = locate(w, row + i, col + c);
      widen(w.storage, width, from.at, values);
      values[width] = 0;
      convert.narrow_bfloat16(2 * pairs, values, reinterpret_cast<uint16_t*>(out));
    }
  }
  return {scratch, (std::min(kPanelColumns, cols) + 1) / 2, rows * kPanelPairs};
}

template <class T>
Panel<T> column_block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols, T* scratch) {
  const Panels<T> panels = block(w, row, rows, col, cols, scratch);
  return {panels.data, panels.row_stride};
}

template <>
Panel<Bf16Pair> column_block(const WeightView& w, size_t row, size_t rows, size_t col, size_t cols,
                             Bf16Pair* scratch) {
  const kernels::Conversions& convert = kernels::table().convert;
  const Place from = locate(w, row, col);
  if (w.storage == Storage::kBfloat16) {
    convert.pair_bits(rows, cols, reinterpret_cast<const uint16_t*>(from.at), from.row_stride, scratch);
  } else if (w.storage == Storage::kFloat32) {
    convert.pair_rows(rows, cols, reinterpret_cast<const float*>(from.at), from.row_stride, scratch);
  } else {
    float values[2 * kPanelColumns];
    for (size_t i = 0; i < rows; i += 2) {
      const size_t count = std::min<size_t>(2, rows - i);
      widen_block(w, row + i, count, col, cols, values);
      convert.pair_rows(count, cols, values, cols, scratch + i / 2 * cols);
    }
  }
  return {scratch, cols};
}

template Panels<float> block(const WeightView&, size_t, size_t, size_t, size_t, float*);
template Panels<double> block(const WeightView&, size_t, size_t, size_t, size_t, double*);
template Panel<float> column_block(const WeightView&, size_t, size_t, size_t, size_t, float*);
template Panel<double> column_block(const WeightView&, size_t, size_t, size_t, size_t, double*);

template <class T>
PackedWeight::PackedWeight(Matrix<const T> w, Storage storage, Compute compute)
    : storage_(storage),
      compute_(compute),
      d_out_(w.rows),
      d_in_(w.cols),
      buffer_(w.rows * w.cols * bytes_per_element(storage)) {
  const WeightView to = view();
  const size_t tasks = (d_out_ + kRowsPerTask - 1) / kRowsPerTask;
  const double elements = static_cast<double>(d_out_) * static_cast<double>(d_in_);
  parallel_for(tasks, useful_threads(elements), Interruptible::kYes, [&](size_t task) {
    for (size_t i = task * kRowsPerTask; i < std::min(d_out_, (task + 1) * kRowsPerTask); ++i)
      for (size_t c = 0; c < d_in_; c += kPanelColumns)
        narrow(storage, std::min(kPanelColumns, d_in_ - c), w.row(i) + c,
               const_cast<char*>(locate(to, i, c).at));
  });
}

template PackedWeight::PackedWeight(Matrix<const float>, Storage, Compute);
template PackedWeight::PackedWeight(Matrix<const double>, Storage, Compute);
template PackedWeight::PackedWeight(Matrix<const uint16_t>, Storage, Compute);

namespace {

template <class T>
void copy_row(const WeightView& w, size_t row, T* out) {
  for (size_t c = 0; c < w.d_in; c += kPanelColumns)
    widen(w.storage, std::min(kPanelColumns, w.d_in - c), locate(w, row, c).at, out + c);
}

template <class Body>
void for_rows(size_t rows, size_t cols, const Body& body) {
  const double elements = static_cast<double>(rows) * static_cast<double>(cols);
  parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, useful_threads(elements), Interruptible::kYes,
               [&](size_t task) {
                 for (size_t i = task * kRowsPerTask; i < std::min(rows, (task + 1) * kRowsPerTask); ++i)
                   body(i);
               });
}

}  // namespace

template <class T>
void PackedWeight::unpack(Matrix<T> out) const {
  for_rows(d_out_, d_in_, [&](size_t i) { copy_row(view(), i, out.row(i)); });
}

template <class T>
void PackedWeight::gather_rows(const int64_t* ids, Matrix<T> out) const {
  for_rows(out.rows, d_in_, [&](size_t i) { copy_row(view(), static_cast<size_t>(ids[i]), out.row(i)); });
}

void PackedWeight::row_sums_of_squares(double* out) const {
  const kernels::KernelTable& k = kernels::table();
  for_rows(d_out_, d_in_, [&](size_t i) {
    if (storage_ == Storage::kFloat64) {
      auto* row = scratch<double>(Scratch::kWeight, d_in_);
      copy_row(view(), i, row);
      out[i] = k.f64.sum_of_squares(d_in_, row);
    } else {
      auto* row = scratch<float>(Scratch::kWeight, d_in_);
      copy_row(view(), i, row);
      out[i] = k.f32.sum_of_squares(d_in_, row);
    }
  });
}

template void PackedWeight::unpack(Matrix<float>) const;
template void PackedWeight::unpack(Matrix<double>) const;
template void PackedWeight::unpack(Matrix<uint16_t>) const;
template void PackedWeight::gather_rows(const int64_t*, Matrix<float>) const;
template void PackedWeight::gather_rows(const int64_t*, Matrix<double>) const;

}  // namespace nplora
