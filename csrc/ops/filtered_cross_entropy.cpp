#include "ops/filtered_cross_entropy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "base/profile.h"
#include "ops/blocking.h"
#include "ops/cross_entropy.h"
#include "ops/scratch.h"

namespace nplora {

namespace {

// Each word of the vocabulary has one row of W. W is processed in blocks of kWords rows and at most kColumns
// columns. A block takes at most 24 KB, so it stays in L1 while all tokens use it.
constexpr size_t kWords = 32, kColumns = 2 * kDecodedColumns;
// The gradient of W adds rows of x, in blocks of kTokens tokens and at most kInputColumns columns. A block of
// x takes at most 384 KB, so it stays in L2 while all words use it.
constexpr size_t kTokens = 256, kInputColumns = 2 * kColumns;
// Adding a row of W to a row of dx takes kKeptCost times as long as multiplying by a row of W in a dense
// product.
constexpr double kKeptCost = 2;

// The kept words of each row of the logits: up to limit() likely words, and the target. `keep` stores the
// kept words of one row as two lists, in ascending order of the words. The lists overwrite the logits of the
// row, so they need no other memory: row i begins with the weights of its counts_[i] kept words, and the
// second half of the row begins with the ids of these words. For a word with the probability p, the weight is
// factor * p, or factor * (p - 1) if the word is the target.
//
// When the words of all rows are stored, `arrange` copies them in the order in which the product with W needs
// them: one block of the vocabulary after the other, and within a block, one row of the logits after the
// other. The product could not read the words from the lists in this order, because the lists of different
// rows are too far apart in memory.
class KeptWords {
 public:
  explicit KeptWords(Matrix<float> logits)
      : logits_(logits), counts_(logits.rows), blocks_(ceil_div(logits.cols, kWords)) {}

  size_t limit() const { return logits_.cols / 4; }
  size_t rows() const { return logits_.rows; }
  size_t blocks() const { return blocks_; }
  size_t size() const { return size_; }

  // Stores the likely words and the target of one row, and returns the number of stored words. Sets
  // `skipped` to the total probability of all other words. If the row has more than limit() likely words,
  // returns the number of all words, and changes nothing.
  size_t keep(size_t row, const RowSum& sum, int32_t target, double factor, double bound, double* skipped);

  void arrange();

  // After `arrange`, elements first(block, row) to first(block, row + 1) - 1 of the arrays weights() and
  // ids() are the kept words of row `row` in one block of the vocabulary.
  size_t first(size_t block, size_t row) const { return firsts_[block * rows() + row]; }
  const float* weights() const { return weights_; }
  const uint8_t* ids() const { return ids_; }  // counted from the first word of the block

 private:
  float* row_weights(size_t row) const { return logits_.row(row); }
  int32_t* row_ids(size_t row) const {
    return reinterpret_cast<int32_t*>(logits_.row(row) + logits_.cols / 2);
  }

