#ifndef EDGECLIP_CPU_RESAMPLE_H_
#define EDGECLIP_CPU_RESAMPLE_H_

#include <cstdint>
#include <vector>

#include "csrc/filter.h"
#include "csrc/ops.h"

namespace edgeclip::cpu {

// For each output pixel, the input pixels [begin, begin + length) and their weights. Fixed point
// with 22 fractional bits, as in Pillow's 8-bit resampling, so that pixels equal Pillow's bit for
// bit.
struct Filter {
  std::vector<int64_t> begin;
  std::vector<int64_t> length;
  std::vector<int32_t> weights;  // one row of `stride` per output pixel, zero-padded
  int64_t stride = 0;

  const int32_t* row(int64_t i) const { return weights.data() + i * stride; }
  int64_t input_begin() const { return begin.front(); }
  int64_t input_end() const { return begin.back() + length.back(); }
};

Filter make_filter(const Axis& axis, Interpolation interpolation);

// A filter along a row of pixels. Its weights are zero-padded to whole blocks, so that dot products
// need no scalar remainder.
struct RowFilter {
  explicit RowFilter(const Filter& filter);

  int64_t outputs() const { return static_cast<int64_t>(begin.size()); }

  int64_t first_column;         // first column read
  int64_t columns;              // number of columns read
  int64_t plane_size;           // columns, plus zeros that the last block reads past them
  std::vector<int64_t> begin;   // relative to first_column
  std::vector<int64_t> blocks;  // blocks of weights per output pixel
  std::vector<int32_t> weights;
  int64_t stride;
};

// Resamples a row of RGB pixels, which begins at the filter's first column, into out[3][outputs].
// `planes` is scratch of 3 * plane_size values, initially zero.
void resample_row(const uint8_t* pixels, int64_t pixel_stride, int64_t channel_stride,
                  const RowFilter& filter, int16_t* planes, uint8_t* out);

// Computes one output row: the weighted sum of `taps` rows of `width` values, `row_stride` bytes
// apart. `sums` is scratch of `width` values.
void resample_column(const uint8_t* rows, int64_t row_stride, int64_t width, const int32_t* weights,
                     int64_t taps, int32_t* sums, uint8_t* out);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_RESAMPLE_H_
