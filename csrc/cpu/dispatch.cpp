#include "dispatch.h"

#include <cstring>

namespace rhythm {

#define RHYTHM_PASSES(capability, lanes) \
  {#capability, lanes, capability::band_rows, capability::band_columns, capability::row_stats, capability::column_stats}

RHYTHM_DECLARE(baseline)
static const Passes kBaseline = RHYTHM_PASSES(baseline, 4);

#if defined(RHYTHM_X86)
RHYTHM_DECLARE(avx2)
RHYTHM_DECLARE(avx2_wide)
RHYTHM_DECLARE(avx512)
static const Passes kAvx2 = RHYTHM_PASSES(avx2, 8);
// The 16-wide form on 8-wide registers: never the fastest, it lets every x86 machine test what AVX-512 will run.
static const Passes kAvx2Wide = RHYTHM_PASSES(avx2_wide, 16);
static const Passes kAvx512 = RHYTHM_PASSES(avx512, 16);
#endif

std::vector<const Passes*> compiled_passes() {
#if defined(RHYTHM_X86)
  return {&kBaseline, &kAvx2Wide, &kAvx2, &kAvx512};
#else
  return {&kBaseline};
#endif
}

bool runs_here(const Passes& passes) {
#if defined(RHYTHM_X86)
  // The compiler's check includes the operating system's part (saved registers).
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strncmp(passes.capability, "avx2", 4) == 0) return avx2;
  if (std::strcmp(passes.capability, "avx512") == 0)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return std::strcmp(passes.capability, "baseline") == 0;
}

const Passes* choose_passes(const char* requested) {
  const Passes* best = nullptr;
  for (const Passes* passes : compiled_passes()) {
    if (!runs_here(*passes)) continue;
    if (requested == nullptr || std::strcmp(passes->capability, requested) == 0) best = passes;
  }
  return best;
}

} // namespace rhythm
