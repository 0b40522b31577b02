#include "ops/attention.h"

#include <cmath>
#include <vector>

#include "base/parallel.h"
#include "ops/attention_tile.h"
#include "ops/outer.h"

namespace nplora {

namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// A task's tiles: more would leave threads without work at the end of short sequences.
constexpr size_t kTilesPerTask = 4;

// Fewer lanes leave vectors idle: such a run goes row by row, its keys in the lanes.
constexpr size_t kFewestLanes = 12;

// Keys whose scores, of all heads of a group, are kept at a time.
constexpr size_t kRowKeys = 256;

const kernels::Transformer& kernel() {
  return kernels::table().transformer;
}

struct Outputs {
  Matrix<float> out, lse;  // lse may be empty
};

struct ForwardBuffers {
  explicit ForwardBuffers(size_t dim) {
    float* at = scratch<float>(Scratch::kAttention, kTileLanes * (3 * dim + kTileKeys + 3));
    for (float** buffer : {&rows, &queries, &sums}) {
      *buffer = at;
      at += kTileLanes * dim;
    }
    scores = at;
    largest = scores + kTileKeys * kTileLanes;
    sum = largest + kTileLanes;
    factor = sum + kTileLanes;
  }

  float* rows;                    // (lanes, head_dim)
  float *queries, *sums;          // (head_dim, kTileLanes)
  float* scores;                  // (kTileKeys, kTileLanes)
  float *largest, *sum, *factor;  // (kTileLanes)
};

// Algorithm 1 of Dao 2023 for one tile of queries: all keys pass by once; what was summed shrinks when a larger score comes.
void attend(const QueryTile& tile, Matrix<const float> q, const Outputs& to) {
  const size_t dim = tile.shape.head_dim, lanes = tile.lanes;
  const ForwardBuffers b(dim);
  tile.gather(q, tile.shape.scale, b.rows);
  kernel().transpose(lanes, dim, b.rows, dim, b.queries, kTileLanes);
  std::fill_n(b.largest, lanes, kLowest);
  std::fill_n(b.sum, lanes, 0.0f);

  bool accumulate = false;
  for_key_tiles(tile.visible(), [&](Span keys) {
    const size_t n = keys.end - keys.first;
    score(lanes, tile.run.keys(tile.kv_head, dim, keys.first, n), b.queries, b.scores);
    tile.mask(keys, b.scores);
    kernel().softmax_step(n, lanes, b.scores, kTileLanes, b.largest, b.sum, b.factor);
    if (accumulate) kernel().scale_columns(dim, lanes, b.factor, b.sums, kTileLanes);
    add_weighted(lanes, tile.run.values(tile.kv_head, dim, keys.first, n), b.scores, b.sums, accumulate);
    accumulate = true;
  });

  for (size_t i = 0; i < lanes; ++i) b.factor[i] = 1 / b.sum[i];
  kernel().scale_columns(dim, lanes, b.factor, b.sums, kTileLanes);
  kernel().transpose(dim, lanes, b.sums, kTileLanes, b.rows, dim);
  tile.scatter(b.rows, 1, to.out, false);
  if (to.lse.data)
    tile.for_tokens([&](size_t row, size_t head, size_t heads, size_t lane) {
      for (size_t i = 0; i < heads; ++i)
        to.lse.row(row)[head + i] = b.largest[lane + i] + std::log(b.sum[lane + i]);
    });
}

// The same for the heads of one query, whose scores are rows.
void attend_row(const AttentionShape& shape, const Run& run, size_t query, size_t kv_head,
                Matrix<const float> q, const Outputs& to) {
  const size_t dim = shape.head_dim, group = shape.group(), place = run.first_place + query;
  const size_t head = kv_head * group, row = run.row + query;
  float* scaled = scratch<float>(Scratch::kAttention, group * (dim + kRowKeys + 2));
  float *scores = scaled + group * dim, *largest = scores + group * kRowKeys, *sum = largest + group;
  float* out = to.out.row(row) + head * dim;
  kernel().scaled(group * dim, shape.scale, q.row(row) + head * dim, scaled, false);
  std::fill_n(largest, group, kLowest);
  std::fill_n(sum, group, 0.0f);

  const size_t begin = shape.window > 0 && place + 1 > shape.window ? place + 1 - shape.window : 0;
  for (size_t key = begin; key <= place; key += kRowKeys) {
    const size_t n = std::min(kRowKeys, place + 1 - key);
    const Matrix<const float> k = run.keys(kv_head, dim, key, n), v = run.values(kv_head, dim, key, n);
    dot_product<float>(group, n, dim, {scaled, dim, 1}, {k.data, k.stride, 1}, scores);
    for (size_t h = 0; h < group; ++h) {
      float* s = scores + h * n;
      const float now = std::max(largest[h], kernel().largest(n, s)), factor = std::exp(largest[h] - now);
      sum[h] = sum[h] * factor + kernel().exp_sum(n, s, now, s);
      largest[h] = now;
      if (key > begin) kernel().scaled(dim, factor, out + h * dim, out + h * dim, false);
    }
    add_product<float>(group, dim, n, {scores, n, 1}, v.data, v.stride, out, dim, key > begin);
  }

  for (size_t h = 0; h < group; ++h) {
    kernel().scaled(dim, 1 / sum[h], out + h * dim, out + h * dim, false);
    if (to.lse.data) to.lse.row(row)[head + h] = largest[h] + std::log(sum[h]);
  }
}

// A share of a run: lanes of one key head, or all of it row by row.
struct Task {
  size_t run, kv_head, first_lane, end_lane;
};

void attend_runs(const AttentionShape& shape, const std::vector<Run>& runs, Matrix<const float> q,
                 const Outputs& to) {
  std::vector<Task> tasks;
  double operations = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const size_t lanes = runs[i].count * shape.group(), per_task = kTilesPerTask * kTileLanes;
    operations += 4.0 * double(runs[i].count) * double(runs[i].first_place + runs[i].count) *
                  double(shape.heads * shape.head_dim);
    for (size_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head)
      for (size_t end = lanes; end > 0;) {  // the last queries see most: they go first
        const size_t first = (end - 1) / per_task * per_task;
        tasks.push_back({i, kv_head, first, end});
        end = first;
      }
  }
  parallel_for(tasks.size(), useful_threads(operations), Interruptible::kYes, [&](size_t i) {
    const Task& task = tasks[i];
    const Run& run = runs[task.run];
    if (run.count * shape.group() < kFewestLanes)
      for (size_t query = 0; query < run.count; ++query) attend_row(shape, run, query, task.kv_head, q, to);
    else
      for (size_t lane = task.first_lane; lane < task.end_lane; lane += kTileLanes)
        attend({shape, run, task.kv_head, lane, task.end_lane}, q, to);
  });
}

}  // namespace

