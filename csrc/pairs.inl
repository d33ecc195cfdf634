// Words that are two bf16 numbers.
//
// A number of 24 bits is the sum of three bf16 parts, each the rounded rest of those before: x w is the sum of the
// products of parts i and j, of which those with i + j > 2 are below fp32's own rounding. So fp32 takes six products, or
// three where two parts are enough; fp16 takes four, and is exact; bf16 takes one. After Henry, Tang and Heinecke (2019),
// "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations".

using Word = uint32_t;
using Words = Bits;
constexpr int64_t kNumbers = 2;  // in a word

// Rounded to bf16, ties to even, and left in the upper half.
static inline Bits round_to_bf16(Floats lanes) {
  const Bits bits = bits_of(lanes);
  const Bits rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  return lanes == lanes ? rounded : Bits{} + 0x7FC00000;
}

// The next words of a row of which `count` numbers exist, a part after the other.
template <typename Weight>
struct Numbers {
  Floats left, right;  // of every pair
  Numbers() = default;
  Numbers(const Weight* from, int64_t count) {
    const Floats some = widen(from, count), others = widen(from + kLanes, count - kLanes);
    Bits even, odd;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    left = __builtin_shuffle(some, others, even);
    right = __builtin_shuffle(some, others, odd);
  }
  Words next() {
    const Bits a = round_to_bf16(left), b = round_to_bf16(right);
    left -= floats_of(a);
    right -= floats_of(b);
    return (a >> 16) | b;
  }
};

template <>
struct Numbers<Bf16> {
  Bits pairs{};
  Numbers() = default;
  Numbers(const Bf16* from, int64_t count) {
    if (count >= 2 * kLanes)
      std::memcpy(&pairs, from, sizeof pairs);
    else if (count > 0)
      std::memcpy(&pairs, from, sizeof(Bf16) * count);
  }
  Words next() { return pairs; }
};
