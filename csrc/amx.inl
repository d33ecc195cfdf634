// z = x W^T for a tile of W on AMX, whose one product is of bf16 matrices, summed in fp32.
//
// A number of 24 bits is the sum of three bf16 parts, each the rounded rest of those before: x w is the sum of the
// products of parts i and j, of which those with i + j > 2 are below fp32's own rounding. So fp32 takes six products, or
// three where two parts are enough; fp16 takes four, and is exact; bf16 takes one. After Henry, Tang and Heinecke (2019),
// "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations".
//
// Included where the compiler is told about AMX and AVX-512, and by a test that has the _tile_ functions in software.

constexpr int64_t kSide = 16;               // rows of a tile register, each of 16 fp32 or 32 bf16
constexpr int64_t kDepth = 32;              // of one product of tile registers
constexpr int64_t kBlockSide = 2 * kSide;   // rows and tokens that are summed at once, in four registers
constexpr int64_t kPairs = kSide * kSide;   // pairs of bf16 in a tile register

using Words = uint32_t __attribute__((vector_size(4 * kSide)));
using Singles = float __attribute__((vector_size(4 * kSide)));

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each register
  uint8_t rows[16] = {};
  TileShapes() {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = kSide;
  }
};

static inline Words words_of(Singles lanes) {
  Words bits;
  std::memcpy(&bits, &lanes, sizeof bits);
  return bits;
}

static inline Singles singles_of(Words bits) {
  Singles lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

// Rounded to bf16, ties to even, and left in the upper half.
static inline Words round_to_bf16(Singles lanes) {
  const Words bits = words_of(lanes);
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  return lanes == lanes ? rounded : Words{} + 0x7FC00000;
}

// One stage of a transposition: a's upper and b's lower lanes, of every 2 * step, change places.
template <int step>
static inline void exchange(Words (&rows)[kSide]) {
  Words low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    const bool upper = i & step;
    low[i] = upper ? kSide + i - step : i;
    high[i] = upper ? kSide + i : i + step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i) {
    if (i & step) continue;
    const Words a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + step] = __builtin_shuffle(a, b, high);
  }
}

static inline void store_transposed(Words (&rows)[kSide], uint32_t* to) {
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
  std::memcpy(to, rows, sizeof rows);
}

// 16 tokens' 32 next weights as the pairs a tile register wants, each part `apart` from the one before. `count` tokens
// exist, each with `depth` weights left.
static inline void pack(
    const float* w, int64_t stride, int64_t count, int64_t depth, uint32_t* to, int64_t parts, int64_t apart) {
  Words even, odd;
  for (int i = 0; i < kSide; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  Singles left[kSide], right[kSide];  // of every pair
  for (int64_t row = 0; row < kSide; ++row) {
    Singles both[2] = {};
    if (row < count) std::memcpy(both, w + row * stride, sizeof(float) * std::min(depth, kDepth));
    left[row] = singles_of(__builtin_shuffle(words_of(both[0]), words_of(both[1]), even));
    right[row] = singles_of(__builtin_shuffle(words_of(both[0]), words_of(both[1]), odd));
  }
  for (int64_t part = 0; part < parts; ++part) {
    Words pairs[kSide];
    for (int64_t row = 0; row < kSide; ++row) {
      const Words a = round_to_bf16(left[row]), b = round_to_bf16(right[row]);
      left[row] -= singles_of(a);
      right[row] -= singles_of(b);
      pairs[row] = (a >> 16) | b;
    }
    store_transposed(pairs, to + part * apart);
  }
}

static inline void pack(
    const uint16_t* w, int64_t stride, int64_t count, int64_t depth, uint32_t* to, int64_t, int64_t) {
  Words pairs[kSide] = {};
  for (int64_t row = 0; row < count; ++row)
    std::memcpy(&pairs[row], w + row * stride, sizeof(uint16_t) * std::min(depth, kDepth));
  store_transposed(pairs, to);
}

// 32 rows, from `x`, times 32 tokens, packed, each part `apart` from the one before.
template <typename Weight>
static inline void multiply(
    const AmxOperands<Weight>& f, const uint16_t* x, const uint32_t* packed, int64_t apart, float* z, int64_t z_stride) {
  const int64_t x_bytes = f.x_stride * sizeof(uint16_t), z_bytes = z_stride * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  // The least first: added to the sum of what is larger, each would be rounded as if it were as large.
  for (int64_t both = f.most; both >= 0; --both) {
    for (int64_t j = std::max<int64_t>(0, both - f.parts + 1); j <= std::min(both, f.parts - 1); ++j) {
      const uint16_t* rows = x + (both - j) * f.x_apart;
      const uint32_t* w = packed + j * apart;
      for (int64_t k = 0; k < f.x_stride / kDepth; ++k, rows += kDepth, w += 2 * kPairs) {
        _tile_loadd(4, rows, x_bytes);
        _tile_loadd(5, rows + kSide * f.x_stride, x_bytes);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + kPairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, z, z_bytes);
  _tile_stored(1, z + kSide, z_bytes);
  _tile_stored(2, z + kSide * z_stride, z_bytes);
  _tile_stored(3, z + kSide * z_stride + kSide, z_bytes);
}

// Logits of all rows for the blocks `begin` to `end` of 32 tokens each.
template <typename Weight>
static inline void multiply_blocks(const AmxOperands<Weight>& f, int64_t begin, int64_t end) {
  static const TileShapes shapes;
  // What _tile_ functions read is not among their operands: whatever is written before has to be in memory.
  asm volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
  const int64_t depth = f.x_stride / kDepth, apart = 2 * kPairs * depth;  // x is padded
  std::vector<uint32_t> packed(apart * f.parts);
  alignas(64) float aside[kBlockSide * kBlockSide];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlockSide, width = std::min(kBlockSide, f.width - first);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t side = 0; side < 2; ++side) {
        const int64_t token = first + side * kSide, count = std::clamp<int64_t>(f.width - token, 0, kSide);
        const Weight* const w = f.w + (count ? token : 0) * f.w_stride + k * kDepth;
        uint32_t* const to = packed.data() + kPairs * (2 * k + side);
        pack(w, f.w_stride, count, f.d_model - k * kDepth, to, f.parts, apart);
      }
    }
    asm volatile("" ::: "memory");
    for (int64_t row = 0; row < f.rows; row += kBlockSide) {
      const int64_t count = std::min(kBlockSide, f.rows - row);
      float* const z = f.z + row * f.z_stride + first;
      const bool whole = count == kBlockSide && width == kBlockSide;
      multiply(f, f.x + row * f.x_stride, packed.data(), apart, whole ? z : aside, whole ? f.z_stride : kBlockSide);
      if (whole) continue;
      asm volatile("" ::: "memory");
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(z + i * f.z_stride, aside + i * kBlockSide, sizeof(float) * width);
    }
  }
  _tile_release();
}

void matmul(const AmxOperands<float>& f, int64_t begin, int64_t end) { multiply_blocks(f, begin, end); }
void matmul(const AmxOperands<uint16_t>& f, int64_t begin, int64_t end) { multiply_blocks(f, begin, end); }