  const Matrix<float> logits_;
  std::vector<size_t> counts_;
  size_t blocks_, size_ = 0;
  uint32_t* firsts_ = nullptr;
  float* weights_ = nullptr;
  uint8_t* ids_ = nullptr;
};

size_t KeptWords::keep(size_t row, const RowSum& sum, int32_t target, double factor, double bound,
                       double* skipped) {
  const auto& kernel = kernels::table().transformer;
  float* logits = logits_.row(row);
  float* values = scratch<float>(Scratch::kSums, limit() + kernels::kSelected);
  int32_t* ids = scratch<int32_t>(Scratch::kCodes, limit() + kernels::kSelected);
  const auto least = float(double(sum.largest) + std::log(sum.sum) + std::log(bound));
  size_t count = kernel.select(logits_.cols, logits, least, limit(), ids, values);
  if (count > limit()) return logits_.cols;
  int32_t* place = std::lower_bound(ids, ids + count, target);
  const auto at = size_t(place - ids);
  if (at == count || *place != target) {  // the target is kept even if it is unlikely
    std::copy_backward(place, ids + count, ids + count + 1);
    std::copy_backward(values + at, values + count, values + count + 1);
    *place = target;
    values[at] = logits[target];
    ++count;
  }
  // Sums the probabilities of the skipped words. The difference 1 - Σ_kept p would have an error of about
  // 1e-7, and could be negative.
  for (size_t i = 0; i < count; ++i) logits[ids[i]] = -std::numeric_limits<float>::infinity();
  const RowSum rest = sum_of_row(logits_.cols, logits, nullptr);
  *skipped = rest.sum / sum.sum * std::exp(double(rest.largest) - double(sum.largest));
  kernel.exp_sum(count, values, sum.largest, values);
  kernel.scaled(count, float(factor / sum.sum), values, row_weights(row), false);
  row_weights(row)[at] -= float(factor);
  std::memcpy(row_ids(row), ids, count * sizeof *ids);
  return counts_[row] = count;
}

// A counting sort: sorts the kept words by their block, and within a block by their row.
void KeptWords::arrange() {
  firsts_ = scratch<uint32_t>(Scratch::kLowGradients, blocks_ * rows() + 1);
  std::fill_n(firsts_, blocks_ * rows() + 1, 0);
  const size_t threads = useful_threads(double(blocks_ * rows()));
  // Calls body(row) for all rows. Neighbouring rows go to the same thread, because their counts are in the
  // same cache line, and two threads should not write to one cache line.
  const auto for_rows = [&](const auto& body) {
    for_pieces(rows(), kTokenUnit, threads, [&](Range some) {
      for (size_t i = 0; i < some.count; ++i) body(some.first + i);
    });
  };
  for_rows([&](size_t row) {
    const int32_t* ids = row_ids(row);
    for (size_t i = 0; i < counts_[row]; ++i) ++firsts_[size_t(ids[i]) / kWords * rows() + row];
  });
  for (size_t i = 0; i <= blocks_ * rows(); ++i) size_ += std::exchange(firsts_[i], uint32_t(size_));
  weights_ = scratch<float>(Scratch::kLanes, size_);
  ids_ = scratch<uint8_t>(Scratch::kLowLanes, size_);
  for_rows([&](size_t row) {
    const int32_t* ids = row_ids(row);
    for (size_t i = 0; i < counts_[row];) {
      const size_t block = size_t(ids[i]) / kWords;
      for (size_t to = first(block, row); i < counts_[row] && size_t(ids[i]) / kWords == block; ++i, ++to) {
        weights_[to] = row_weights(row)[i];
        ids_[to] = uint8_t(size_t(ids[i]) % kWords);
      }
    }
  });
}

// Returns the columns of W to process after the first `done` columns of the range `side`. The returned
// columns are either all in full panels, or all in a last panel that is narrower than a full panel.
Range next_columns(const WeightView& w, Range side, size_t done) {
  const size_t first = side.first + done, full = full_columns(w.d_in),
               end = std::min(side.first + side.count, first < full ? full : w.d_in);
  return {first, std::min(kColumns, end - first)};
}

// For each kept word, adds its row of W, times the weight of the word, to dx. A task computes some columns of
// dx for some tokens. The task skips a block of words if no token of the task keeps a word of this block.
void add_kept_rows(const WeightView& w, const KeptWords& kept, Matrix<float> dx) {
  const double work = kKeptCost * flops(1, kept.size(), dx.cols);
  const size_t threads = useful_threads(work);
  const Grid grid({dx.rows, kTokenUnit, dx.rows}, {dx.cols, kColumns, round_up(dx.cols, kColumns)}, work,
                  threads);
  const kernels::Transformer& kernel = kernels::table().transformer;
  parallel_in_order(grid.tasks(), threads, Interruptible::kYes, [&](size_t task) {
    const Range tokens = grid.tokens(task), side = grid.side(task);
    float* made = scratch<float>(Scratch::kWeight, kWords * scratch_columns(kColumns));
    for (size_t done = 0; done < side.count;) {
      const Range cols = next_columns(w, side, done);
      for (size_t block = 0; block < kept.blocks(); ++block) {
        if (kept.first(block, tokens.first) == kept.first(block, tokens.first + tokens.count)) continue;
        const Range words = nth_block(w.d_out, kWords, block);
        const kernels::Panels<float> rows = row_block<float>(w, words, cols, true, made);
        for (size_t i = tokens.first; i < tokens.first + tokens.count; ++i) {
          const size_t first = kept.first(block, i), count = kept.first(block, i + 1) - first;
          if (count > 0)
            kernel.add_rows(count, cols.count, kept.ids() + first, kept.weights() + first, rows,
                            dx.row(i) + cols.first);
        }
      }
      done += cols.count;
    }
  });
}

// For each word of one block of words, the tokens that keep this word, from one block of tokens.
class Keepers {
 public:
  // Sorts the kept words of one block of words and one block of at most kTokens tokens: by word, and for each
  // word by token.
  Keepers(const KeptWords& kept, size_t block, Range tokens)
      : weights_(scratch<float>(Scratch::kWeight, kWords * kTokens)),
        tokens_(scratch<uint8_t>(Scratch::kCodes, kWords * kTokens)) {
    const auto for_kept = [&](const auto& body) {
      for (size_t i = 0; i < tokens.count; ++i)
        for (size_t at = kept.first(block, tokens.first + i); at < kept.first(block, tokens.first + i + 1);
             ++at)
          body(i, at, kept.ids()[at]);
    };
    for_kept([&](size_t, size_t, size_t word) { ++ends_[word]; });
    size_t before = 0;
    for (size_t& end : ends_) before += std::exchange(end, before);
    for_kept([&](size_t token, size_t at, size_t word) {
      const size_t to = ends_[word]++;
      weights_[to] = kept.weights()[at];
      tokens_[to] = uint8_t(token);
    });
  }

