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

// The words in four bytes, each in all lanes.
static inline void repeat(const float* from, Words (&words)[1]) { words[0] = all(*from); }
static inline void repeat(const Bf16* from, Words (&words)[2]) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  Bits lanes = Bits{} + pair;
#ifndef EMULATED
  asm("" : "+x"(lanes));  // the compiler would shift before it repeats, and so repeat twice
#endif
  words[0] = floats_of(lanes << 16);
  words[1] = floats_of(lanes & 0xFFFF0000);
}

static inline Floats multiply_add(Floats sums, Words x, Words w) { return sums + x * w; }
