// Which instructions may be used: the processor's, and no wider ones than TUNED_LENS_FAST_CPU names.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tuned_lens_fast {

// Each has those before it, but for AMX, which has no need of AVX-512's bf16.
enum class Instructions { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx };
constexpr const char* kInstructions[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};

// The widest that may be used, by the environment; an unknown value is an error of every operator that asks.
inline Instructions widest_allowed() {
  const char* const named = std::getenv("TUNED_LENS_FAST_CPU");
  if (!named || !*named) return Instructions::kAmx;
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(named, kInstructions[i]) == 0) return static_cast<Instructions>(i);
  STD_TORCH_CHECK(
      false, "TUNED_LENS_FAST_CPU: got '", named, "', wanted plain, avx2, avx512, avx512_bf16 or amx");
}

// Whether the environment allows a set, the processor has it, and the system lets this process use its registers.
inline bool may_use([[maybe_unused]] Instructions set) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (set > widest_allowed()) return false;
  [[maybe_unused]] unsigned a, b, c, d;
  switch (set) {
    case Instructions::kPlain: return true;
    case Instructions::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case Instructions::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && may_use(Instructions::kAvx2);
    case Instructions::kAvx512Bf16: {
      constexpr unsigned kBf16 = 1u << 5;
      return may_use(Instructions::kAvx512) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16);
    }
    case Instructions::kAmx: {
#ifdef __linux__
      constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
      constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl, since Linux 5.16
      return may_use(Instructions::kAvx512) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) &&
             (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
    }
  }
  return false;
#else
  return set == Instructions::kPlain;
#endif
}

}  // namespace tuned_lens_fast
