// A tile's logits: on processors with AMX, whose bf16 products are so fast that fp32 is best taken as several of them;
// on those with AVX2 and nothing wider, from weights of any dtype. `has_amx` and `has_fma` say where; elsewhere the
// engine leaves products to PyTorch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "matmul.h"
#include "processor.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define OWN_PRODUCTS
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tuned_lens_fast {
namespace {

#ifdef OWN_PRODUCTS
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace fma {
#include "fma.inl"
}  // namespace fma
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace amx {
#include "amx.inl"
}  // namespace amx
#pragma GCC pop_options

// Where wider units may be used, PyTorch's product uses them.
bool find_fma() {
  return may_use(Instructions::kAvx2) && !may_use(Instructions::kAvx512) && __builtin_cpu_supports("f16c");
}

// The processor has it, and the system lets this process use its registers.
bool find_amx() {
  if (!may_use(Instructions::kAmx)) return false;
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, since Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
namespace amx {
template <typename Weight>
void matmul(const AmxOperands<Weight>&, int64_t, int64_t) {}
}  // namespace amx
namespace fma {
template <typename Weight>
void matmul(const FmaOperands<Weight>&, int64_t, int64_t) {}
}  // namespace fma

bool find_fma() { return false; }
bool find_amx() { return false; }
#endif

bool has_fma() {
  static const bool found = find_fma();
  return found;
}

bool has_amx() {
  static const bool found = find_amx();
  return found;
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Weight>
void run(const Tensor& x, const Tensor& weight, int64_t most, Tensor& z) {
  const AmxOperands<Weight> operands{
      static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0),     x.stride(1), x.size(0), most, z.size(0),
      static_cast<const Weight*>(weight.const_data_ptr()), weight.stride(0), z.size(1), weight.size(1),
      z.mutable_data_ptr<float>(), z.stride(0)};
  torch::stable::parallel_for(0, (z.size(1) + 31) / 32, 1, [&](int64_t begin, int64_t end) {
    amx::matmul(operands, begin, end);
  });
}

// x [parts, rows, d_model] in bf16 with zeros up to multiples of 32; weight [width, d_model]; z [rows or fewer, width].
void amx_matmul(Tensor x, Tensor weight, int64_t most, Tensor z) {
  STD_TORCH_CHECK(has_amx(), "amx_matmul: this processor, or its system, has no AMX");
  STD_TORCH_CHECK(
      x.dim() == 3 && x.is_contiguous() && x.scalar_type() == ScalarType::BFloat16 && x.size(1) % 32 == 0 &&
          x.size(2) % 32 == 0,
      "amx_matmul: x has to be contiguous bf16 [parts, rows, d_model], padded to multiples of 32");
  STD_TORCH_CHECK(
      weight.dim() == 2 && z.dim() == 2 && (weight.size(1) < 2 || weight.stride(1) == 1) &&
          (z.size(1) < 2 || z.stride(1) == 1) && weight.size(0) == z.size(1) && z.size(0) <= x.size(1) &&
          weight.size(1) <= x.size(2) && x.size(2) - weight.size(1) < 32,
      "amx_matmul: weight has to be [width, d_model] and z [rows, width], each row contiguous");
  const bool split = weight.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(
      split || (x.size(0) == 1 && weight.scalar_type() == ScalarType::BFloat16),
      "amx_matmul: weight has to be fp32, or bf16 for one part of x");
  split ? run<float>(x, weight, most, z) : run<uint16_t>(x, weight, most, z);
}

template <typename Weight>
void run(const Tensor& x, const Tensor& weight, Tensor& z) {
  const int64_t rows = z.size(0), width = z.size(1), panels = (width + 15) / 16, packs = x.size(0);
  // Threads share the tokens; where there are more of them than panels of W, the rows as well.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = panels ? (threads + panels - 1) / panels : 1;
  const int64_t groups = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, packs));
  const int64_t each = (packs + groups - 1) / groups;
  const FmaOperands<Weight> operands{
      x.const_data_ptr<float>(), rows, static_cast<const Weight*>(weight.const_data_ptr()), weight.stride(0), width,
      weight.size(1), z.mutable_data_ptr<float>(), z.stride(0), each * kPackedRows};
  const int64_t shares = each ? (packs + each - 1) / each * panels : 0;
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) { fma::matmul(operands, begin, end); });
}

// x fp32 [packs, d_model, 6], the rows of a pack side by side, with zeros for those there are not; weight
// [width, d_model] in fp32, bf16 or fp16; z [rows, width].
void fma_matmul(Tensor x, Tensor weight, Tensor z) {
  STD_TORCH_CHECK(has_fma(), "fma_matmul: it is for processors with AVX2 and nothing wider");
  STD_TORCH_CHECK(
      x.dim() == 3 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(2) == kPackedRows,
      "fma_matmul: x has to be contiguous fp32 [packs, d_model, 6]");
  STD_TORCH_CHECK(
      weight.dim() == 2 && z.dim() == 2 && (weight.size(1) < 2 || weight.stride(1) == 1) &&
          (z.size(1) < 2 || z.stride(1) == 1) && weight.size(0) == z.size(1) && weight.size(1) == x.size(1) &&
          (z.size(0) + kPackedRows - 1) / kPackedRows == x.size(0),
      "fma_matmul: weight has to be [width, d_model] and z [rows, width], each row contiguous");
  switch (weight.scalar_type()) {
    case ScalarType::Float: return run<float>(x, weight, z);
    case ScalarType::BFloat16: return run<Bf16>(x, weight, z);
    case ScalarType::Half: return run<Half>(x, weight, z);
    default: STD_TORCH_CHECK(false, "fma_matmul: weight has to be fp32, bf16 or fp16");
  }
}

}  // namespace
}  // namespace tuned_lens_fast

STABLE_TORCH_LIBRARY_FRAGMENT(tuned_lens_fast, library) {
  library.def("has_fma() -> bool");
  library.def("fma_matmul(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  library.def("has_amx() -> bool");
  library.def("amx_matmul(Tensor x, Tensor weight, int most, Tensor(a!) z) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CompositeExplicitAutograd, library) {
  library.impl("has_fma", TORCH_BOX(&tuned_lens_fast::has_fma));
  library.impl("has_amx", TORCH_BOX(&tuned_lens_fast::has_amx));
}

STABLE_TORCH_LIBRARY_IMPL(tuned_lens_fast, CPU, library) {
  library.impl("fma_matmul", TORCH_BOX(&tuned_lens_fast::fma_matmul));
  library.impl("amx_matmul", TORCH_BOX(&tuned_lens_fast::amx_matmul));
}
