// A tile's row beside the model's own, whose normalisers are known. Included after online_softmax.inl.

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
