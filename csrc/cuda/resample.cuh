#ifndef EDGECLIP_CUDA_RESAMPLE_CUH_
#define EDGECLIP_CUDA_RESAMPLE_CUH_

#include <cstdint>

#include "csrc/cuda/check.cuh"
#include "csrc/cuda/warp.cuh"
#include "csrc/filter.h"

// Horizontal and vertical pass of a resize, in Pillow's fixed point: see csrc/cpu/resample.h.
namespace edgeclip::cuda {

inline constexpr int kResampleWarps = 8;
inline constexpr int kResampleThreads = kResampleWarps * kWarpSize;

// uint8 pixels of three channels. Strides are in bytes.
struct Source {
  const uint8_t* data;
  int64_t width;
  int64_t row_stride;
  int64_t pixel_stride;
  int64_t channel_stride;
};

// Weights come in groups of four, for four packed pixels in three 32-bit words. So each begin is a
// multiple of 4, and weights outside the window are zero.
struct HorizontalFilter {
  int* begin;
  int* groups;    // groups of four weights per output
  int4* weights;  // group g of output x at [g * outputs + x], for coalesced reads
  int outputs;
};

struct VerticalFilter {
  int* begin;
  int* length;
  int32_t* weights;  // one row of `stride` per output
  int64_t stride;
};

struct Groups {
  int64_t begin;
  int64_t count;
};

// Returns the weight groups of output pixel i, for rows that begin at input pixel `origin`.
EDGECLIP_HD inline Groups groups_of(const Resampling& filter, int64_t i, int64_t origin) {
  const Window window = filter_window(filter, i);
  const int64_t begin = (window.begin - origin) / 4 * 4;
  return {begin, (window.begin - origin + window.length - begin + 3) / 4};
}

// Sinks of a pass: ToBytes stores uint8 pixels, ToPixels normalized floats.
struct ToBytes {
  uint8_t* data;
  int64_t row_stride;
  int64_t pixel_stride;
  int64_t channel_stride;

  __device__ void operator()(int64_t row, int64_t x, int channel, uint8_t value) const {
    data[row * row_stride + x * pixel_stride + channel * channel_stride] = value;
  }
};

// One value per channel. An array indexed at run time would be placed in local memory.
struct PerChannel {
  float r, g, b;

  __device__ float operator[](int channel) const { return channel == 0 ? r : channel == 1 ? g : b; }
};

// Follows the operation order of torchvision's ToTensor and Normalize.
struct Normalization {
  PerChannel mean;
  PerChannel std;

  __device__ float operator()(int channel, int value) const {
    return (static_cast<float>(value) / 255.0f - mean[channel]) / std[channel];
  }
};

template <typename T>
struct ToPixels {
  T* data;  // first pixel after the padding
  int64_t plane;
  int64_t width;
  Normalization normalize;

