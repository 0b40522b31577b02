#include "ops/optimizer.h"

#include <algorithm>

#include "base/parallel.h"

namespace nplora {

namespace {

constexpr size_t kElementsPerTask = 16384;
constexpr double kOperationsPerElement = 16;

struct Piece {
  size_t buffer, first, count;
};

// Cuts the buffers into pieces of about one size, so that many small ones and a few large ones share out
// alike.
template <class Buffer>
std::vector<Piece> pieces(const std::vector<Buffer>& buffers, double* operations) {
  std::vector<Piece> all;
  *operations = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    *operations += kOperationsPerElement * double(buffers[i].n);
    for (size_t first = 0; first < buffers[i].n; first += kElementsPerTask)
      all.push_back({i, first, std::min(kElementsPerTask, buffers[i].n - first)});
  }
  return all;
}

// Calls body(buffer, first, count) for every piece. The steps are not interrupted: a half-made one could not be told from
// a whole one.
template <class Buffer, class Body>
void for_pieces(const std::vector<Buffer>& buffers, const Body& body) {
  double operations;
  const std::vector<Piece> all = pieces(buffers, &operations);
  parallel_for(all.size(), useful_threads(operations), Interruptible::kNo,
               [&](size_t i) { body(buffers[all[i].buffer], all[i].first, all[i].count); });
}

}  // namespace

template <class T>
void adamw_step(const std::vector<Trained<T>>& parameters, kernels::AdamWCoefficients shared) {
  for_pieces(parameters, [&](const Trained<T>& p, size_t at, size_t count) {
    kernels::AdamWCoefficients k = shared;
    k.lr = p.lr;
    k.weight_decay = p.weight_decay;
    kernels::table().products<T>().adamw(count, p.value + at, p.grad + at, p.first + at, p.second + at, k);
  });
}

template <class T>
void sgd_step(const std::vector<Trained<T>>& parameters, kernels::SgdCoefficients shared) {
  for_pieces(parameters, [&](const Trained<T>& p, size_t at, size_t count) {
    kernels::SgdCoefficients k = shared;
    k.lr = p.lr;
    k.weight_decay = p.weight_decay;
    kernels::table().products<T>().sgd(count, p.value + at, p.grad + at, p.first ? p.first + at : nullptr, k);
  });
}

// One sum per piece, added in the order of the pieces.
template <class T>
double sum_of_squares(const std::vector<Span<T>>& arrays) {
  double operations;
  const std::vector<Piece> all = pieces(arrays, &operations);
  std::vector<double> sums(all.size());
  parallel_for(all.size(), useful_threads(operations), Interruptible::kNo, [&](size_t i) {
    sums[i] = kernels::table().products<T>().sum_of_squares(all[i].count,
                                                            arrays[all[i].buffer].data + all[i].first);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

template void adamw_step(const std::vector<Trained<float>>&, kernels::AdamWCoefficients);
template void adamw_step(const std::vector<Trained<double>>&, kernels::AdamWCoefficients);
template void sgd_step(const std::vector<Trained<float>>&, kernels::SgdCoefficients);
template void sgd_step(const std::vector<Trained<double>>&, kernels::SgdCoefficients);
template double sum_of_squares(const std::vector<Span<float>>&);
template double sum_of_squares(const std::vector<Span<double>>&);

}  // namespace nplora
