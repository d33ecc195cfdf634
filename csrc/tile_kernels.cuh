// The passes of tile.cpp over a tile in a GPU's memory: a block of threads for each row.
//
// Nothing here but what CUDA itself offers, and little of it, so that a test can run the kernels on a CPU.
#pragma once

#include <cstdint>

#include "row.h"

namespace tuned_lens_fast {

constexpr int kThreads = 128;
constexpr int kBlocks = 7;  // on a multiprocessor at once
constexpr int kWarp = 32;
constexpr int kHeld = 32;                    // logits that a thread holds in registers at once
constexpr int kStretch = kThreads * kHeld;   // and a block
constexpr int kMostTop = 64;                 // keys of a row kept in the pass
constexpr int64_t kMostKey = std::numeric_limits<int64_t>::max();

struct TileArguments {
  float* z;
  int64_t stride, width, first;
  const int64_t* targets;   // or null, as all below but sums
  const float* threshold;
  Running* sums;
  int64_t* larger;
  float* target;
  int64_t* top;
  int k;
  float* rescale;  // with it, exp(z - m) stays in z, and width is at most kStretch
};

struct PairArguments {
  const float *z_p, *z_q;
  int64_t stride_p, stride_q, width, positions;
  const float *normaliser_p, *normaliser_q;  // [2, positions], [2, rows]: m and log s
  float* sums;                               // [kDivergences, rows]
};

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {
  template <typename T>
  __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// `value` of all threads of the block taken together, the same bits in each; `room` for kThreads / kWarp values.
template <typename T, typename Together>
__device__ T across_block(T value, Together together, T* room) {
  for (int apart = kWarp / 2; apart; apart /= 2) value = together(value, __shfl_xor_sync(~0u, value, apart));
  __syncthreads();  // whoever still reads the last call's
  if (threadIdx.x % kWarp == 0) room[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = room[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = together(value, room[warp]);
  return value;
}

// Puts a key in its place among the k best, which are in descending order.
__device__ inline void insert(int64_t* best, int k, int64_t key) {
  int at = k - 1;
  for (; at > 0 && best[at - 1] < key; --at) best[at] = best[at - 1];
  best[at] = key;
}

// Of this block's stretch of logits, those that belong to the k best, the largest first.
__device__ inline void offer(
    const float (&held)[kHeld], int64_t first, int64_t left, int64_t* best, int k, int64_t* room) {
  int64_t worst = best[k - 1];
  bool better = false;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const bool exists = threadIdx.x + i * kThreads < left;
    better |= exists && (worst == kNoKey || held[i] > logit_of(worst));
  }
  if (!__syncthreads_or(better)) return;
  int64_t last = kMostKey;
  for (int taken = 0; taken < k; ++taken) {
    int64_t most = kNoKey;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t column = threadIdx.x + i * kThreads;
      if (column >= left) continue;
      const int64_t key = key_of(held[i], first + column);
      if (key < last && key > most) most = key;
    }
    last = across_block(most, Largest(), room);
    if (last <= worst) return;
    if (threadIdx.x == 0) insert(best, k, last);
    __syncthreads();
    worst = best[k - 1];
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks) add_tile(TileArguments a) {
  __shared__ float room[kThreads / kWarp];
  __shared__ int64_t key_room[kThreads / kWarp];
  __shared__ int64_t best[kMostTop];
  const int64_t row = blockIdx.x;
  float* const z = a.z + row * a.stride;
  const int64_t column = a.targets ? a.targets[row] - a.first : -1;
  const bool met = column >= 0 && column < a.width;
  const float found = met ? z[column] : -kInfinity;
  const float bound = !a.larger ? kInfinity : a.threshold ? a.threshold[row] : found;
  if (a.top && threadIdx.x < a.k) best[threadIdx.x] = a.top[row * a.k + threadIdx.x];
  Running sums = a.sums[row];
  float rescale = 1;
  float larger = 0;  // of a tile, far below 2^24
  __syncthreads();  // all have read what others will write

  for (int64_t start = 0; start < a.width; start += kStretch) {
    const int64_t left = a.width - start;
    float held[kHeld];
    float most = -kInfinity;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int64_t at = threadIdx.x + i * kThreads;
      held[i] = at < left ? z[start + at] : -kInfinity;
      most = held[i] > most ? held[i] : most;
      larger += held[i] > bound;
    }
    if (a.top) offer(held, a.first + start, left, best, a.k, key_room);
    const float m = Largest()(sums.m, across_block(most, Largest(), room));
    const float origin = m == -kInfinity ? 0.0f : m;
    TileSums<float> mine;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      float d = held[i] - origin;
      d = d < kExpFloor ? kExpFloor : d;
      const float e = expf(d);
      mine.add(d, e);
      const int64_t at = threadIdx.x + i * kThreads;
      if (a.rescale && at < left) z[start + at] = e;
    }
    rescale = fold(sums, mine.each([&](float value) { return across_block(value, Sum(), room); }), m, origin);
  }

  larger = across_block(larger, Sum(), room);
  if (a.top && threadIdx.x < a.k) a.top[row * a.k + threadIdx.x] = best[threadIdx.x];
  if (threadIdx.x) return;
  a.sums[row] = sums;
  if (a.larger) a.larger[row] += static_cast<int64_t>(larger) - (met && found > bound);
  if (a.target && met) a.target[row] = found;
  if (a.rescale) a.rescale[row] = rescale;
}

__global__ void __launch_bounds__(kThreads, kBlocks) compare_tiles(PairArguments a) {
  __shared__ float room[kThreads / kWarp];
  const int64_t row = blockIdx.x, position = row % a.positions;
  const float* const z_p = a.z_p + position * a.stride_p;
  const float* const z_q = a.z_q + row * a.stride_q;
  const int64_t rows = gridDim.x;
  const float m_p = a.normaliser_p[position], log_s_p = a.normaliser_p[a.positions + position];
  const float m_q = a.normaliser_q[row], log_s_q = a.normaliser_q[rows + row];
  float kl = 0, reverse_kl = 0, js = 0, tv = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) {
    float log_p = (z_p[i] - m_p) - log_s_p, log_q = (z_q[i] - m_q) - log_s_q;
    log_p = log_p < kLogFloor ? kLogFloor : log_p;
    log_q = log_q < kLogFloor ? kLogFloor : log_q;
    const float p = expf(log_p), q = expf(log_q), d = log_p - log_q;
    kl += p * d;
    reverse_kl -= q * d;
    tv += fabsf(p - q);
    // With the larger of the two logarithms taken out, log((p + q) / 2) is a log1p.
    const float beside = log1pf(expf(-fabsf(d))) - 0.69314718f;
    js += p * ((d > 0 ? 0.0f : d) - beside) + q * ((d > 0 ? -d : 0.0f) - beside);
  }
  kl = across_block(kl, Sum(), room);
  reverse_kl = across_block(reverse_kl, Sum(), room);
  js = across_block(js, Sum(), room);
  tv = across_block(tv, Sum(), room);
  if (threadIdx.x) return;
  const float found[kDivergences] = {kl, reverse_kl, 0.5f * js, 0.5f * tv};
  for (int each = 0; each < kDivergences; ++each) a.sums[each * rows + row] += found[each];
}

}  // namespace tuned_lens_fast
