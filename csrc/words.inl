// Words, a lane each, of which a leaf multiplies vectors: how they are read, widened and put in order.
//
// Included once for each instruction set, after online_softmax.inl.

using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

static inline Bits bits_of(Floats lanes) {
  Bits bits;
  std::memcpy(&bits, &lanes, sizeof bits);
  return bits;
}

static inline Floats floats_of(Bits bits) {
  Floats lanes;
  std::memcpy(&lanes, &bits, sizeof lanes);
  return lanes;
}

static inline Floats widened(Floats lanes, const float*) { return lanes; }
static inline Floats widened(Halves bits, const Bf16*) { return floats_of(__builtin_convertvector(bits, Bits) << 16); }
static inline Floats widened(Halves bits, const Half*) {
  const Ints half = __builtin_convertvector(bits, Ints), size = half & 0x7FFF, exponent = half & 0x7C00;
  const Floats small = __builtin_convertvector(size, Floats) * 5.9604644775390625e-8f;  // 2^-24
  const Ints moved = (size << 13) + (exponent == 0x7C00 ? Ints{} + (224 << 23) : Ints{} + (112 << 23));
  const Floats large = floats_of(__builtin_convertvector(moved, Bits));
  const Bits sign = __builtin_convertvector(half & 0x8000, Bits) << 16;
  return floats_of(bits_of(exponent == 0 ? small : large) | sign);
}

// The next of a row's numbers, of which `count` exist, in fp32; 0 for the rest.
template <typename Weight>
static inline Floats widen(const Weight* from, int64_t count) {
  std::conditional_t<sizeof(Weight) == 2, Halves, Floats> lanes{};
  if (count >= kLanes)
    std::memcpy(&lanes, from, sizeof lanes);
  else if (count > 0)
    std::memcpy(&lanes, from, sizeof(Weight) * count);
  return widened(lanes, from);
}

// Stages of a transposition: a's upper and b's lower lanes, of every 2 * step, change places.
template <int step, typename Words>
static inline void exchange(Words (&rows)[kLanes]) {
  if constexpr (2 * step < kLanes) exchange<2 * step>(rows);
  Bits low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const bool upper = i & step;
    low[i] = upper ? kLanes + i - step : i;
    high[i] = upper ? kLanes + i : i + step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Words a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + step] = __builtin_shuffle(a, b, high);
  }
}

template <typename Words, typename Word>
static inline void store_transposed(Words (&rows)[kLanes], Word* to, int64_t stride) {
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(to + i * stride, &rows[i], sizeof rows[i]);
}

// What a leaf multiplies at once: some rows times kTokens tokens.
template <typename Word>
struct Block {
  int64_t rows;  // at least 1, at most the leaf's kRows
  const Word* x;
  int64_t x_stride, x_apart;  // from one row to the next, and from one part of the numbers to the next
  const Word* w;              // [depth, kTokens]
  int64_t w_apart;
  int64_t depth;
  int64_t parts, most;
  float* z;
  int64_t z_stride;
  bool first;  // else it is added to what is in z
};
