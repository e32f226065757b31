#ifndef EDGECLIP_CUDA_WARP_CUH_
#define EDGECLIP_CUDA_WARP_CUH_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace edgeclip::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ T operator()(T x, T y) const {
    return x + y;
  }
};

struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
  __device__ uint64_t operator()(uint64_t x, uint64_t y) const { return x > y ? x : y; }
};

// Every lane gets the same bits, since both lanes of a pair combine the same two numbers.
template <typename T, typename Op>
__device__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ inline uint64_t warp_reduce(uint64_t value, Max) {
  const auto high = static_cast<unsigned>(value >> 32);
  const unsigned max_high = __reduce_max_sync(kAllLanes, high);
  const unsigned low = high == max_high ? static_cast<unsigned>(value) : 0u;
  return static_cast<uint64_t>(max_high) << 32 | __reduce_max_sync(kAllLanes, low);
}
#endif

// Sums each of kCount values over the warp. At each step a lane sends half of its values to its
// partner and keeps the other half, so 32 sums take 31 exchanges instead of 160. A lane gets the
// sum of value lane / (32 / kCount), in the order of warp_reduce, so with the same bits for any
// kCount.
template <int kCount, int kOffset = kWarpSize / 2, int kSize>
__device__ float warp_sums(float (&values)[kSize], int lane) {
  static_assert(kCount == 1 || kCount % 2 == 0);
  if constexpr (kOffset == 0) {
    return values[0];
  } else if constexpr (kCount == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kOffset);
    return warp_sums<1, kOffset / 2>(values, lane);
  } else {
    const bool upper = (lane & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float kept = upper ? values[i + kCount / 2] : values[i];
      const float sent = upper ? values[i] : values[i + kCount / 2];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kOffset);
    }
    return warp_sums<kCount / 2, kOffset / 2>(values, lane);
  }
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }

__device__ inline void store(float* to, float value) { *to = value; }
__device__ inline void store(__half* to, float value) { *to = __float2half_rn(value); }

// Elements per 16-byte load.
template <typename T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

__device__ inline void unpack(const uint4& bits, float (&values)[4]) {
  const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
}

__device__ inline void unpack(const uint4& bits, float (&values)[8]) {
  const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] & 0xffffu)));
    values[2 * i + 1] = __half2float(__ushort_as_half(static_cast<unsigned short>(words[i] >> 16)));
  }
}

// Loads the elements [offset, offset + kPack) of a row, zero past its end. Both branches give a
// lane the same elements, so results do not depend on the alignment.
template <bool kAligned, typename T>
__device__ void load_pack(const T* row, int64_t offset, int64_t dim, float (&values)[kPack<T>]) {
  if constexpr (kAligned) {
    unpack(__ldg(reinterpret_cast<const uint4*>(row + offset)), values);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      values[i] = offset + i < dim ? to_float(__ldg(row + offset + i)) : 0.0f;
    }
  }
}

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_WARP_CUH_
