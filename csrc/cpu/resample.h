#ifndef EDGECLIP_CPU_RESAMPLE_H_
#define EDGECLIP_CPU_RESAMPLE_H_

#include <cstdint>
#include <vector>

#include "csrc/filter.h"
#include "csrc/ops.h"

namespace edgeclip::cpu {

// For each wanted pixel, the input pixels [begin, begin + length) and their weights. The arithmetic
// is that of Pillow's 8-bit resampling, fixed point with 22 fractional bits, so that the pixels are
// equal to Pillow's bit for bit.
struct Filter {
  std::vector<int64_t> begin;
  std::vector<int64_t> length;
  std::vector<int32_t> weights;  // one row of `stride` per wanted pixel, zero after its length
  int64_t stride = 0;

  const int32_t* row(int64_t i) const { return weights.data() + i * stride; }
  int64_t input_begin() const { return begin.front(); }
  int64_t input_end() const { return begin.back() + length.back(); }
};

Filter make_filter(const Axis& axis, Interpolation interpolation);

// A filter along a row of pixels, whose weights are padded with zeros to whole blocks so that the
// dot products need no scalar remainder.
struct RowFilter {
  explicit RowFilter(const Filter& filter);

  int64_t outputs() const { return static_cast<int64_t>(begin.size()); }

  int64_t first_column;         // of the image
  int64_t columns;              // that are read
  int64_t plane_size;           // columns, and the zeros that the last block reads past them
  std::vector<int64_t> begin;   // from first_column on
  std::vector<int64_t> blocks;  // of weights
  std::vector<int32_t> weights;
  int64_t stride;
};

// One row of RGB pixels, from the filter's first column on: resamples it into out[3][outputs].
// `planes` is scratch of 3 * plane_size values, zero at first.
void resample_row(const uint8_t* pixels, int64_t pixel_stride, int64_t channel_stride,
                  const RowFilter& filter, int16_t* planes, uint8_t* out);

// One output row: the weighted sum of `taps` rows of `width` values, `row_stride` bytes apart.
// `sums` is scratch of `width`.
void resample_column(const uint8_t* rows, int64_t row_stride, int64_t width, const int32_t* weights,
                     int64_t taps, int32_t* sums, uint8_t* out);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_RESAMPLE_H_
