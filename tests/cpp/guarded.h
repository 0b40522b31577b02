// Buffers that detect every access outside their elements. Directly before and after the mapping are pages
// that cannot be read or written. Every byte that is not an element is 0xFF (a NaN in every float type).
// Under AddressSanitizer the rest of the first and last page is poisoned.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "system.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

inline constexpr unsigned char kFiller = 0xFF;

// Where the elements are in their pages: they end at the guard page after them (odd sizes give unaligned
// pointers), or begin at the guard page before them (aligned to a page).
enum class Place { kEnd, kStart };
inline constexpr Place kPlaces[] = {Place::kEnd, Place::kStart};
inline const char* name_of(Place place) {
  return place == Place::kEnd ? "flush with the end" : "flush with the start";
}

// n elements of T in whole pages between two guard pages.
template <class T>
class Guarded {
 public:
  Guarded(size_t n, Place place)
      : bytes_(std::max<size_t>(1, (n * sizeof(T) + page() - 1) / page()) * page()) {
    std::vector<unsigned char*>& free = pool()[bytes_];
    if (free.empty()) free.push_back(test_system::map_between_guards(bytes_));
    pages_ = free.back();
    free.pop_back();
    unpoison();
    std::memset(pages_, kFiller, bytes_);
    const size_t first = place == Place::kEnd ? bytes_ - n * sizeof(T) : 0;
    data_ = reinterpret_cast<T*>(pages_ + first);
    poison(pages_, first);
    poison(pages_ + first + n * sizeof(T), bytes_ - first - n * sizeof(T));
  }
  ~Guarded() {
    unpoison();
    pool()[bytes_].push_back(pages_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() const { return data_; }

  // A copy of the pages, and the offset of the elements in it.
  std::vector<unsigned char> bytes() {
    unpoison();
    return {pages_, pages_ + bytes_};
  }
  size_t first() const { return static_cast<size_t>(reinterpret_cast<unsigned char*>(data_) - pages_); }

 private:
  static size_t page() { return test_system::page_size(); }
  static std::map<size_t, std::vector<unsigned char*>>& pool() {
    static std::map<size_t, std::vector<unsigned char*>> free;
    return free;
  }
  void poison([[maybe_unused]] const unsigned char* from, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(from, bytes);
#endif
  }
  void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(pages_, bytes_);
#endif
  }

  size_t bytes_;
  unsigned char* pages_;
  T* data_;
};

// Element (i, j) is at (j / panel) * panel_stride + i * row_stride + (j % panel) * step.
struct Layout {
  size_t row_stride, step = 1, panel = SIZE_MAX, panel_stride = 0;

  size_t offset(size_t i, size_t j) const {
    const size_t before = j < panel ? 0 : j / panel;
    return before * panel_stride + i * row_stride + (j - before * panel) * step;
  }
};

// A matrix (rows, cols) in a guarded buffer that ends with its last element.
template <class T>
class Placed {
 public:
  Placed(size_t rows, size_t cols, Layout layout, Place place)
      : rows_(rows), cols_(cols), layout_(layout), buffer_(extent(rows, cols, layout), place) {}
  Placed(size_t rows, size_t cols, Layout layout, Place place, const std::vector<T>& values)
      : Placed(rows, cols, layout, place) {
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < cols; ++j) buffer_.data()[layout.offset(i, j)] = values[i * cols + j];
  }

  T* data() const { return buffer_.data(); }
  T operator()(size_t i, size_t j) const { return buffer_.data()[layout_.offset(i, j)]; }

  std::vector<T> values() const {
    std::vector<T> out;
    out.reserve(rows_ * cols_);
    for (size_t i = 0; i < rows_; ++i)
      for (size_t j = 0; j < cols_; ++j) out.push_back((*this)(i, j));
    return out;
  }

  // Whether every byte of the pages outside the elements is still the filler.
  bool gaps_intact() {
    std::vector<unsigned char> bytes = buffer_.bytes();
    unsigned char* first = bytes.data() + buffer_.first();
    for (size_t i = 0; i < rows_; ++i)
      for (size_t j = 0; j < cols_; ++j)
        std::memset(first + layout_.offset(i, j) * sizeof(T), kFiller, sizeof(T));
    return bytes[0] == kFiller && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
  }

  // Whether nothing was written, neither to the elements nor around them.
  bool untouched(const std::vector<T>& as_filled) {
    const std::vector<T> now = values();
    return (now.empty() || std::memcmp(now.data(), as_filled.data(), now.size() * sizeof(T)) == 0) &&
           gaps_intact();
  }

 private:
  static size_t extent(size_t rows, size_t cols, Layout layout) {
    size_t end = 0;
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < cols; ++j) end = std::max(end, layout.offset(i, j) + 1);
    return end;
  }

  size_t rows_, cols_;
  Layout layout_;
  Guarded<T> buffer_;
};

// A vector of n elements.
template <class T>
struct Row : Placed<T> {
  Row(Place place, size_t n) : Placed<T>(1, n, {n}, place) {}
  Row(Place place, const std::vector<T>& values)
      : Placed<T>(1, values.size(), {values.size()}, place, values) {}

  T operator[](size_t i) const { return (*this)(0, i); }
};
