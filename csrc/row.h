// What is known of one row of logits, and what one tile adds to it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

namespace tuned_lens_fast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kExpFloor = -1000.0f;  // exp of less is 0; keeps 0 * (-inf) out of t
constexpr float kLogFloor = -1e30f;    // stands for the logarithm of 0
constexpr int64_t kNoKey = std::numeric_limits<int64_t>::min();

// Ordered as (logit, lower id first), like top_keys in tuned_lens_fast/engines/state.py.
ON_BOTH inline int64_t key_of(float logit, int64_t id) {
  logit += 0.0f;  // -0.0 and 0.0 tie
  int32_t bits;
  std::memcpy(&bits, &logit, sizeof bits);
  const int32_t ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF);
  return (static_cast<int64_t>(ordered) << 32) | (0xFFFFFFFFll - id);
}

ON_BOTH inline float logit_of(int64_t key) {
  const int32_t ordered = static_cast<int32_t>(key >> 32);
  const int32_t bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF);
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

// A row's k best keys, in descending order.
struct TopK {
  int64_t* keys;
  int64_t k;

  bool full() const { return keys[k - 1] != kNoKey; }
  float worst() const { return full() ? logit_of(keys[k - 1]) : -kInfinity; }

  // Tokens come with rising ids, so of equal logits the one that came first stays ahead.
  void offer(const float* z, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; ++i) {
      if (full() && !(z[i] > logit_of(keys[k - 1]))) continue;
      const int64_t key = key_of(z[i], first + i);
      int64_t at = k - 1;
      for (; at > 0 && keys[at - 1] < key; --at) keys[at] = keys[at - 1];
      keys[at] = key;
    }
  }

  // Of other tokens, in descending order as well.
  void merge(const TopK& other) {
    for (int64_t i = 0; i < k && other.keys[i] > keys[k - 1]; ++i) {
      int64_t at = k - 1;
      for (; at > 0 && keys[at - 1] < other.keys[i]; --at) keys[at] = keys[at - 1];
      keys[at] = other.keys[i];
    }
  }
};

// What is kept of a row in memory: SUMS of tuned_lens_fast/engines/state.py.
struct Running {
  float m, s, t;
};
constexpr int64_t kRunning = sizeof(Running) / sizeof(float);

// A tile's sums relative to an origin, in lanes: a vector on CPUs, a float on GPUs.
template <typename Lanes>
struct TileSums {
  // The likeliest tokens' ones are counted apart: beside a 1, what is small would be rounded away term by term.
  Lanes s{}, ones{}, t{};

  // d = z - origin, no less than kExpFloor; e = exp(d).
  ON_BOTH void add(Lanes d, Lanes e) {
    s += d == 0.0f ? Lanes{} : e;
    ones += d == 0.0f ? Lanes{} + 1.0f : Lanes{};
    t += e * d;
  }

  ON_BOTH TileSums plus(const TileSums& other) const { return {s + other.s, ones + other.ones, t + other.t}; }

  template <typename Change>
  ON_BOTH auto each(Change change) const -> TileSums<decltype(change(s))> {
    return {change(s), change(ones), change(t)};
  }
};

// Puts a tile's sums, relative to `origin`, and its largest logit with a row's: exp(m before - origin).
ON_BOTH inline float fold(Running& row, const TileSums<float>& tile, float m, float origin) {
  const float fall = row.m - origin;
  const float shift = fall < kExpFloor ? kExpFloor : fall;
  const float rescale = expf(shift);
  row.t = rescale * (row.t + row.s * shift) + tile.t;
  row.s = rescale * row.s + (tile.s + tile.ones);
  row.m = m;
  return rescale;
}

// Two rows' parts of the vocabulary together.
inline void merge(Running& row, const Running& other) {
  const float m = other.m > row.m ? other.m : row.m;
  const float origin = m == -kInfinity ? 0.0f : m;
  Running moved = other;
  fold(moved, {}, m, origin);
  fold(row, {moved.s, 0.0f, moved.t}, m, origin);
}

// The divergences, in the order in which their sums lie in memory.
enum Divergence { kKl, kReverseKl, kJs, kTv, kDivergences };

struct Row {
  float* z;
  int64_t width;
  int64_t first;    // id of the tile's first token
  float threshold;  // what `larger` counts against
  TopK top;         // k = 0: not wanted
  bool keep;        // leave exp(z - m) in z
  Running* sums;    // in: those so far; out: with this tile
  int64_t larger;   // out: tokens of this tile above the threshold
  float rescale;    // out: exp(m before - m now)
};

// What a pass knows of rows and finds out of them, each a value or a row of values for every row; null: not wanted.
struct Found {
  const int64_t* targets;
  const float* threshold;  // null: a tile's own target's logit
  Running* sums;
  int64_t* r;
  float* target;
  int64_t* top;
  int64_t k;
  float* rescale;
  float* u = nullptr;  // [rows, u_width], sum exp(z - m) W
  int64_t u_width = 0;

  TopK top_of(int64_t i) const { return {top + i * k, k}; }

  // A row's logits of the tokens from `first` on.
  template <typename AddTile>
  void add(int64_t i, float* z, int64_t width, int64_t first, AddTile add_tile) const {
    const int64_t column = targets ? targets[i] - first : -1;
    const bool met = column >= 0 && column < width;
    const float own = met ? z[column] : -kInfinity;
    const float bound = !r ? kInfinity : threshold ? threshold[i] : own;
    Row row{z, width, first, bound, top_of(i), rescale != nullptr, sums + i, 0, 0};
    add_tile(row);
    if (r) r[i] += row.larger - (met && own > bound);
    if (target && met) target[i] = own;
    if (rescale) rescale[i] = row.rescale;
  }

  void clear(int64_t i) const {
    sums[i] = {-kInfinity, 0.0f, 0.0f};
    if (r) r[i] = 0;
    if (target) target[i] = -kInfinity;
    for (int64_t j = 0; j < k; ++j) top_of(i).keys[j] = kNoKey;
    for (int64_t j = 0; u && j < u_width; ++j) u[i * u_width + j] = 0.0f;
  }

  // What was found of the same row in another part of the vocabulary.
  void merge(int64_t i, const Found& other) const {
    if (u) {
      const float m = fmaxf(sums[i].m, other.sums[i].m), origin = m == -kInfinity ? 0.0f : m;
      const float own = expf(sums[i].m - origin), others = expf(other.sums[i].m - origin);
      for (int64_t j = i * u_width; j < (i + 1) * u_width; ++j) u[j] = own * u[j] + others * other.u[j];
    }
    tuned_lens_fast::merge(sums[i], other.sums[i]);
    if (r) r[i] += other.r[i];
    if (target && other.target[i] > target[i]) target[i] = other.target[i];
    if (k) top_of(i).merge(other.top_of(i));
  }
};

struct Pair {
  const float* z_p;
  const float* z_q;
  int64_t width;
  float m_p, log_s_p, m_q, log_s_q;
  float sums[kDivergences];  // out: this tile's share
};

}  // namespace tuned_lens_fast
