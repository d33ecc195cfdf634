// The operands of a walk over rows of W: products with them, and what becomes of these.
#pragma once

#include <cstdint>
#include <vector>

#include "row.h"

// What is worth being in registers, whatever the compiler thinks of its size; but for tests, for which that takes
// minutes to compile.
#if defined(__SANITIZE_ADDRESS__) || defined(EMULATED)
#define INLINED static inline
#else
#define INLINED [[gnu::always_inline]] static inline
#endif

namespace tuned_lens_fast {

constexpr int64_t kLine = 64;  // bytes of a line of the caches

// The bits of a number of 16.
enum class Bf16 : uint16_t {};
enum class Half : uint16_t {};

enum class Kind : int64_t { kFloat, kBf16, kHalf };

struct Walk {
  int64_t rows, d_model, tokens;
  const float* x;  // [rows, d_model]
  int64_t x_stride;
  const void* w;  // [tokens, d_model]
  Kind kind;      // of its numbers
  int64_t w_stride;
  // z = g(x W^T + bias), g(y) = softcap tanh(scale y / softcap), or scale y where softcap is 0.
  const float* bias;  // [tokens], or null
  float scale, softcap;
  int64_t parts, most;  // bf16 parts of a number; parts i of x and j of W are multiplied where i + j is no more
  int64_t shares;       // of the tokens, one for each thread
  float* z;             // [rows, tokens], where logits go if nothing is to be found in them
  int64_t z_stride;
  Found found;  // all null, or what they are met for
};

// What each share of the tokens finds out of every row; the first one's is where all of it is to be.
class Shares {
 public:
  explicit Shares(const Walk& f)
      : own_(f.found.sums ? f.shares - 1 : 0, Own(f)), rescale_(f.found.u ? f.rows : 0),
        found_(f.found.sums ? 1 : f.shares, f.found) {
    if (!f.found.sums) return;
    if (f.found.u) found_[0].rescale = rescale_.data();
    for (Own& own : own_) {
      Found next = f.found;
      next.sums = own.sums.data();
      next.r = next.r ? own.r.data() : nullptr;
      next.target = next.target ? own.target.data() : nullptr;
      next.top = own.top.data();
      if (next.u) next.u = own.u.data(), next.rescale = own.rescale.data();
      found_.push_back(next);
    }
    for (const Found& each : found_)
      for (int64_t i = 0; i < f.rows; ++i) each.clear(i);
  }

  const Found& operator[](int64_t share) const { return found_[share]; }

  void merge(int64_t row) const {
    for (const Found& each : found_)
      if (&each != &found_[0]) found_[0].merge(row, each);
  }

 private:
  struct Own {
    std::vector<Running> sums;
    std::vector<int64_t> r, top;
    std::vector<float> target, u, rescale;
    explicit Own(const Walk& f)
        : sums(f.rows), r(f.found.r ? f.rows : 0), top(f.rows * f.found.k), target(f.found.target ? f.rows : 0),
          u(f.found.u ? f.rows * f.found.u_width : 0), rescale(f.found.u ? f.rows : 0) {}
  };
  std::vector<Own> own_;
  std::vector<float> rescale_;
  std::vector<Found> found_;
};

}  // namespace tuned_lens_fast
