// The operators of tile.cpp for tiles in a GPU's memory: the same schemas, another dispatch key.

#ifndef USE_CUDA
#define USE_CUDA  // the current stream is among what PyTorch's headers declare only then
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "operands.h"
#include "tile_kernels.cuh"

namespace tuned_lens_fast {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

void tile_pass(
    Tensor z, int64_t first, std::optional<Tensor> targets, std::optional<Tensor> threshold, Tensor sums,
    std::optional<Tensor> r, std::optional<Tensor> target, std::optional<Tensor> top, std::optional<Tensor> rescale) {
  check_pass(z, sums, targets, threshold, r, target, top, rescale);
  const int64_t rows = z.size(0), width = z.size(1), k = top ? top->size(1) : 0;
  STD_TORCH_CHECK(k <= kMostTop, "tile_pass: top has room for ", k, " keys a row, wanted at most ", kMostTop);
  STD_TORCH_CHECK(
      !rescale || width <= kStretch, "tile_pass: z is ", width, " wide, wanted at most ", kStretch, " with rescale");
  if (!rows || !width) return;
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  add_tile<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(z)>>>(
      {z.mutable_data_ptr<float>(), z.stride(0), width, first, read<int64_t>(targets), read<float>(threshold),
       reinterpret_cast<Running*>(sums.mutable_data_ptr<float>()), written<int64_t>(r), written<float>(target),
       k ? written<int64_t>(top) : nullptr, static_cast<int>(k), written<float>(rescale)});
  check_launch("tile_pass");
}

void tile_divergences(Tensor z_p, Tensor z_q, Tensor normaliser_p, Tensor normaliser_q, bool, Tensor sums) {
  check_divergences(z_p, z_q, normaliser_p, normaliser_q, sums);
  const int64_t rows = z_q.size(0);
  if (!rows || !z_q.size(1)) return;
  const torch::stable::accelerator::DeviceGuard guard(z_q.get_device_index());
  compare_tiles<<<static_cast<unsigned>(rows), kThreads, 0, current_stream(z_q)>>>(
      {z_p.const_data_ptr<float>(), z_q.const_data_ptr<float>(), z_p.stride(0), z_q.stride(0), z_q.size(1),
       z_p.size(0), normaliser_p.const_data_ptr<float>(), normaliser_q.const_data_ptr<float>(),
       sums.mutable_data_ptr<float>()});
  check_launch("tile_divergences");
}

// Whether the library was compiled for the GPU of that number, or can be as it is loaded.
bool runs_on_gpu(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, add_tile) == cudaSuccess;
  cudaGetLastError();  // an error that has been seen
  return found;
}

}  // namespace
}  // namespace tuned_lens_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tuned_lens_fast, library) { library.def("runs_on_gpu(int device) -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CompositeExplicitAutograd, library) {
  library.impl("runs_on_gpu", TORCH_BOX(&tuned_lens_fast::runs_on_gpu));
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CUDA, library) {
  library.impl("tile_pass", TORCH_BOX(&tuned_lens_fast::tile_pass));
  library.impl("tile_divergences", TORCH_BOX(&tuned_lens_fast::tile_divergences));
}
