// A tile's row, LANES logits at a time. Included once for each instruction set, inside a namespace, with the compiler
// told what it may use: the vector types that GCC and Clang share become SSE, AVX2, AVX-512 or NEON. LANES floats have
// to fill a register: of wider vectors GCC makes scalar code.

constexpr int64_t kLanes = LANES;
constexpr int64_t kBlock = 64;          // tokens that are compared with the k-th best at once

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));

static inline Floats all(float value) { return value - Floats{}; }

// The first `count` lanes from memory, -inf in the rest.
static inline Floats load(const float* from, int64_t count) {
  Floats lanes;
  if (count >= kLanes) {
    std::memcpy(&lanes, from, sizeof lanes);
  } else {
    lanes = all(-kInfinity);
    std::memcpy(&lanes, from, sizeof(float) * count);
  }
  return lanes;
}

static inline void store(float* to, Floats lanes, int64_t count) {
  std::memcpy(to, &lanes, sizeof(float) * (count < kLanes ? count : kLanes));
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline float sum(Floats lanes) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

static inline int64_t sum(Ints lanes) {
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

static inline float largest(Floats lanes) {
  float most = lanes[0];
  for (int i = 1; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

static inline bool any(Ints mask) {
  int64_t words[kLanes / 2];
  std::memcpy(words, &mask, sizeof words);
  int64_t found = 0;
  for (int64_t word : words) found |= word;
  return found != 0;
}

// exp(x) for x <= 0; 0 below -87, NaN for NaN. Range reduction after Cody and Waite (1980).
static inline Floats exp_nonpositive(Floats x) {
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // x / ln 2, rounded, is in the lowest bits
  const Floats n = shifted - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  // Out of range the power of two means nothing; the last line drops it.
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const Bits exponent = (bits << 23) + (127u << 23);
  Floats power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.0f ? Floats{} : y * power;
}

static inline Floats tanh(Floats x) {
  const Floats size = x < 0.0f ? -x : x, e = exp_nonpositive(-2.0f * size), large = (1.0f - e) / (1.0f + e);
  // Near 0 the difference from 1 would cancel: Taylor's series, good to 1e-9 of the value there.
  const Floats g = x * x;
  Floats y = all(-1382.0f / 155925);
  y = y * g + 62.0f / 2835;
  y = y * g - 17.0f / 315;
  y = y * g + 2.0f / 15;
  y = y * g - 1.0f / 3;
  y = x + x * (y * g);
  return size < 0.25f ? y : x < 0.0f ? -large : large;
}

// The exponentials of logits relative to `origin`, counted in `sums`.
static inline Floats add(TileSums<Floats>& sums, Floats z, float origin) {
  const Floats d = larger(all(kExpFloor), z - origin);  // NaN stays
  const Floats e = exp_nonpositive(d);
  sums.add(d, e);
  return e;
}

template <bool keep>
static inline TileSums<float> sum_up(float* z, int64_t width, float origin) {
  TileSums<Floats> some, others;
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    const Floats e = add(some, load(z + i, kLanes), origin), next = add(others, load(z + i + kLanes, kLanes), origin);
    if (keep) store(z + i, e, kLanes), store(z + i + kLanes, next, kLanes);
  }
  for (; i < width; i += kLanes) {
    const Floats e = add(some, load(z + i, width - i), origin);
    if (keep) store(z + i, e, width - i);
  }
  const auto of_lanes = [](Floats lanes) { return sum(lanes); };
  return some.plus(others).each(of_lanes);
}

void add_tile(Row& row) {
  float* const z = row.z;
  const int64_t width = row.width;
  Floats most = all(-kInfinity);
  Ints above{};
  float worst = row.top.k ? row.top.worst() : kInfinity;
  for (int64_t j = 0; j < width; j += kBlock) {
    Floats block_most = all(-kInfinity);
    const auto meet = [&](Floats lanes) {
      block_most = larger(lanes, block_most);
      above -= lanes > row.threshold;
    };
    if (width - j >= kBlock) {
      for (int64_t i = j; i < j + kBlock; i += kLanes) meet(load(z + i, kLanes));
    } else {
      for (int64_t i = j; i < width; i += kLanes) meet(load(z + i, width - i));
    }
    most = larger(block_most, most);
    if (row.top.k && (!row.top.full() || any(block_most > worst))) {
      row.top.offer(z + j, width - j < kBlock ? width - j : kBlock, row.first + j);
      worst = row.top.worst();
    }
  }
  row.larger = sum(above);

  const float tile_m = largest(most);
  const float m = tile_m > row.sums->m ? tile_m : row.sums->m;
  const float origin = m == -kInfinity ? 0.0f : m;
  const TileSums<float> sums = row.keep ? sum_up<true>(z, width, origin) : sum_up<false>(z, width, origin);
  row.rescale = fold(*row.sums, sums, m, origin);
}
