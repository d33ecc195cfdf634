// sum exp(z - m) W, of which W^T softmax(z) is made: rows of W, each times what the logits have become. In fp32, whatever
// W is of.
//
// Included once for each leaf, by walk.inl.

constexpr int64_t kPanel = 2 * kLanes;  // columns of W at once

// Adds the first `width` columns of p [rows, tokens] times w [tokens, kPanel] to the rescaled sums.
template <int64_t rows = 6>
static void add_panel(
    int64_t count, const float* p, int64_t p_stride, int64_t tokens, const float* w, int64_t w_stride,
    const float* rescale, float* u, int64_t u_stride, int64_t width) {
  if constexpr (rows > 1)
    if (count < rows)
      return add_panel<rows - 1>(count, p, p_stride, tokens, w, w_stride, rescale, u, u_stride, width);
  Floats sums[rows][2] = {};
  for (int64_t token = 0; token < tokens; ++token, ++p, w += w_stride) {
    const Floats left = load(w, kLanes), right = load(w + kLanes, kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) {
      const Floats factor = all(p[i * p_stride]);
      sums[i][0] += factor * left;
      sums[i][1] += factor * right;
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < rows; ++i) {
    float* const to = u + i * u_stride;
    store(to, load(to, width) * rescale[i] + sums[i][0], width);
    if (width > kLanes) store(to + kLanes, load(to + kLanes, width - kLanes) * rescale[i] + sums[i][1], width - kLanes);
  }
}

template <typename Weight>
static void add_rows_of_weight(
    const Walk& f, const Found& found, int64_t row, int64_t rows, int64_t token, int64_t width, const float* p,
    int64_t p_stride) {
  alignas(64) float widened[kMostTokens * kPanel];
  const Weight* const w = static_cast<const Weight*>(f.w) + token * f.w_stride;
  const int64_t groups = (rows + 5) / 6;
  for (int64_t column = 0; column < f.d_model; column += kPanel) {
    const int64_t columns = std::min(kPanel, f.d_model - column);
    const float* panel = widened;
    int64_t stride = kPanel;
    if constexpr (std::is_same_v<Weight, float>)
      if (columns == kPanel) panel = w + column, stride = f.w_stride;
    for (int64_t i = 0; i < width && panel == widened; ++i)
      for (int64_t side = 0; side < kPanel; side += kLanes)
        store(widened + i * kPanel + side, widen(w + i * f.w_stride + column + side, columns - side), kLanes);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = rows * group / groups, count = rows * (group + 1) / groups - first;
      add_panel(
          count, p + first * p_stride, p_stride, width, panel, stride, found.rescale + row + first,
          found.u + (row + first) * f.d_model + column, f.d_model, columns);
    }
  }
}

static inline void add_rows_of_weight(
    const Walk& f, const Found& found, int64_t row, int64_t rows, int64_t token, int64_t width, const float* p,
    int64_t p_stride) {
  switch (f.kind) {
    case Kind::kFloat: return add_rows_of_weight<float>(f, found, row, rows, token, width, p, p_stride);
    case Kind::kBf16: return add_rows_of_weight<Bf16>(f, found, row, rows, token, width, p, p_stride);
    case Kind::kHalf: return add_rows_of_weight<Half>(f, found, row, rows, token, width, p, p_stride);
  }
}
