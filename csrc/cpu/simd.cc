#include "csrc/cpu/simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace edgeclip {
namespace {

Simd best_level() {
#ifdef EDGECLIP_HAVE_X86_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) return Simd::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Simd::kAvx2;
#endif
  return Simd::kBaseline;
}

Simd choose_level() {
  const Simd best = best_level();
  const char* requested = std::getenv("EDGECLIP_SIMD");
  if (requested == nullptr || *requested == '\0') return best;
  for (Simd level : {Simd::kBaseline, Simd::kAvx2, Simd::kAvx512}) {
    if (std::string(requested) != simd_name(level)) continue;
    if (level <= best) return level;
    throw std::runtime_error("EDGECLIP_SIMD=" + std::string(requested) +
                             ": this machine supports at most " + simd_name(best));
  }
  throw std::runtime_error("EDGECLIP_SIMD must be baseline, avx2 or avx512, got '" +
                           std::string(requested) + "'");
}

}  // namespace

Simd simd_level() {
  static const Simd level = choose_level();
  return level;
}

const char* simd_name(Simd level) {
  switch (level) {
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace edgeclip
