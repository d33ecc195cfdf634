// The leaf for AMX, whose registers hold 16 rows of 16 words, and whose one product is of pairs of bf16 summed in fp32:
// 32 rows times 32 tokens, in four registers.

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each register
  uint8_t rows[16] = {};
  TileShapes() {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = 16;
  }
};

struct Leaf {
  static constexpr int64_t kSide = 16;
  static constexpr int64_t kRows = 2 * kSide, kTokens = 2 * kSide;
  static constexpr int64_t kMostDepth = int64_t{1} << 40;  // sums stay in registers until all parts are added
  static constexpr int64_t kFew = 0;  // rows for which packing W does not pay

  Leaf() {
    static const TileShapes shapes;
    // What _tile_ functions read and write is not among their operands: it has to be in memory before, and after.
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shapes);
  }
  ~Leaf() { _tile_release(); }

  static inline void multiply(const Block<Word>& f) {
    const int64_t x_bytes = f.x_stride * sizeof(Word), w_bytes = kTokens * sizeof(Word);
    const int64_t z_bytes = f.z_stride * sizeof(float);
    asm volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // The least first: added to the sum of what is larger, each would be rounded as if it were as large.
    for (int64_t both = f.most; both >= 0; --both) {
      for (int64_t j = std::max<int64_t>(0, both - f.parts + 1); j <= std::min(both, f.parts - 1); ++j) {
        const Word* x = f.x + (both - j) * f.x_apart;
        const Word* w = f.w + j * f.w_apart;
        for (int64_t k = 0; k < f.depth; k += kSide, x += kSide, w += kSide * kTokens) {
          _tile_loadd(4, x, x_bytes);
          _tile_loadd(5, x + kSide * f.x_stride, x_bytes);
          _tile_loadd(6, w, w_bytes);
          _tile_loadd(7, w + kSide, w_bytes);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, f.z, z_bytes);
    _tile_stored(1, f.z + kSide, z_bytes);
    _tile_stored(2, f.z + kSide * f.z_stride, z_bytes);
    _tile_stored(3, f.z + kSide * f.z_stride + kSide, z_bytes);
    asm volatile("" ::: "memory");
  }
};
