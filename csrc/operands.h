// What the operators on tiles ask of their operands, on CPUs and on GPUs.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "row.h"

namespace tuned_lens_fast {

using torch::stable::Tensor;

// Whether it can be read as one value for each of `count` rows.
inline bool by_row(const Tensor& tensor, int64_t count) { return tensor.size(0) == count && tensor.is_contiguous(); }
inline bool by_row(const std::optional<Tensor>& tensor, int64_t count) { return !tensor || by_row(*tensor, count); }

inline bool is_tile(const Tensor& z) { return z.dim() == 2 && (z.size(1) < 2 || z.stride(1) == 1); }

// The memory of an operand that may be left out.
template <typename T>
T* written(std::optional<Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr<T>() : nullptr;
}
template <typename T>
const T* read(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// z [rows, width] fp32, its columns side by side; all else a value or a row of values for each of its rows.
template <typename... Others>
void check_pass(const Tensor& z, const Tensor& sums, const Others&... others) {
  STD_TORCH_CHECK(is_tile(z), "tile_pass: z has to be [rows, width], each row contiguous");
  STD_TORCH_CHECK(
      sums.dim() == 2 && sums.size(1) == kRunning && by_row(sums, z.size(0)), "tile_pass: sums has to be [rows, ",
      kRunning, "], contiguous");
  STD_TORCH_CHECK(
      (by_row(others, z.size(0)) && ...), "tile_pass: all but z have to be contiguous, a value for each of its rows");
}

// z_p [positions, width], z_q [layers * positions, width]; a normaliser [2, rows of z] holds m and log s.
inline void check_divergences(
    const Tensor& z_p, const Tensor& z_q, const Tensor& normaliser_p, const Tensor& normaliser_q, const Tensor& sums) {
  const auto is_normaliser = [](const Tensor& tensor, int64_t rows) {
    return tensor.dim() == 2 && tensor.size(0) == 2 && tensor.size(1) == rows && tensor.is_contiguous();
  };
  const int64_t positions = z_p.size(0), rows = z_q.size(0);
  STD_TORCH_CHECK(
      is_tile(z_p) && is_tile(z_q) && z_p.size(1) == z_q.size(1) && positions && rows % positions == 0,
      "tile_divergences: z_q has to be [layers * positions, width] and z_p [positions, width], each row contiguous");
  STD_TORCH_CHECK(
      is_normaliser(normaliser_p, positions) && is_normaliser(normaliser_q, rows),
      "tile_divergences: a normaliser has to be [2, rows], contiguous");
  STD_TORCH_CHECK(
      sums.dim() == 2 && sums.size(0) == kDivergences && sums.size(1) == rows && sums.is_contiguous(),
      "tile_divergences: sums has to be [", static_cast<int64_t>(kDivergences), ", rows], contiguous");
}

}  // namespace tuned_lens_fast
