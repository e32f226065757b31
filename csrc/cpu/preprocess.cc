#include <algorithm>
#include <vector>

#include "csrc/cpu/resample.h"
#include "csrc/geometry.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace edgeclip::cpu {
namespace {

constexpr double kPixelsPerThread = 1.5e5;

// Tabulates (value / 255 - mean) / std, in the operation order of torchvision's ToTensor and
// Normalize.
std::vector<float> normalization_table(const PreprocessOptions& options) {
  std::vector<float> table(3 * 256);
  for (int channel = 0; channel < 3; ++channel) {
    for (int value = 0; value < 256; ++value) {
      const float scaled = static_cast<float>(value) / 255.0f;
      table[channel * 256 + value] = (scaled - options.mean[channel]) / options.std[channel];
    }
  }
  return table;
}

struct Job {
  const TensorView& image;
  const TensorView& out;
  Placement rows, columns;
  Filter vertical;
  RowFilter horizontal;
  std::vector<float> table;

  // Returns the first pixel that the horizontal filter reads in an input row.
  const uint8_t* input(int64_t row) const {
    return image.as<const uint8_t>() + row * image.strides[0] +
           horizontal.first_column * image.strides[1];
  }
  bool packed() const { return image.strides[1] == 3 && image.strides[2] == 1; }
};

// Normalizes output row `row`, given as three planes of columns.axis.count values.
void normalize_row(const Job& job, const uint8_t* planes, int64_t row) {
  const int64_t height = job.out.shape[1], width = job.out.shape[2];
  const int64_t count = job.columns.axis.count;
  for (int64_t channel = 0; channel < 3; ++channel) {
    const float* table = job.table.data() + channel * 256;
    const uint8_t* values = planes + channel * count;
    const int64_t out_row = channel * height + job.rows.pad + row;
    float* out = job.out.as<float>() + out_row * width + job.columns.pad;
    for (int64_t x = 0; x < count; ++x) out[x] = table[values[x]];
  }
}

void resize_horizontally_first(const Job& job, int64_t threads) {
  const int64_t first = job.vertical.input_begin();
  const int64_t input_rows = job.vertical.input_end() - first;
  const int64_t size = 3 * job.columns.axis.count;
  std::vector<uint8_t> narrowed(input_rows * size);
  parallel_for(input_rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<int16_t> planes(3 * job.horizontal.plane_size);
    for (int64_t row = begin; row < end; ++row) {
      resample_row(job.input(first + row), job.image.strides[1], job.image.strides[2],
                   job.horizontal, planes.data(), narrowed.data() + row * size);
    }
  });
  parallel_for(job.rows.axis.count, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(size);
    std::vector<uint8_t> pixels(size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t input_row = job.vertical.begin[row] - first;
      resample_column(narrowed.data() + input_row * size, size, size, job.vertical.row(row),
                      job.vertical.length[row], sums.data(), pixels.data());
      normalize_row(job, pixels.data(), row);
    }
  });
}

// Copies `rows` input rows into packed RGB, for images whose pixels are not contiguous.
void pack_rows(const Job& job, int64_t first, int64_t rows, uint8_t* out) {
  for (int64_t row = first; row < first + rows; ++row) {
    const uint8_t* pixel = job.input(row);
    for (int64_t x = 0; x < job.horizontal.columns; ++x, pixel += job.image.strides[1]) {
      for (int channel = 0; channel < 3; ++channel) *out++ = pixel[channel * job.image.strides[2]];
    }
  }
}

void resize_vertically_first(const Job& job, int64_t threads) {
  const int64_t size = 3 * job.horizontal.columns;
  parallel_for(job.rows.axis.count, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(size);
    std::vector<uint8_t> shortened(size), pixels(3 * job.columns.axis.count);
    std::vector<uint8_t> copy(job.packed() ? 0 : job.vertical.stride * size);
    std::vector<int16_t> planes(3 * job.horizontal.plane_size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = job.vertical.begin[row], taps = job.vertical.length[row];
      if (!job.packed()) pack_rows(job, first, taps, copy.data());
      resample_column(job.packed() ? job.input(first) : copy.data(),
                      job.packed() ? job.image.strides[0] : size, size, job.vertical.row(row), taps,
                      sums.data(), shortened.data());
      resample_row(shortened.data(), 3, 1, job.horizontal, planes.data(), pixels.data());
      normalize_row(job, pixels.data(), row);
    }
  });
}

void fill_padding(const Job& job, int64_t fill) {
  const int64_t plane = job.out.shape[1] * job.out.shape[2];
  if (job.rows.axis.count * job.columns.axis.count == plane) return;
  for (int64_t channel = 0; channel < 3; ++channel) {
    std::fill_n(job.out.as<float>() + channel * plane, plane, job.table[channel * 256 + fill]);
  }
}

}  // namespace

void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options) {
  const Geometry geometry = make_geometry(image, out, options.resize);
  const Job job{image,
                out,
                geometry.rows,
                geometry.columns,
                make_filter(geometry.rows.axis, options.interpolation),
                RowFilter(make_filter(geometry.columns.axis, options.interpolation)),
                normalization_table(options)};
  const int64_t input_rows = job.vertical.input_end() - job.vertical.input_begin();
  const double pixels = static_cast<double>(input_rows) * job.horizontal.columns;
  const int64_t threads =
      options.threads > 0 ? options.threads : automatic_threads(pixels, kPixelsPerThread);
  fill_padding(job, options.fill);
  if (geometry.vertically_first) {
    resize_vertically_first(job, threads);
  } else {
    resize_horizontally_first(job, threads);
  }
}

}  // namespace edgeclip::cpu
