// AVX-512's product of pairs of bf16, which are summed in fp32.

static inline void repeat(const Word* from, Words (&words)[1]) { words[0] = Words{} + *from; }

static inline Floats multiply_add(Floats sums, Words x, Words w) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w);
}
