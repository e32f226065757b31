#ifndef EDGECLIP_CPU_SIMD_H_
#define EDGECLIP_CPU_SIMD_H_

// What a kernel calls in its loops must be EDGECLIP_INLINE: a call out of the AVX-512 version would
// land in code compiled for the baseline.
#define EDGECLIP_INLINE inline __attribute__((always_inline))

namespace edgeclip {

enum class Simd { kBaseline, kAvx2, kAvx512 };

// The instruction set that runs: the best that this machine has, or what the environment variable
// EDGECLIP_SIMD says ("baseline", "avx2" or "avx512"), read once. Throws std::runtime_error where
// that is none of these, or more than the machine has.
Simd simd_level();

const char* simd_name(Simd level);

// Of the vectors of an instruction set: SSE2 and NEON are the baseline.
constexpr int float_lanes(Simd level) {
  return level == Simd::kAvx512 ? 16 : level == Simd::kAvx2 ? 8 : 4;
}

template <typename T, int kLanes>
struct Vector {
  typedef T Lanes __attribute__((vector_size(kLanes * sizeof(T))));
};

}  // namespace edgeclip

// One binary serves every x86-64. EDGECLIP_SIMD_KERNEL(double, dot, (const float* x, int64_t n),
// (x, n)) defines the function `dot`, which calls the template dot_kernel<Simd>, EDGECLIP_INLINE,
// compiled for each instruction set.
#ifdef EDGECLIP_HAVE_X86_LEVELS
#define EDGECLIP_SIMD_KERNEL(Return, name, parameters, arguments)                    \
  __attribute__((target("arch=x86-64-v4"))) static Return name##_avx512 parameters { \
    return name##_kernel<Simd::kAvx512> arguments;                                   \
  }                                                                                  \
  __attribute__((target("arch=x86-64-v3"))) static Return name##_avx2 parameters {   \
    return name##_kernel<Simd::kAvx2> arguments;                                     \
  }                                                                                  \
  Return name parameters {                                                           \
    const Simd level = simd_level();                                                 \
    if (level == Simd::kAvx512) return name##_avx512 arguments;                      \
    if (level == Simd::kAvx2) return name##_avx2 arguments;                          \
    return name##_kernel<Simd::kBaseline> arguments;                                 \
  }
#else
#define EDGECLIP_SIMD_KERNEL(Return, name, parameters, arguments) \
  Return name parameters { return name##_kernel<Simd::kBaseline> arguments; }
#endif

#endif  // EDGECLIP_CPU_SIMD_H_
