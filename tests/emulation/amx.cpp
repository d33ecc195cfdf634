// csrc/amx.inl with AMX's tile registers in software, as the manual describes the instructions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matmul.h"

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

using namespace tuned_lens_fast;
#include "amx.inl"

}  // namespace

extern "C" void amx_matmul(
    const uint16_t* x, int64_t x_apart, int64_t x_stride, int64_t parts, int64_t most, int64_t rows, const void* w,
    int64_t width, int64_t d_model, int64_t w_stride, bool split, float* z, int64_t z_stride) {
  auto run = [&](auto* weight) {
    const AmxOperands<std::remove_cvref_t<decltype(*weight)>> operands{
        {rows, weight, w_stride, width, d_model, z, z_stride}, x, x_apart, x_stride, parts, most};
    const int64_t blocks = (width + 31) / 32;
    matmul(operands, 0, blocks / 2);  // as two threads would
    matmul(operands, blocks / 2, blocks);
  };
  split ? run(static_cast<const float*>(w)) : run(static_cast<const uint16_t*>(w));
}
