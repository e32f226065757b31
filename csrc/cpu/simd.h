#ifndef EDGECLIP_CPU_SIMD_H_
#define EDGECLIP_CPU_SIMD_H_

// For every function that a SIMD kernel calls: if not inlined, the AVX-512 version of the kernel
// would call code compiled for the baseline.
#define EDGECLIP_INLINE inline __attribute__((always_inline))

namespace edgeclip {

enum class Simd { kBaseline, kAvx2, kAvx512 };

// Returns the instruction set in use: the best this machine supports, or the one named by the
// environment variable EDGECLIP_SIMD ("baseline", "avx2" or "avx512"), read once. Throws
// std::runtime_error if EDGECLIP_SIMD names none of these or one the machine does not support.
Simd simd_level();

const char* simd_name(Simd level);

// Returns the floats per vector of an instruction set. The baseline is SSE2 or NEON.
constexpr int float_lanes(Simd level) {
  return level == Simd::kAvx512 ? 16 : level == Simd::kAvx2 ? 8 : 4;
}

template <typename T, int kLanes>
struct Vector {
  typedef T Lanes __attribute__((vector_size(kLanes * sizeof(T))));
};

}  // namespace edgeclip

// EDGECLIP_SIMD_KERNEL(double, dot, (const float* x, int64_t n), (x, n)) defines a function `dot`
// that dispatches to dot_kernel<Simd>, an EDGECLIP_INLINE template compiled once per instruction
// set. Thus one binary serves every x86-64.
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