  __device__ void operator()(int64_t row, int64_t x, int channel, uint8_t value) const {
    store(data + channel * plane + row * width + x, normalize(channel, value));
  }
};

__device__ inline uint8_t to_pixel(int32_t sum) {
  return static_cast<uint8_t>(min(max(sum >> kPrecisionBits, 0), 255));
}

__device__ inline int byte_of(unsigned word, int i) {
  return static_cast<int>(word >> 8 * i & 255);
}

// Four packed pixels: r g b r | g b r g | b r g b.
__device__ inline void add_group(const unsigned* words, const int4& w, int32_t (&sums)[3]) {
  const unsigned p = words[0], q = words[1], r = words[2];
  sums[0] += byte_of(p, 0) * w.x + byte_of(p, 3) * w.y + byte_of(q, 2) * w.z + byte_of(r, 1) * w.w;
  sums[1] += byte_of(p, 1) * w.x + byte_of(q, 0) * w.y + byte_of(q, 3) * w.z + byte_of(r, 2) * w.w;
  sums[2] += byte_of(p, 2) * w.x + byte_of(q, 1) * w.y + byte_of(r, 0) * w.z + byte_of(r, 3) * w.w;
}

template <typename Sink>
struct HorizontalJob {
  Source source;
  HorizontalFilter filter;
  Sink sink;
  int64_t rows;
  int rows_per_warp;
  int pitch;      // bytes of shared memory per row segment; 0: too long, read global memory
  bool is_dense;  // packed pixels in rows aligned to 16 bytes
};

// Copies the pixels [first, first + count) of a row into shared memory, by one warp. Memory past
// the end of the row stays uninitialized; its weights are zero.
__device__ inline void stage(const Source& source, bool is_dense, int64_t row, int64_t first,
                             int64_t count, uint8_t* to, int lane) {
  const uint8_t* from = source.data + row * source.row_stride + first * source.pixel_stride;
  const int bytes = 3 * static_cast<int>(min(count, source.width - first));
  const int vectors = is_dense ? bytes / static_cast<int>(sizeof(uint4)) : 0;
#pragma unroll 4
  for (int i = lane; i < vectors; i += kWarpSize) {
    reinterpret_cast<uint4*>(to)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  for (int i = vectors * static_cast<int>(sizeof(uint4)) + lane; i < bytes; i += kWarpSize) {
    to[i] = from[i / 3 * source.pixel_stride + i % 3 * source.channel_stride];
  }
}

template <typename Sink>
__device__ void sum_from_global(const HorizontalJob<Sink>& job, int64_t row, int x,
                                int32_t (&sums)[3]) {
  const Source& source = job.source;
  const auto* weights = reinterpret_cast<const int32_t*>(job.filter.weights);
  for (int i = 0; i < 4 * job.filter.groups[x]; ++i) {
    const int64_t column = job.filter.begin[x] + i;
    if (column >= source.width) return;
    const uint8_t* pixel = source.data + row * source.row_stride + column * source.pixel_stride;
    const int32_t weight =
        weights[4 * (static_cast<int64_t>(i / 4) * job.filter.outputs + x) + i % 4];
    for (int c = 0; c < 3; ++c) sums[c] += pixel[c * source.channel_stride] * weight;
  }
}

// A block computes 32 columns of several rows. Each warp has its own rows, so warps need no
// barrier.
template <typename Sink>
__global__ void __launch_bounds__(kResampleThreads)
    horizontal_kernel(const HorizontalJob<Sink> job) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int first_x = static_cast<int>(blockIdx.y) * kWarpSize;
  const int last_x = min(first_x + kWarpSize, job.filter.outputs) - 1;
  const int x = min(first_x + lane, last_x);
  const int64_t first_row =
      (static_cast<int64_t>(blockIdx.x) * kResampleWarps + warp) * job.rows_per_warp;
  const int rows = static_cast<int>(
      max(min(job.rows - first_row, static_cast<int64_t>(job.rows_per_warp)), int64_t{0}));
  const int begin = job.filter.begin[x], groups = job.filter.groups[x];
  const int first = job.filter.begin[first_x] / 16 * 16;  // pixels: 48 bytes
  const int end = job.filter.begin[last_x] + 4 * job.filter.groups[last_x];
  uint8_t* const staged =
      static_cast<uint8_t*>(shared_memory()) + warp * job.rows_per_warp * job.pitch;
  for (int i = 0; job.pitch > 0 && i < rows; ++i) {
    stage(job.source, job.is_dense, first_row + i, first, end - first, staged + i * job.pitch,
          lane);
  }
  __syncwarp();
  for (int i = 0; i < rows; ++i) {
    int32_t sums[3] = {kHalf, kHalf, kHalf};
    if (job.pitch > 0) {
      const auto* words =
          reinterpret_cast<const unsigned*>(staged + i * job.pitch + 3 * (begin - first));
#pragma unroll 4
      for (int g = 0; g < groups; ++g) {
        add_group(words + 3 * g, __ldg(job.filter.weights + g * job.filter.outputs + x), sums);
      }
    } else {
      sum_from_global(job, first_row + i, x, sums);
    }
    if (first_x + lane > last_x) continue;
    for (int c = 0; c < 3; ++c) job.sink(first_row + i, x, c, to_pixel(sums[c]));
  }
}

template <typename Sink>
struct VerticalJob {
  Source source;
  VerticalFilter filter;
  Sink sink;
  bool is_interleaved;  // consecutive threads process the channels of one pixel
};

// One thread per value of an output row.
template <typename Sink>
__global__ void __launch_bounds__(kResampleThreads) vertical_kernel(const VerticalJob<Sink> job) {
  const int64_t row = blockIdx.x;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kResampleThreads + threadIdx.x;
  const Source& source = job.source;
  if (i >= 3 * source.width) return;
  const int channel = static_cast<int>(job.is_interleaved ? i % 3 : i / source.width);
  const int64_t x = job.is_interleaved ? i / 3 : i % source.width;
  const uint8_t* from = source.data + job.filter.begin[row] * source.row_stride +
                        x * source.pixel_stride + channel * source.channel_stride;
  const int32_t* weights = job.filter.weights + row * job.filter.stride;
  const int length = job.filter.length[row];
  int32_t sum = kHalf;
#pragma unroll 8
  for (int tap = 0; tap < length; ++tap) sum += from[tap * source.row_stride] * weights[tap];
  job.sink(row, x, channel, to_pixel(sum));
}

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_RESAMPLE_CUH_