  // Adds the rows of x of all tokens that keep one word, times their weights, to the row of dw of this word.
  // `x` and `dw` hold only some columns of these rows.
  void add(size_t word, size_t columns, const kernels::Panels<float>& x, float* dw) const {
    const size_t first = word ? ends_[word - 1] : 0, count = ends_[word] - first;
    if (count > 0)
      kernels::table().transformer.add_rows(count, columns, tokens_ + first, weights_ + first, x, dw);
  }

 private:
  float* weights_;
  uint8_t* tokens_;  // counted from the first token of the block
  std::array<size_t, kWords> ends_{};
};

// For each kept word of a token, adds the token's row of x, times the word's weight, to the word's row of dw.
// A task computes some columns of dw for some words.
void add_kept_inputs(const KeptWords& kept, const HeadGradient& head) {
  const Matrix<const float> x = head.x;
  const Matrix<float> dw = head.dw;
  const double work = kKeptCost * flops(1, kept.size(), dw.cols);
  const size_t threads = useful_threads(work);
  const Grid grid({dw.cols, kInputColumns, kInputColumns}, {dw.rows, kWords, round_up(dw.rows, kWords)}, work,
                  threads);
  parallel_in_order(grid.tasks(), threads, Interruptible::kYes, [&](size_t task) {
    const Range cols = grid.tokens(task), side = grid.side(task);
    for (size_t start = 0; start < x.rows; start += kTokens) {
      const Range tokens{start, std::min(kTokens, x.rows - start)};
      const kernels::Panels<float> rows{x.row(start) + cols.first, x.stride, kernels::kPanelColumns};
      for (size_t first = side.first; first < side.first + side.count; first += kWords) {
        const Keepers keepers(kept, first / kWords, tokens);
        for (size_t i = 0; i < std::min(kWords, dw.rows - first); ++i)
          keepers.add(i, cols.count, rows, dw.row(first + i) + cols.first);
      }
    }
  });
}

}  // namespace

void filtered_cross_entropy(const WeightView& w, Matrix<float> logits, const int64_t* targets, double factor,
                            const WordFilter& filter, const FilteredRows& rows, Matrix<float> dx,
                            const HeadGradient* head) {
  const Timed timed(Activity::kLoss);
  const size_t vocab = logits.cols;
  KeptWords kept(logits);
  parallel_for(logits.rows, useful_threads(kLogitCost * double(logits.rows) * double(vocab)),
               Interruptible::kYes, [&](size_t i) {
                 rows.losses[i] = rows.skipped[i] = 0;
                 rows.kept[i] = 0;
                 if (targets[i] != kIgnoredTarget) {
                   const RowSum sum = sum_of_row(vocab, logits.row(i), nullptr);
                   rows.losses[i] = sum.loss(logits.row(i)[targets[i]]);
                   rows.kept[i] = int64_t(
                       kept.keep(i, sum, int32_t(targets[i]), factor, filter.bound, rows.skipped + i));
                   if (size_t(rows.kept[i]) == vocab) return;
                 }
                 kernels::table().transformer.scaled(dx.cols, float(factor * rows.skipped[i]), filter.mean,
                                                     dx.row(i), false);
               });
  kept.arrange();
  add_kept_rows(w, kept, dx);
  if (head) add_kept_inputs(kept, *head);
  if (timed) timed.count(Arithmetic::kFloat32, (head ? 2 : 1) * flops(1, kept.size(), dx.cols));
}

}  // namespace nplora
