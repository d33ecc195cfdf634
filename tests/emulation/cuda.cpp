// csrc/tile_kernels.cuh on a CPU: a thread of the system for each thread of a block, one block after another.

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

namespace {

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx, gridDim;

constexpr int kBlockSize = 128;
std::barrier<> together(kBlockSize);
int64_t exchanged[kBlockSize];

void __syncthreads() { together.arrive_and_wait(); }

bool __syncthreads_or(bool mine) {
  exchanged[threadIdx.x] = mine;
  __syncthreads();
  bool any = false;
  for (int64_t one : exchanged) any |= one != 0;
  __syncthreads();
  return any;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  std::memcpy(&exchanged[threadIdx.x], &value, sizeof value);
  __syncthreads();
  T other;
  std::memcpy(&other, &exchanged[threadIdx.x ^ lanes], sizeof other);
  __syncthreads();
  return other;
}

void run(int64_t blocks, const std::function<void()>& kernel) {
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kBlockSize; ++i) {
    threads.emplace_back([=, &kernel] {
      threadIdx.x = i;
      for (int64_t block = 0; block < blocks; ++block) {
        blockIdx.x = static_cast<unsigned>(block);
        gridDim.x = static_cast<unsigned>(blocks);
        kernel();
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

#include "tile_kernels.cuh"

using namespace tuned_lens_fast;
static_assert(kThreads == kBlockSize);

extern "C" void tile_pass(
    float* z, int64_t rows, int64_t stride, int64_t width, int64_t first, const int64_t* targets,
    const float* threshold, float* sums, int64_t* r, float* target, int64_t* top, int64_t k, float* rescale) {
  const TileArguments arguments{
      z, stride, width,  first, targets,              threshold, reinterpret_cast<Running*>(sums),
      r, target, top, static_cast<int>(k), rescale};
  run(rows, [&] { add_tile(arguments); });
}

extern "C" void tile_divergences(
    const float* z_p, const float* z_q, int64_t stride_p, int64_t stride_q, int64_t width, int64_t positions,
    int64_t rows, const float* normaliser_p, const float* normaliser_q, float* sums) {
  const PairArguments arguments{z_p, z_q, stride_p, stride_q, width, positions, normaliser_p, normaliser_q, sums};
  run(rows, [&] { compare_tiles(arguments); });
}
