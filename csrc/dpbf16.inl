// AVX-512's product of pairs of bf16, which are summed in fp32.

static inline Floats multiply_add(Floats sums, Word x, Words w) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(Words{} + x), (__m512bh)w);
}
