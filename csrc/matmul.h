// The operands of one tile's matrix product.
#pragma once

#include <cstdint>

namespace tuned_lens_fast {

// The bits of a number of 16.
enum class Bf16 : uint16_t {};
enum class Half : uint16_t {};

template <typename Weight>
struct TileOfWeights {
  int64_t rows;  // of x, without padding
  const Weight* w;
  int64_t w_stride;
  int64_t width;  // tokens
  int64_t d_model;
  float* z;  // out: [rows, width]
  int64_t z_stride;
};

template <typename Weight>  // float, or uint16_t for the bits of a bf16
struct AmxOperands : TileOfWeights<Weight> {
  const uint16_t* x;  // bf16, [parts, rows, d_model] padded with zeros to multiples of 32
  int64_t x_apart;    // from one part to the next
  int64_t x_stride;
  int64_t parts;
  int64_t most;  // parts i of x and j of W are multiplied where i + j is no more
};

constexpr int64_t kPackedRows = 6;   // of x, side by side
constexpr int64_t kMostDepth = 256;  // of a product whose sums stay in registers

template <typename Weight>  // float, Bf16 or Half
struct FmaOperands : TileOfWeights<Weight> {
  const float* x;      // [rows / 6, d_model, 6], padded with zeros
  int64_t group_rows;  // a multiple of 6: what of x a share takes

  // d_model in even parts, each a multiple of 8; never 0.
  int64_t depth() const {
    const int64_t some = this->d_model ? this->d_model : 1, parts = (some + kMostDepth - 1) / kMostDepth;
    return ((some + parts - 1) / parts + 7) / 8 * 8;
  }
};

}  // namespace tuned_lens_fast
