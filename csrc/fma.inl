// z = x W^T for a tile of W with fused multiply-adds, its sums in registers: 6 rows times 16 tokens at once, which take
// 12 of AVX2's 16 registers. x comes packed, six rows side by side; W is packed here, 16 tokens side by side and widened
// to fp32. Blocks are chosen for the caches as by Goto and van de Geijn (2008), "Anatomy of high-performance matrix
// multiplication": a panel of W in the first, a block of x in the second.
//
// Each logit is summed in one order wherever its row and its token stand in the tile.
//
// Included where the compiler is told about AVX2, FMA and F16C.

constexpr int64_t kTokens = 16;        // in a panel of W
constexpr int64_t kBlockTokens = 64;   // packed at once by a thread
constexpr int64_t kBlockRows = 96;
constexpr int64_t kLanes = 8;

static inline __m256 widen(const float* from) { return _mm256_loadu_ps(from); }
static inline __m256 widen(const Bf16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline __m256 widen(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Eight numbers, of which the first `count` exist; 0 for the rest.
template <typename Weight>
static inline __m256 widen(const Weight* from, int64_t count) {
  if (count >= kLanes) return widen(from);
  Weight whole[kLanes] = {};
  if (count > 0) std::memcpy(whole, from, sizeof(Weight) * count);
  return widen(whole);
}

static inline void store_transposed(const __m256 (&rows)[kLanes], float* to, int64_t stride) {
  __m256 pairs[kLanes], fours[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}

// `depth` weights of 16 tokens, of which `count` exist, side by side; room for a multiple of 8 of them.
template <typename Weight>
static inline void pack(const Weight* w, int64_t stride, int64_t count, int64_t depth, float* to) {
  for (int64_t side = 0; side < kTokens; side += kLanes) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      __m256 rows[kLanes];
#pragma GCC unroll 8
      for (int i = 0; i < kLanes; ++i)
        rows[i] = side + i < count ? widen(w + (side + i) * stride + k, depth - k) : _mm256_setzero_ps();
      store_transposed(rows, to + k * kTokens + side, kTokens);
    }
  }
}

// Adds six rows times 16 tokens over `depth` to z, or puts them there if they are the first.
static inline void multiply(const float* x, const float* w, int64_t depth, float* z, int64_t stride, bool first) {
  __m256 sums[kPackedRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kPackedRows; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, x += kPackedRows, w += kTokens) {
    const __m256 left = _mm256_load_ps(w), right = _mm256_load_ps(w + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < kPackedRows; ++i) {
      const __m256 row = _mm256_broadcast_ss(x + i);
      sums[i][0] = _mm256_fmadd_ps(row, left, sums[i][0]);
      sums[i][1] = _mm256_fmadd_ps(row, right, sums[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kPackedRows; ++i, z += stride) {
    if (!first) {
      sums[i][0] = _mm256_add_ps(_mm256_loadu_ps(z), sums[i][0]);
      sums[i][1] = _mm256_add_ps(_mm256_loadu_ps(z + kLanes), sums[i][1]);
    }
    _mm256_storeu_ps(z, sums[i][0]);
    _mm256_storeu_ps(z + kLanes, sums[i][1]);
  }
}

// Logits of the rows `row` to `last` for the tokens `token` to `past`, no more than a block of them.
template <typename Weight>
static inline void multiply_block(
    const FmaOperands<Weight>& f, int64_t row, int64_t last, int64_t token, int64_t past, float* packed) {
  const int64_t depth = f.depth();
  alignas(32) float aside[kPackedRows * kTokens];
  for (int64_t k = 0; k == 0 || k < f.d_model; k += depth) {  // of no weights the sum is 0
    const int64_t deep = std::min(depth, f.d_model - k);
    for (int64_t j = token; j < past; j += kTokens)
      pack(f.w + j * f.w_stride + k, f.w_stride, past - j, deep, packed + (j - token) * depth);
    for (int64_t block = row; block < last; block += kBlockRows) {
      for (int64_t j = token; j < past; j += kTokens) {
        for (int64_t i = block; i < std::min(block + kBlockRows, last); i += kPackedRows) {
          const float* const x = f.x + i * f.d_model + k * kPackedRows;
          const float* const w = packed + (j - token) * depth;
          float* const z = f.z + i * f.z_stride + j;
          const int64_t rows = std::min(kPackedRows, f.rows - i), width = std::min(kTokens, past - j);
          if (rows == kPackedRows && width == kTokens) {
            multiply(x, w, deep, z, f.z_stride, k == 0);
            continue;
          }
          for (int64_t r = 0; k && r < rows; ++r)
            std::memcpy(aside + r * kTokens, z + r * f.z_stride, sizeof(float) * width);
          multiply(x, w, deep, aside, kTokens, k == 0);
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(z + r * f.z_stride, aside + r * kTokens, sizeof(float) * width);
        }
      }
    }
  }
}

// Shares `begin` to `end` of the product: panels of W, for one group of rows after the other.
template <typename Weight>
static inline void multiply_shares(const FmaOperands<Weight>& f, int64_t begin, int64_t end) {
  std::vector<float> room(kBlockTokens * f.depth() + kLanes);
  float* const packed = room.data() + (-reinterpret_cast<uintptr_t>(room.data()) / sizeof(float)) % kLanes;
  const int64_t panels = (f.width + kTokens - 1) / kTokens;
  while (begin < end) {
    const int64_t group = begin / panels, panel = begin % panels, stop = std::min(panels, panel + end - begin);
    const int64_t row = group * f.group_rows, last = std::min(row + f.group_rows, f.rows);
    const int64_t past = std::min(stop * kTokens, f.width);
    for (int64_t token = panel * kTokens; token < past; token += kBlockTokens)
      multiply_block(f, row, last, token, std::min(token + kBlockTokens, past), packed);
    begin += stop - panel;
  }
}

void matmul(const FmaOperands<float>& f, int64_t begin, int64_t end) { multiply_shares(f, begin, end); }
void matmul(const FmaOperands<Bf16>& f, int64_t begin, int64_t end) { multiply_shares(f, begin, end); }
void matmul(const FmaOperands<Half>& f, int64_t begin, int64_t end) { multiply_shares(f, begin, end); }
