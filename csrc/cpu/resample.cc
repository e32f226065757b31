#include "csrc/cpu/resample.h"

#include <algorithm>

#include "csrc/cpu/simd.h"

namespace edgeclip::cpu {
namespace {

constexpr int64_t kBlock = 16;  // weights per block of a dot product: the widest int32 vector

EDGECLIP_INLINE uint8_t to_pixel(int32_t sum) {
  const int32_t value = sum >> kPrecisionBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Sums the three planes together, so that each weight is loaded once.
EDGECLIP_INLINE void weigh(const int16_t* __restrict red, const int16_t* __restrict green,
                           const int16_t* __restrict blue, const int32_t* __restrict weights,
                           int64_t blocks, int32_t (&sums)[3]) {
  int32_t r = kHalf, g = kHalf, b = kHalf;
  for (int64_t i = 0; i < blocks * kBlock; ++i) {
    r += red[i] * weights[i];
    g += green[i] * weights[i];
    b += blue[i] * weights[i];
  }
  sums[0] = r;
  sums[1] = g;
  sums[2] = b;
}

EDGECLIP_INLINE void split_planes(const uint8_t* __restrict pixels, int64_t pixel_stride,
                                  int64_t channel_stride, int64_t columns, int16_t* __restrict red,
                                  int16_t* __restrict green, int16_t* __restrict blue) {
  for (int64_t x = 0; x < columns; ++x) {
    const uint8_t* pixel = pixels + x * pixel_stride;
    red[x] = pixel[0];
    green[x] = pixel[channel_stride];
    blue[x] = pixel[2 * channel_stride];
  }
}

template <Simd>
EDGECLIP_INLINE void resample_row_kernel(const uint8_t* pixels, int64_t pixel_stride,
                                         int64_t channel_stride, const RowFilter& filter,
                                         int16_t* planes, uint8_t* out) {
  const int64_t size = filter.plane_size;
  if (pixel_stride == 3 && channel_stride == 1) {
    split_planes(pixels, 3, 1, filter.columns, planes, planes + size, planes + 2 * size);
  } else {
    split_planes(pixels, pixel_stride, channel_stride, filter.columns, planes, planes + size,
                 planes + 2 * size);
  }
  const int64_t outputs = filter.outputs();
  for (int64_t i = 0; i < outputs; ++i) {
    const int32_t* weights = filter.weights.data() + i * filter.stride;
    const int16_t* red = planes + filter.begin[i];
    int32_t sums[3];
    weigh(red, red + size, red + 2 * size, weights, filter.blocks[i], sums);
    for (int channel = 0; channel < 3; ++channel) {
      out[channel * outputs + i] = to_pixel(sums[channel]);
    }
  }
}

template <Simd>
EDGECLIP_INLINE void resample_column_kernel(const uint8_t* rows, int64_t row_stride, int64_t width,
                                            const int32_t* weights, int64_t taps, int32_t* sums,
                                            uint8_t* out) {
  std::fill_n(sums, width, kHalf);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* __restrict row = rows + tap * row_stride;
    int32_t* __restrict sum = sums;
    const int32_t weight = weights[tap];
    for (int64_t x = 0; x < width; ++x) sum[x] += row[x] * weight;
  }
  for (int64_t x = 0; x < width; ++x) out[x] = to_pixel(sums[x]);
}

}  // namespace

Filter make_filter(const Axis& axis, Interpolation interpolation) {
  const Resampling resampling(axis, interpolation);
  Filter filter;
  filter.stride = resampling.max_length();
  filter.weights.resize(axis.count * filter.stride);
  std::vector<double> weights(filter.stride);
  for (int64_t i = 0; i < axis.count; ++i) {
    const Window window = filter_window(resampling, i);
    const double center = filter_center(resampling, i);
    double sum = 0.0;
    for (int64_t x = 0; x < window.length; ++x) {
      weights[x] = filter_weight(resampling, center, window.begin + x);
      sum += weights[x];
    }
    for (int64_t x = 0; x < window.length; ++x) {
      filter.weights[i * filter.stride + x] = to_fixed_point(sum != 0 ? weights[x] / sum : 0.0);
    }
    filter.begin.push_back(window.begin);
    filter.length.push_back(window.length);
  }
  return filter;
}

RowFilter::RowFilter(const Filter& filter)
    : first_column(filter.input_begin()),
      columns(filter.input_end() - filter.input_begin()),
      plane_size(columns + kBlock),
      stride((filter.stride + kBlock - 1) / kBlock * kBlock) {
  const int64_t count = static_cast<int64_t>(filter.begin.size());
  weights.resize(count * stride);
  for (int64_t i = 0; i < count; ++i) {
    begin.push_back(filter.begin[i] - first_column);
    blocks.push_back((filter.length[i] + kBlock - 1) / kBlock);
    std::copy_n(filter.weights.begin() + i * filter.stride, filter.length[i],
                weights.begin() + i * stride);
  }
}

EDGECLIP_SIMD_KERNEL(void, resample_row,
                     (const uint8_t* pixels, int64_t pixel_stride, int64_t channel_stride,
                      const RowFilter& filter, int16_t* planes, uint8_t* out),
                     (pixels, pixel_stride, channel_stride, filter, planes, out))

EDGECLIP_SIMD_KERNEL(void, resample_column,
                     (const uint8_t* rows, int64_t row_stride, int64_t width,
                      const int32_t* weights, int64_t taps, int32_t* sums, uint8_t* out),
                     (rows, row_stride, width, weights, taps, sums, out))

}  // namespace edgeclip::cpu
