#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "base/parallel.h"
#include "base/range.h"

namespace nplora {

namespace {

constexpr size_t kPieceElements = 16384;
constexpr double kOperationsPerElement = 16;

// A task is several neighbouring pieces, as long as there are enough tasks for all threads. After each jump
// to another place in memory, the hardware must detect the access pattern again before it can prefetch.
constexpr size_t kTaskPieces = 8, kTasksPerThread = 8;

struct Piece {
  size_t parameter;
  Range range;
  double sum;
};

// Cuts the parameters into pieces of at most kPieceElements elements, and calls body(parameter, piece) for
// each piece. So threads share many small buffers as evenly as a few large buffers. Returns the pieces, which
// are valid until this thread's next call. The loop cannot be interrupted, because the caller could not see
// which parameters had been changed.
template <class Body>
const std::vector<Piece>& for_pieces(const std::vector<Trained>& parameters, const Body& body) {
  static thread_local std::vector<Piece> kept;
  std::vector<Piece>& pieces = kept;  // in a task on another thread, `kept` would be another variable
  pieces.clear();
  double elements = 0;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const size_t n = parameters[i].n;
    elements += double(n);
    for (size_t block = 0; block < ceil_div(n, kPieceElements); ++block)
      pieces.push_back({i, nth_block(n, kPieceElements, block), 0});
  }
  const size_t threads = useful_threads(kOperationsPerElement * elements);
  const size_t step = std::clamp(pieces.size() / (kTasksPerThread * threads), size_t{1}, kTaskPieces);
  parallel_for(ceil_div(pieces.size(), step), threads, Interruptible::kNo, [&](size_t task) {
    const Range range = nth_block(pieces.size(), step, task);
    for (Piece& piece : std::span(pieces).subspan(range.first, range.count))
      body(parameters[piece.parameter], piece);
  });
  return pieces;
}

template <class T>
T* at(void* buffer, size_t first) {
  return buffer ? static_cast<T*>(buffer) + first : nullptr;
}

template <class T>
const T* at(const void* buffer, size_t first) {
  return static_cast<const T*>(buffer) + first;
}

template <class T>
void adamw(const Trained& p, Range r, const kernels::AdamWCoefficients& k) {
  kernels::table().products<T>().adamw(r.count, at<T>(p.value, r.first), at<T>(p.grad, r.first),
                                       at<T>(p.first, r.first), at<T>(p.second, r.first), k);
}

template <class T>
void sgd(const Trained& p, Range r, const kernels::SgdCoefficients& k) {
  kernels::table().products<T>().sgd(r.count, at<T>(p.value, r.first), at<T>(p.grad, r.first),
                                     at<T>(p.first, r.first), k);
}

template <class T>
double squares(const Trained& p, Range r) {
  return kernels::table().products<T>().sum_of_squares(r.count, at<T>(p.grad, r.first));
}

}  // namespace

void adamw_step(const std::vector<Trained>& parameters, kernels::AdamWCoefficients shared) {
  for_pieces(parameters, [&](const Trained& p, const Piece& piece) {
    kernels::AdamWCoefficients k = shared;
    k.lr = p.lr;
    p.is_double ? adamw<double>(p, piece.range, k) : adamw<float>(p, piece.range, k);
  });
}

void sgd_step(const std::vector<Trained>& parameters, kernels::SgdCoefficients shared) {
  for_pieces(parameters, [&](const Trained& p, const Piece& piece) {
    kernels::SgdCoefficients k = shared;
    k.lr = p.lr;
    p.is_double ? sgd<double>(p, piece.range, k) : sgd<float>(p, piece.range, k);
  });
}

// Each piece has a sum of its own, and these sums are added in the order of the pieces.
double sum_of_squares(const std::vector<Trained>& parameters) {
  const std::vector<Piece>& pieces = for_pieces(parameters, [](const Trained& p, Piece& piece) {
    piece.sum = p.is_double ? squares<double>(p, piece.range) : squares<float>(p, piece.range);
  });
  double floats = 0, doubles = 0;
  for (const Piece& piece : pieces) (parameters[piece.parameter].is_double ? doubles : floats) += piece.sum;
  return floats + doubles;
}

double clip(const std::vector<Trained>& parameters, double max_norm, double* scale) {
  const double norm = std::sqrt(sum_of_squares(parameters)) * std::abs(*scale);
  if (norm > max_norm) *scale *= max_norm / norm;
  return norm;
}

}  // namespace nplora
