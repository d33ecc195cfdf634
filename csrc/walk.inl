// The logits of all rows for one token after another, and what becomes of them while they are in a core's own caches.
//
// Threads share out the tokens. A leaf, of which every generation of processors has one, sums some rows' logits of some
// tokens in registers; in a buffer that stays in those caches the model's bias, scale and softcap are put to
// them, and they are added to the rows' state or written out; exp(z - m) may be multiplied by W at once. Threads' states
// merge as those of tiles do.
//
// Each logit is summed in one order, wherever its row and its token stand and however many there are.
//
// Included once for each leaf, after it.

constexpr int64_t kMostTokens = 128;         // of a block, whose logits are in the buffer
constexpr int64_t kBlockBytes = 256 * 1024;  // of W in a block, if it is no less than one of the leaf's

#include "packing.inl"
#include "rows_of_weight.inl"

// What the model makes of a row's products.
static inline void transform(const Walk& f, int64_t token, int64_t width, float* z) {
  if (!f.bias && f.scale == 1.0f && f.softcap == 0.0f) return;
  for (int64_t j = 0; j < width; j += kLanes) {
    Floats lanes = load(z + j, kLanes);
    if (f.bias) lanes += load(f.bias + token + j, width - j);
    if (f.scale != 1.0f) lanes *= f.scale;
    if (f.softcap != 0.0f) lanes = f.softcap * tanh(lanes / f.softcap);
    store(z + j, lanes, kLanes);
  }
}

// What becomes of the products of some rows, from `row` on, with some tokens.
static inline void meet(
    const Walk& f, const Found& found, int64_t row, int64_t rows, int64_t token, int64_t width, float* z,
    int64_t z_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const logits = z + i * z_stride;
    transform(f, token, width, logits);
    if (f.found.sums)
      found.add(row + i, logits, width, token, add_tile);
    else
      std::memcpy(f.z + (row + i) * f.z_stride + token, logits, sizeof(float) * width);
  }
  if (f.found.u) add_rows_of_weight(f, found, row, rows, token, width, z, z_stride);
}

#include "many_rows.inl"
#include "few_rows.inl"

// `parallel(count, work)` has every number below count in one call work(begin, end).
template <typename Rows, typename Parallel>
static inline void walk_shares(const Walk& f, const Rows& x, const Shares& found, Parallel parallel) {
  const int64_t panels = (f.tokens + Leaf::kTokens - 1) / Leaf::kTokens;
  parallel(f.shares, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = panels * share / f.shares * Leaf::kTokens;
      walk_tokens(f, x, found[share], first, std::min(panels * (share + 1) / f.shares * Leaf::kTokens, f.tokens));
    }
  });
}

template <typename Parallel>
void walk(Walk f, Parallel parallel) {
  f.shares = std::clamp<int64_t>((f.tokens + Leaf::kTokens - 1) / Leaf::kTokens, 1, f.shares);
  const Shares found(f);
  bool few = false;
  if constexpr (Leaf::kFew > 0) {
    few = f.rows <= Leaf::kFew;
    if (few) walk_shares(f, FewRows<Leaf>(f), found, parallel);
  }
  if (!few) {
    const ManyRows x(f);
    parallel(up(f.rows, Leaf::kRows), [&](int64_t begin, int64_t end) { x.pack(f, begin, end); });
    walk_shares(f, x, found, parallel);
  }
  if (!f.found.sums) return;
  parallel(f.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) found.merge(row);
  });
}
