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

// Of every pair of rows `step` apart their lanes as `low` and `high` tell of a lane: of its own of both rows, or of
// another's.
template <int step, typename Words, typename Low, typename High>
INLINED void shuffle(Words (&rows)[kLanes], const Low& low, const High& high) {
  Bits from_low, from_high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) from_low[i] = low(i), from_high[i] = high(i);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Words a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shuffle(a, b, from_low);
    rows[i + step] = __builtin_shuffle(a, b, from_high);
  }
}

// Squares of four rows and lanes are transposed where they are, as registers are good at; then squares change places.
template <typename Words, typename Word>
INLINED void store_transposed(Words (&rows)[kLanes], Word* to, int64_t stride) {
  // Lanes 0 to 3 of a and b become a0 b0 a1 b1 and a2 b2 a3 b3.
  shuffle<1>(rows, [](int i) { return (i & ~3) + (i & 3) / 2 + (i & 1) * kLanes; },
             [](int i) { return (i & ~3) + 2 + (i & 3) / 2 + (i & 1) * kLanes; });
  // Those and c0 d0 c1 d1 become a0 b0 c0 d0 and a1 b1 c1 d1.
  shuffle<2>(rows, [](int i) { return (i & ~3) + (i & 1) + (i & 2) / 2 * kLanes; },
             [](int i) { return (i & ~3) + 2 + (i & 1) + (i & 2) / 2 * kLanes; });
  const auto places = [&]<int step>(std::integral_constant<int, step>) {
    shuffle<step>(rows, [](int i) { return i & step ? kLanes + i - step : i; },
                  [](int i) { return i & step ? kLanes + i : i + step; });
  };
  places(std::integral_constant<int, 4>{});
  if constexpr (kLanes > 8) places(std::integral_constant<int, 8>{});
  // Word 4n + {0, 2, 1, 3} is in row 4n + {0, 1, 2, 3}.
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int row = (i & ~3) | (i & 1) << 1 | (i & 2) >> 1;
    std::memcpy(to + i * stride, &rows[row], sizeof rows[row]);
  }
}
