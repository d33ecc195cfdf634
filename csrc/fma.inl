// The leaf for multiply-adds of vectors: ROWS rows times two vectors of tokens, whose sums fill the registers but for
// those that hold the factors.

struct Leaf {
  static constexpr int64_t kRows = ROWS, kTokens = 2 * kLanes;
  // Words whose products are summed in registers: of more than 256 numbers, a sum would be less exact.
  static constexpr int64_t kMostDepth = 256 / kNumbers;

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
};
