#include <algorithm>
#include <cmath>
#include <vector>

#include "csrc/cpu/resample.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace edgeclip::cpu {
namespace {

constexpr double kPixelsPerThread = 1e6;

// An axis of the image and where the wanted pixels go: target[pad, pad + count).
struct Placement {
  Axis axis;
  int64_t pad;
};

struct Size {
  int64_t height;
  int64_t width;
};

// Python's round(): to the nearest, halves to the even one.
int64_t round_half_even(double x) { return static_cast<int64_t>(std::nearbyint(x)); }

// torchvision's Resize(size): the shorter edge becomes `size`, the longer one is truncated.
int64_t longer_edge(int64_t size, int64_t longer, int64_t shorter) {
  return static_cast<int64_t>(static_cast<double>(size * longer) / static_cast<double>(shorter));
}

// The sizes to which open_clip's image_transform(is_train=False) resizes, before crop and padding.
Size resized(const Size& image, const Size& target, Resize resize) {
  if (resize == Resize::kSquash) return target;
  if (resize == Resize::kShortest && target.height == target.width) {
    if (image.width <= image.height) {
      return {longer_edge(target.width, image.height, image.width), target.width};
    }
    return {target.height, longer_edge(target.height, image.width, image.height)};
  }
  const double height = image.height, width = image.width;
  const double ratio_height = height / target.height, ratio_width = width / target.width;
  const double ratio = resize == Resize::kLongest ? std::max(ratio_height, ratio_width)
                                                  : std::min(ratio_height, ratio_width);
  // The thinnest images would vanish (and Pillow refuses them): one pixel of them stays.
  return {std::max<int64_t>(round_half_even(height / ratio), 1),
          std::max<int64_t>(round_half_even(width / ratio), 1)};
}

Placement place(int64_t input, int64_t resized, int64_t target) {
  if (resized < target) return {{input, resized, 0, resized}, (target - resized) / 2};
  const int64_t first = round_half_even(static_cast<double>(resized - target) / 2.0);
  return {{input, resized, first, target}, 0};
}

// Each pass rounds to whole pixels, so their order shows. This is Pillow's since version 13 (pull
// request 9549): vertically first where that shrinks the height much more than the width.
bool vertically_first(const Size& image, const Size& scaled) {
  const int64_t shorter = image.height - scaled.height, narrower = image.width - scaled.width;
  return shorter > 0 && shorter > 2 * narrower;
}

// value -> (value / 255 - mean) / std, in the order of torchvision's ToTensor and Normalize.
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

  // The pixel of an input row at which the horizontal filter begins.
  const uint8_t* input(int64_t row) const {
    return image.as<const uint8_t>() + row * image.strides[0] +
           horizontal.first_column * image.strides[1];
  }
  bool packed() const { return image.strides[1] == 3 && image.strides[2] == 1; }
};

// Row `row` of the wanted ones, as planes of columns.axis.count values.
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

// Copies `rows` input rows into packed RGB, for images whose pixels do not lie side by side.
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
  const Size size = {image.shape[0], image.shape[1]};
  const Size target = {out.shape[1], out.shape[2]};
  const Size scaled = resized(size, target, options.resize);
  const Placement rows = place(size.height, scaled.height, target.height);
  const Placement columns = place(size.width, scaled.width, target.width);
  const Job job{image,
                out,
                rows,
                columns,
                make_filter(rows.axis, options.interpolation),
                RowFilter(make_filter(columns.axis, options.interpolation)),
                normalization_table(options)};
  const int64_t input_rows = job.vertical.input_end() - job.vertical.input_begin();
  const double pixels = static_cast<double>(input_rows) * job.horizontal.columns;
  const int64_t threads =
      options.threads > 0 ? options.threads : automatic_threads(pixels, kPixelsPerThread);
  fill_padding(job, options.fill);
  if (vertically_first(size, scaled)) {
    resize_vertically_first(job, threads);
  } else {
    resize_horizontally_first(job, threads);
  }
}

}  // namespace edgeclip::cpu
