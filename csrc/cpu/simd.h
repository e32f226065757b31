#ifndef EDGECLIP_CPU_SIMD_H_
#define EDGECLIP_CPU_SIMD_H_

// One binary serves every x86-64. A function marked EDGECLIP_SIMD_CLONES is compiled for AVX-512,
// AVX2 and the baseline, and the loader chooses. What it calls in its loops must be
// EDGECLIP_INLINE: a call out of a clone would land in code compiled for the baseline.
#define EDGECLIP_INLINE inline __attribute__((always_inline))

#ifdef EDGECLIP_HAVE_TARGET_CLONES
#define EDGECLIP_AVX512 "arch=x86-64-v4"
#define EDGECLIP_AVX2 "arch=x86-64-v3"
#define EDGECLIP_SIMD_CLONES \
  __attribute__((target_clones(EDGECLIP_AVX512, EDGECLIP_AVX2, "default")))
#else
#define EDGECLIP_SIMD_CLONES
#endif

namespace edgeclip {

enum class Simd { kBaseline, kAvx2, kAvx512 };

// The instruction set of the clones that run on this machine.
inline Simd simd_level() {
#ifdef EDGECLIP_HAVE_TARGET_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return Simd::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Simd::kAvx2;
#endif
  return Simd::kBaseline;
}

}  // namespace edgeclip

#endif  // EDGECLIP_CPU_SIMD_H_
