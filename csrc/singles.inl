// Words that are fp32 numbers.

using Word = float;
using Words = Floats;
constexpr int64_t kNumbers = 1;  // in a word

// The next words of a row of which `count` numbers exist.
template <typename Weight>
struct Numbers {
  Floats lanes;
  Numbers() = default;
  Numbers(const Weight* from, int64_t count) : lanes(widen(from, count)) {}
  Words next() { return lanes; }
};

static inline Floats multiply_add(Floats sums, Word x, Words w) { return sums + all(x) * w; }
