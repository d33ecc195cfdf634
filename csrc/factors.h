// The operands of one tile's matrix product.
#pragma once

#include <cstdint>

namespace tuned_lens_fast {

template <typename Weight>  // float, or uint16_t for the bits of a bf16
struct Factors {
  const uint16_t* x;  // bf16, [parts, rows, d_model] padded with zeros to multiples of 32
  int64_t x_apart;    // from one part to the next
  int64_t x_stride;
  int64_t parts;
  int64_t most;  // parts i of x and j of W are multiplied where i + j is no more
  int64_t rows;  // without padding
  const Weight* w;
  int64_t w_stride;
  int64_t width;  // tokens
  int64_t d_model;
  float* z;  // out: [rows, width]
  int64_t z_stride;
};

}  // namespace tuned_lens_fast
