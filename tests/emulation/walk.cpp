// csrc/'s walks for processors that need not be here: AVX-512's vectors by whatever this one has, its product of bf16 and
// AMX's tile registers in software, as the manual describes the instructions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define EMULATED
#include "walk.h"

namespace {

thread_local uint8_t registers[8][16][64];
thread_local bool configured = false;

float widened(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void _tile_loadconfig(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  configured = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) configured &= bytes[16 + 2 * i] == 64 && bytes[48 + i] == 16;
}

void _tile_release() { configured = false; }

void _tile_zero(int tile) { std::memset(registers[tile], configured ? 0 : 0xFF, sizeof registers[tile]); }

void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(registers[tile][row], static_cast<const uint8_t*>(from) + row * stride, 64);
}

void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<uint8_t*>(to) + row * stride, registers[tile][row], 64);
}

float normal(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value; }

// Even and odd products are summed apart, then together, then onto c; denormals are zeros.
void _tile_dpbf16ps(int c, int a, int b) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float sum, sums[2] = {};
      std::memcpy(&sum, &registers[c][row][4 * column], sizeof sum);
      for (int pair = 0; pair < 16; ++pair) {
        uint16_t left[2], right[2];
        std::memcpy(left, &registers[a][row][4 * pair], sizeof left);
        std::memcpy(right, &registers[b][pair][4 * column], sizeof right);
        for (int i = 0; i < 2; ++i)
          sums[i] = normal(std::fma(normal(widened(left[i])), normal(widened(right[i])), sums[i]));
      }
      sum = normal(normal(sum) + normal(sums[0] + sums[1]));
      std::memcpy(&registers[c][row][4 * column], &sum, sizeof sum);
    }
  }
}

using __m512 = float __attribute__((vector_size(64)));
using __m512bh = uint32_t __attribute__((vector_size(64)));

// The odd product is added first; denormals are zeros.
__m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
  for (int lane = 0; lane < 16; ++lane) {
    for (int shift : {16, 0}) {
      const float left = normal(widened(a[lane] >> shift)), right = normal(widened(b[lane] >> shift));
      sums[lane] = normal(std::fma(left, right, normal(sums[lane])));
    }
  }
  return sums;
}

}  // namespace

namespace tuned_lens_fast {
namespace {

#define LANES 16
#define ROWS 12
namespace avx512 {
#include "online_softmax.inl"
#include "words.inl"
#include "singles.inl"
#include "squares.inl"
#include "fma.inl"
#include "walk.inl"
}  // namespace avx512
namespace avx512_bf16 {
#include "online_softmax.inl"
#include "words.inl"
#include "pairs.inl"
#include "squares.inl"
#include "dpbf16.inl"
#include "fma.inl"
#include "walk.inl"
}  // namespace avx512_bf16
namespace amx {
#include "online_softmax.inl"
#include "words.inl"
#include "pairs.inl"
#include "squares.inl"
#include "amx.inl"
#include "walk.inl"
}  // namespace amx

}  // namespace
}  // namespace tuned_lens_fast

// 0: AVX-512, 1: with bf16, 2: AMX.
extern "C" void walk(
    int64_t unit, const float* x, int64_t rows, int64_t d_model, int64_t x_stride, const void* w, int64_t kind,
    int64_t tokens, int64_t w_stride, const float* bias, float scale, float softcap, int64_t parts, int64_t most,
    float* z, int64_t z_stride, const int64_t* targets, const float* threshold, float* sums, int64_t* r, float* target,
    int64_t* top, int64_t k, float* u) {
  using namespace tuned_lens_fast;
  const Walk f{
      rows, d_model, tokens, x, x_stride, w, static_cast<Kind>(kind), w_stride, bias, scale, softcap, parts, most,
      2, z, z_stride, {targets, threshold, reinterpret_cast<Running*>(sums), r, target, top, k, nullptr, u, d_model}};
  const auto parallel = [](int64_t count, const auto& work) {  // as two threads would
    work(0, count / 2);
    work(count / 2, count);
  };
  if (unit == 0) avx512::walk(f, parallel);
  if (unit == 1) avx512_bf16::walk(f, parallel);
  if (unit == 2) amx::walk(f, parallel);
}
