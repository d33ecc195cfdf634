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

// log(1 + e) for 0 <= e <= 1, as 2 artanh(e / (2 + e)).
static inline Floats log1p_unit(Floats e) {
  const Floats f = e / (e + 2.0f);  // at most 1/3
  const Floats g = f * f;
  Floats y = all(1.0f / 15);
  y = y * g + 1.0f / 13;
  y = y * g + 1.0f / 11;
  y = y * g + 1.0f / 9;
  y = y * g + 1.0f / 7;
  y = y * g + 1.0f / 5;
  y = y * g + 1.0f / 3;
  y = y * g + 1.0f;
  return 2.0f * f * y;
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

template <bool with_js>
static inline void compare_as(Pair& pair) {
  const float log_two = 0.69314718f;
  Floats kl{}, reverse_kl{}, js{}, tv{};
  for (int64_t i = 0; i < pair.width; i += kLanes) {
    const int64_t count = pair.width - i;
    Floats log_p = (load(pair.z_p + i, count) - pair.m_p) - pair.log_s_p;
    Floats log_q = (load(pair.z_q + i, count) - pair.m_q) - pair.log_s_q;
    log_p = log_p < kLogFloor ? all(kLogFloor) : log_p;
    log_q = log_q < kLogFloor ? all(kLogFloor) : log_q;
    // Rounding can leave a certain token's logarithm a little above 0.
    const Floats p = exp_nonpositive(log_p > 0.0f ? Floats{} : log_p);
    const Floats q = exp_nonpositive(log_q > 0.0f ? Floats{} : log_q);
    const Floats d = log_p - log_q;
    kl += p * d;
    reverse_kl -= q * d;
    const Floats apart = p - q;
    tv += apart < 0.0f ? -apart : apart;
    if (with_js) {
      // With the larger of the two logarithms taken out, log((p + q) / 2) is a log1p.
      const Floats beside = log1p_unit(exp_nonpositive(d > 0.0f ? -d : d)) - log_two;
      js += p * ((d > 0.0f ? Floats{} : d) - beside) + q * ((d > 0.0f ? -d : Floats{}) - beside);
    }
  }
  pair.sums[kKl] = sum(kl), pair.sums[kReverseKl] = sum(reverse_kl);
  pair.sums[kJs] = 0.5f * sum(js), pair.sums[kTv] = 0.5f * sum(tv);
}

void compare(Pair& pair, bool with_js) {
  with_js ? compare_as<true>(pair) : compare_as<false>(pair);
}
