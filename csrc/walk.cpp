// Logits x W^T and what a vocabulary pass finds in them, on the widest unit for products that the processor has:
// AMX, AVX-512 or AVX2. Elsewhere `product_unit` is "plain", and the engine leaves products to PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "operands.h"
#include "processor.h"
#include "walk.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define LEAVES
#include <immintrin.h>
#endif

namespace tuned_lens_fast {
namespace {

#ifdef LEAVES
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#define LANES 8
#define ROWS 6
namespace avx2 {
#include "online_softmax.inl"
#include "words.inl"
#include "singles.inl"
#include "squares.inl"
#include "fma.inl"
#include "walk.inl"
}  // namespace avx2
#undef LANES
#undef ROWS
#pragma GCC pop_options

#define LANES 16
#define ROWS 12
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
namespace avx512 {
#include "online_softmax.inl"
#include "words.inl"
#include "singles.inl"
#include "squares.inl"
#include "fma.inl"
#include "walk.inl"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
namespace avx512_bf16 {
#include "online_softmax.inl"
#include "words.inl"
#include "pairs.inl"
#include "squares.inl"
#include "dpbf16.inl"
#include "fma.inl"
#include "walk.inl"
}  // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
namespace amx {
#include "online_softmax.inl"
#include "words.inl"
#include "pairs.inl"
#include "squares.inl"
#include "amx.inl"
#include "walk.inl"
}  // namespace amx
#pragma GCC pop_options
#undef LANES
#undef ROWS
#endif

Instructions find_unit() {
#ifdef LEAVES
  using enum Instructions;
  for (const Instructions set : {kAmx, kAvx512Bf16, kAvx512, kAvx2})
    if (may_use(set)) return set;
#endif
  return Instructions::kPlain;
}

Instructions unit() {
  static const Instructions found = find_unit();
  return found;
}

// Its number among UNITS of tuned_lens_fast/engines/native.py. Not its name: PyTorch's stable ABI leaks strings.
int64_t product_unit() { return static_cast<int64_t>(unit()); }

// `parts` 0: no product of bf16 parts is to be taken for fp32.
void run(const Walk& f) {
#ifdef LEAVES
  const auto parallel = [](int64_t count, const auto& work) { torch::stable::parallel_for(0, count, 1, work); };
  const bool is_bf16 = f.kind == Kind::kBf16;
  Walk whole = f;
  whole.parts = 1, whole.most = 0;
  if (unit() == Instructions::kAmx && f.parts) return amx::walk(f, parallel);
  if (unit() == Instructions::kAvx512Bf16 && is_bf16) return avx512_bf16::walk(whole, parallel);
  if (unit() >= Instructions::kAvx512) return avx512::walk(whole, parallel);
  if (unit() == Instructions::kAvx2) return avx2::walk(whole, parallel);
#endif
  STD_TORCH_CHECK(false, "there is no unit for products here");
}

using torch::headeronly::ScalarType;

bool has_rows(const Tensor& tensor, int64_t width) {
  return tensor.dim() == 2 && tensor.size(1) == width && (width < 2 || tensor.stride(1) == 1);
}

// x [rows, d_model] fp32, weight [tokens, d_model] fp32, bf16 or fp16, bias [tokens] fp32.
Walk walk_of(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double scale, double softcap,
    int64_t parts, int64_t most) {
  STD_TORCH_CHECK(x.dim() == 2 && has_rows(x, x.size(1)), "x has to be fp32 [rows, d_model], each row contiguous");
  STD_TORCH_CHECK(has_rows(weight, x.size(1)), "weight has to be [tokens, d_model], each row contiguous");
  STD_TORCH_CHECK(!bias || by_row(*bias, weight.size(0)), "bias has to be fp32 [tokens], contiguous");
  Kind kind = Kind::kFloat;
  switch (weight.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::BFloat16: kind = Kind::kBf16; break;
    case ScalarType::Half: kind = Kind::kHalf; break;
    default: STD_TORCH_CHECK(false, "weight has to be fp32, bf16 or fp16");
  }
  return {
      x.size(0), x.size(1), weight.size(0), x.const_data_ptr<float>(), x.stride(0), weight.const_data_ptr(), kind,
      weight.stride(0), read<float>(bias), static_cast<float>(scale), static_cast<float>(softcap), parts, most,
      torch::stable::get_num_threads(), nullptr, 0, {}};
}

// z [rows, tokens] fp32.
void logits(
    Tensor x, Tensor weight, std::optional<Tensor> bias, double scale, double softcap, int64_t parts, int64_t most,
    Tensor z) {
  Walk f = walk_of(x, weight, bias, scale, softcap, parts, most);
  STD_TORCH_CHECK(has_rows(z, f.tokens) && z.size(0) == f.rows, "z has to be fp32 [rows, tokens], each row contiguous");
  f.z = z.mutable_data_ptr<float>();
  f.z_stride = z.stride(0);
  run(f);
}

void vocabulary_walk(
    Tensor x, Tensor weight, std::optional<Tensor> bias, double scale, double softcap, int64_t parts, int64_t most,
    std::optional<Tensor> targets, std::optional<Tensor> threshold, Tensor sums, std::optional<Tensor> r,
    std::optional<Tensor> target, std::optional<Tensor> top, std::optional<Tensor> u) {
  Walk f = walk_of(x, weight, bias, scale, softcap, parts, most);
  const int64_t rows = f.rows;
  STD_TORCH_CHECK(
      has_rows(sums, kRunning) && by_row(sums, rows), "sums has to be fp32 [rows, ", kRunning, "], contiguous");
  STD_TORCH_CHECK(
      by_row(targets, rows) && by_row(threshold, rows) && by_row(r, rows) && by_row(target, rows) && by_row(top, rows),
      "targets, threshold, r, target and top have to be contiguous, a value for each of x's rows");
  STD_TORCH_CHECK(
      !u || (has_rows(*u, f.d_model) && by_row(*u, rows)), "u has to be fp32 [rows, d_model], contiguous");
  STD_TORCH_CHECK(!r || threshold, "threshold: wanted, for r counts against it");
  f.found = {
      read<int64_t>(targets), read<float>(threshold), reinterpret_cast<Running*>(sums.mutable_data_ptr<float>()),
      written<int64_t>(r), written<float>(target), written<int64_t>(top),
      top ? top->size(1) : 0, nullptr, written<float>(u), f.d_model};
  run(f);
}

}  // namespace
}  // namespace tuned_lens_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tuned_lens_fast, library) {
  library.def("product_unit() -> int");
  library.def(
      "logits(Tensor x, Tensor weight, Tensor? bias, float scale, float softcap, int parts, int most, Tensor(a!) z) "
      "-> ()");
  library.def(
      "vocabulary_walk(Tensor x, Tensor weight, Tensor? bias, float scale, float softcap, int parts, int most, "
      "Tensor? targets, Tensor? threshold, Tensor(a!) sums, Tensor(b!)? r, Tensor(c!)? target, Tensor(d!)? top, "
      "Tensor(e!)? u) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CompositeExplicitAutograd, library) {
  library.impl("product_unit", TORCH_BOX(&tuned_lens_fast::product_unit));
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CPU, library) {
  library.impl("logits", TORCH_BOX(&tuned_lens_fast::logits));
  library.impl("vocabulary_walk", TORCH_BOX(&tuned_lens_fast::vocabulary_walk));
}