void attention(const AttentionShape& shape, Sequences sequences, Matrix<const float> q, Matrix<const float> k,
               Matrix<const float> v, Matrix<float> out, Matrix<float> lse) {
  std::vector<Run> runs;
  for (size_t i = 0; i < sequences.count; ++i) {
    const size_t row = size_t(sequences.starts[i]), count = size_t(sequences.starts[i + 1]) - row;
    if (count > 0) runs.push_back({row, count, 0, k.row(row), v.row(row), k.stride});
  }
  attend_runs(shape, runs, q, {out, lse});
}

void attention_cached(const AttentionShape& shape, Matrix<const float> q, KeyValueCache cache,
                      const int64_t* slots, const int64_t* lengths, Matrix<float> out) {
  const size_t stride = shape.kv_heads * shape.head_dim;
  std::vector<Run> runs;
  for (size_t i = 0; i < q.rows; ++i) {
    if (i > 0 && slots[i] == slots[i - 1] && lengths[i] == lengths[i - 1] + 1) {  // a piece of a prompt
      ++runs.back().count;
      continue;
    }
    const size_t at = size_t(slots[i]) * cache.capacity * stride;
    runs.push_back({i, 1, size_t(lengths[i]) - 1, cache.keys + at, cache.values + at, stride});
  }
  attend_runs(shape, runs, q, {out, {}});
}

}  // namespace nplora
