// Which instructions may be used: the processor's, and no wider ones than TUNED_LENS_FAST_CPU names.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

namespace tuned_lens_fast {

enum class Instructions { kPlain, kAvx2, kAvx512, kAmx };

// The widest that may be used, by the environment; an unknown value is an error of every operator that asks.
inline Instructions widest_allowed() {
  const char* const named = std::getenv("TUNED_LENS_FAST_CPU");
  if (!named || !*named) return Instructions::kAmx;
  constexpr const char* kNames[] = {"plain", "avx2", "avx512", "amx"};
  for (int i = 0; i < 4; ++i)
    if (std::strcmp(named, kNames[i]) == 0) return static_cast<Instructions>(i);
  STD_TORCH_CHECK(false, "TUNED_LENS_FAST_CPU: got '", named, "', wanted plain, avx2, avx512 or amx");
}

// Whether the processor has the base of a set and the environment allows it.
inline bool may_use([[maybe_unused]] Instructions set) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (set > widest_allowed()) return false;
  switch (set) {
    case Instructions::kPlain: return true;
    case Instructions::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    default:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
  }
#else
  return set == Instructions::kPlain;
#endif
}

}  // namespace tuned_lens_fast
