// The leaf for multiply-adds of vectors, whose sums fill the registers but for those that hold the factors: ROWS rows
// times two vectors of tokens; or, of few rows, ROWS or twice as many tokens times one vector of rows.

struct Leaf {
  static constexpr int64_t kRows = ROWS, kTokens = 2 * kLanes;
  // Words whose products are summed in registers: of more than 256 numbers, a sum would be less exact.
  static constexpr int64_t kMostDepth = 256 / kNumbers;
  static constexpr int64_t kFew = 4 * kTokens;  // rows for which packing W does not pay

  template <int64_t vectors = 2, int64_t rows = kRows, typename Number = Word>
  [[gnu::noinline]] static void multiply(const Block<Word, Number>& f) {
    constexpr int64_t kAtOnce = sizeof(Word) / sizeof(Number);
    Floats sums[rows][vectors] = {};
    const Word* w = f.w;
    // Every third row's start, for there are no registers for all of them: a row is none, one or two strides on.
    const Number* starts[rows / 3];
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows / 3; ++i) starts[i] = f.x + 3 * i * f.x_stride;
    const int64_t stride = f.x_stride;
    const auto row = [&](int64_t i) __attribute__((always_inline)) { return starts[i / 3] + i % 3 * stride; };
    const auto add = [&]() __attribute__((always_inline)) {
      Words factors[kAtOnce][vectors];
#pragma GCC unroll 2
      for (int64_t n = 0; n < kAtOnce; ++n) {
#pragma GCC unroll 2
        for (int64_t side = 0; side < vectors; ++side, w += kLanes) std::memcpy(&factors[n][side], w, sizeof(Words));
      }
#pragma GCC unroll 32
      for (int64_t i = 0; i < rows; ++i) {
        Words x[kAtOnce];
        repeat(row(i), x);
#pragma GCC unroll 2
        for (int64_t n = 0; n < kAtOnce; ++n) {
#pragma GCC unroll 2
          for (int64_t side = 0; side < vectors; ++side)
            sums[i][side] = multiply_add(sums[i][side], x[n], factors[n][side]);
        }
      }
#pragma GCC unroll 8
      for (const Number*& start : starts) {
        start += kAtOnce;
        asm("" : "+r"(start));  // the compiler would make a register of each sum of them
      }
    };
    const int64_t line = kLine / f.next.word;  // words that the processor is asked for at once
    for (int64_t k = 0; k < f.depth; k += line) {
      if (f.next.start) {
        const char* next = static_cast<const char*>(f.next.start) + k * f.next.word;
#pragma GCC unroll 32
        for (int64_t i = 0; i < rows; ++i, next += f.next.stride) __builtin_prefetch(next);
      }
      const int64_t words = std::min(line, f.depth - k);
#pragma GCC unroll 2
      for (int64_t j = 0; j < words; j += kAtOnce) add();
    }
#pragma GCC unroll 32
    for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int64_t side = 0; side < vectors; ++side) {
        float* const z = f.z + i * f.z_stride + side * kLanes;
        store(z, f.first ? sums[i][side] : load(z, kLanes) + sums[i][side], kLanes);
      }
    }
  }
};
