// The leaf for multiply-adds of vectors: ROWS rows times two vectors of tokens, whose sums fill the registers but for
// those that hold the factors; or more rows times one, where W is read for these alone.

struct Leaf {
  static constexpr int64_t kRows = ROWS, kTokens = 2 * kLanes;
  // Words whose products are summed in registers: of more than 256 numbers, a sum would be less exact.
  static constexpr int64_t kMostDepth = 256 / kNumbers;
  static constexpr int64_t kFew = kLanes;  // rows for which packing W does not pay

  template <int64_t rows = kRows>
  static inline void multiply(const Block<Word>& f) {
    if constexpr (rows > 1)
      if (f.rows < rows) return multiply<rows - 1>(f);
    Floats sums[rows][2] = {};
    const Word* w = f.w;
    for (int64_t k = 0; k < f.depth; ++k, w += kTokens) {
      Words left, right;
      std::memcpy(&left, w, sizeof left);
      std::memcpy(&right, w + kLanes, sizeof right);
#pragma GCC unroll 16
      for (int64_t i = 0; i < rows; ++i) {
        const Word x = f.x[i * f.x_stride + k];
        sums[i][0] = multiply_add(sums[i][0], x, left);
        sums[i][1] = multiply_add(sums[i][1], x, right);
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int64_t side = 0; side < 2; ++side) {
        float* const z = f.z + i * f.z_stride + side * kLanes;
        store(z, f.first ? sums[i][side] : load(z, kLanes) + sums[i][side], kLanes);
      }
    }
  }

  // The same of one vector of tokens, whose words are read from W. x has as many rows as the least power of two that has
  // them.
  template <typename Weight, int64_t rows = kFew>
  static inline void multiply_few(const Block<Word>& f, const Unpacked<Weight>& w) {
    if constexpr (rows > 1)
      if (2 * f.rows <= rows) return multiply_few<Weight, rows / 2>(f, w);
    const Word* const x = f.x;
    const int64_t x_stride = f.x_stride, stride = w.stride;
    alignas(64) Word words[kLanes * kLanes];
    Floats sums[rows] = {};
    const auto add = [&](int64_t k, int64_t j) __attribute__((always_inline)) {
      Words next;
      std::memcpy(&next, words + j * kLanes, sizeof next);
#pragma GCC unroll kUnrolled
      for (int64_t i = 0; i < rows; ++i) sums[i] = multiply_add(sums[i], x[i * x_stride + k + j], next);
    };
    int64_t k = 0;
    for (; k < w.whole; k += kLanes) {
      ask_ahead(w.start + k * kNumbers, stride, w.ahead, k);
      pack_square(w.start + k * kNumbers, stride, words, kLanes);
#pragma GCC unroll kUnrolled
      for (int64_t j = 0; j < kLanes; ++j) add(k, j);
    }
    for (; k < f.depth; k += kLanes) {
      pack_edge(w.start + k * kNumbers, stride, w.tokens, w.left - k * kNumbers, words, kLanes);
#pragma GCC unroll 1
      for (int64_t j = 0; j < kLanes; ++j) add(k, j);
    }
#pragma GCC unroll kUnrolled
    for (int64_t i = 0; i < rows; ++i) {
      if (i == f.rows) break;
      float* const z = f.z + i * f.z_stride;
      store(z, f.first ? sums[i] : load(z, kLanes) + sums[i], kLanes);
    }
  }
};
