// The statistics of one tile of logits, taken in one pass while the tile is in cache.
//
// `tile_pass` adds a tile to every row's running state (see tuned_lens_fast/engines/state.py, which defines it):
//
//   m = max z   s = sum exp(z - m)   t = sum exp(z - m) (z - m)   r = #{z > threshold}   the target's z   top k keys
//
// `tile_divergences` adds a tile's share of the divergences between two distributions whose normalisers are known.
//
// Rows are shared out among PyTorch's threads. Only PyTorch's stable ABI is used, so that one build serves all its
// versions from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstring>
#include <optional>

#include "operands.h"
#include "processor.h"

namespace tuned_lens_fast {
namespace {

// One copy of the arithmetic for each instruction set; the best that the processor has is chosen once.
namespace plain {
#define LANES 4
#include "online_softmax.inl"
#include "divergences.inl"
#undef LANES
}  // namespace plain
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MANY_PROCESSORS
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
namespace avx2 {
#define LANES 8
#include "online_softmax.inl"
#include "divergences.inl"
#undef LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
namespace avx512 {
#define LANES 16
#include "online_softmax.inl"
#include "divergences.inl"
#undef LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

struct Processor {
  const char* name;
  void (*add_tile)(Row&);
  void (*compare)(Pair&, bool);
};

Processor best() {
#ifdef MANY_PROCESSORS
  if (may_use(Instructions::kAvx512)) return {"avx512", avx512::add_tile, avx512::compare};
  if (may_use(Instructions::kAvx2)) return {"avx2", avx2::add_tile, avx2::compare};
#endif
  return {"plain", plain::add_tile, plain::compare};
}

const Processor& processor() {
  static const Processor chosen = best();
  return chosen;
}

// z [rows, width] fp32, its columns side by side; see the schema below for the rest.
void tile_pass(
    Tensor z, int64_t first, std::optional<Tensor> targets, std::optional<Tensor> threshold, Tensor sums,
    std::optional<Tensor> r, std::optional<Tensor> target, std::optional<Tensor> top, std::optional<Tensor> rescale) {
  const int64_t rows = z.size(0), width = z.size(1), stride = z.stride(0);
  check_pass(z, sums, targets, threshold, r, target, top, rescale);
  float* const logits = z.mutable_data_ptr<float>();
  const Found found{
      read<int64_t>(targets), read<float>(threshold), reinterpret_cast<Running*>(sums.mutable_data_ptr<float>()),
      written<int64_t>(r), written<float>(target), written<int64_t>(top), top ? top->size(1) : 0,
      written<float>(rescale)};
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) found.add(i, logits + i * stride, width, first, processor().add_tile);
  });
}

void tile_divergences(
    Tensor z_p, Tensor z_q, Tensor normaliser_p, Tensor normaliser_q, bool with_js, Tensor sums) {
  const int64_t positions = z_p.size(0), rows = z_q.size(0);
  const int64_t stride_p = z_p.stride(0), stride_q = z_q.stride(0);
  check_divergences(z_p, z_q, normaliser_p, normaliser_q, sums);
  const float* const p = z_p.const_data_ptr<float>();
  const float* const q = z_q.const_data_ptr<float>();
  const float* const n_p = normaliser_p.const_data_ptr<float>();
  const float* const n_q = normaliser_q.const_data_ptr<float>();
  float* const totals = sums.mutable_data_ptr<float>();

  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % positions;
      Pair pair{p + at * stride_p, q + i * stride_q, z_q.size(1), n_p[at], n_p[positions + at], n_q[i], n_q[rows + i],
                {}};
      processor().compare(pair, with_js);
      for (int64_t each = 0; each < kDivergences; ++each) totals[each * rows + i] += pair.sums[each];
    }
  });
}

}  // namespace
}  // namespace tuned_lens_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tuned_lens_fast, library) {
  library.def(
      "tile_pass(Tensor(a!) z, int first, Tensor? targets, Tensor? threshold, Tensor(b!) sums, Tensor(c!)? r, "
      "Tensor(d!)? target, Tensor(e!)? top, Tensor(f!)? rescale) -> ()");
  library.def(
      "tile_divergences(Tensor z_p, Tensor z_q, Tensor normaliser_p, Tensor normaliser_q, bool with_js, "
      "Tensor(a!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CPU, library) {
  library.impl("tile_pass", TORCH_BOX(&tuned_lens_fast::tile_pass));
  library.impl("tile_divergences", TORCH_BOX(&tuned_lens_fast::tile_divergences));
}
