#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "csrc/cuda/check.cuh"
#include "csrc/cuda/resample.cuh"
#include "csrc/cuda/warp.cuh"
#include "csrc/cuda/workspace.h"
#include "csrc/geometry.h"
#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

constexpr const char* kOp = "preprocess";
constexpr int kSharedBudget = 48 << 10;  // bytes available to a block on every GPU without opt-in
constexpr int kRowsPerWarp = 2;

// The plan of a resize: the input region it reads, and the sizes of its scratch memory.
struct Plan {
  Plan(const TensorView& image, const TensorView& out, const PreprocessOptions& options)
      : geometry(make_geometry(image, out, options.resize)),
        rows(geometry.rows.axis, options.interpolation),
        columns(geometry.columns.axis, options.interpolation) {
    first_row = filter_window(rows, 0).begin;
    input_rows = end_of(rows, geometry.rows.axis.count) - first_row;
    first_column = filter_window(columns, 0).begin;
    input_columns = end_of(columns, geometry.columns.axis.count) - first_column;
    // Image rows begin at column 0; rows of the intermediate image begin at the first column
    // needed.
    origin = geometry.vertically_first ? first_column : 0;
    row_bytes = geometry.vertically_first ? (3 * input_columns + 15) / 16 * 16
                                          : 3 * geometry.columns.axis.count;
  }

  static int64_t end_of(const Resampling& filter, int64_t count) {
    const Window last = filter_window(filter, count - 1);
    return last.begin + last.length;
  }
  int64_t output_rows() const { return geometry.rows.axis.count; }
  int64_t output_columns() const { return geometry.columns.axis.count; }
  int64_t rows_between() const { return geometry.vertically_first ? output_rows() : input_rows; }

  Geometry geometry;
  Resampling rows;
  Resampling columns;
  int64_t first_row;
  int64_t input_rows;
  int64_t first_column;
  int64_t input_columns;
  int64_t origin;
  int64_t row_bytes;  // of the intermediate image, between the two passes
};

struct Scratch {
  HorizontalFilter horizontal;
  VerticalFilter vertical;
  uint8_t* between;
};

Scratch take_scratch(Workspace& workspace, const Plan& plan) {
  const int64_t outputs = plan.output_columns();
  const int64_t max_groups = plan.columns.max_length() / 4 + 2;
  Scratch scratch{};
  scratch.horizontal.outputs = static_cast<int>(outputs);
  scratch.horizontal.begin = workspace.take<int>(outputs);
  scratch.horizontal.groups = workspace.take<int>(outputs);
  scratch.horizontal.weights = workspace.take<int4>(outputs * max_groups);
  scratch.vertical.stride = plan.rows.max_length();
  scratch.vertical.begin = workspace.take<int>(plan.output_rows());
  scratch.vertical.length = workspace.take<int>(plan.output_rows());
  scratch.vertical.weights = workspace.take<int32_t>(plan.output_rows() * scratch.vertical.stride);
  scratch.between = workspace.take<uint8_t>(plan.rows_between() * plan.row_bytes);
  return scratch;
}

struct FilterJob {
  Resampling rows;
  Resampling columns;
  int64_t origin;
  int64_t first_row;
  HorizontalFilter horizontal;
  VerticalFilter vertical;
};

// Sums in the CPU path's order: in double, another order would change the result.
__device__ double sum_of_weights(const Resampling& filter, const Window& window, double center,
                                 int lane) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < window.length; begin += kWarpSize) {
    const double weight = filter_weight(filter, center, window.begin + begin + lane);
    const int count = static_cast<int>(min(window.length - begin, int64_t{kWarpSize}));
    for (int i = 0; i < count; ++i) sum += __shfl_sync(kAllLanes, weight, i);
  }
  return sum;
}

// Computes the weights of both filters, one warp per window. A table copied from the host would
// have to stay alive and unchanged as long as a CUDA graph may replay the copy.
__global__ void __launch_bounds__(kWarpSize) filter_kernel(const FilterJob job) {
  const int lane = static_cast<int>(threadIdx.x);
  const bool horizontal = static_cast<int>(blockIdx.x) < job.horizontal.outputs;
  const int64_t i = static_cast<int64_t>(blockIdx.x) - (horizontal ? 0 : job.horizontal.outputs);
  const Resampling& filter = horizontal ? job.columns : job.rows;
  const Window window = filter_window(filter, i);
  const double center = filter_center(filter, i);
  const double sum = sum_of_weights(filter, window, center, lane);
  const auto weight_of = [&](int64_t x) {
    if (x < window.begin || x >= window.begin + window.length || sum == 0) return int32_t{0};
    return to_fixed_point(filter_weight(filter, center, x) / sum);
  };
  if (horizontal) {
    const Groups groups = groups_of(filter, i, job.origin);
    if (lane == 0) {
      job.horizontal.begin[i] = static_cast<int>(groups.begin);
      job.horizontal.groups[i] = static_cast<int>(groups.count);
    }
    for (int64_t g = lane; g < groups.count; g += kWarpSize) {
      const int64_t x = job.origin + groups.begin + 4 * g;
      job.horizontal.weights[g * job.horizontal.outputs + i] =
          make_int4(weight_of(x), weight_of(x + 1), weight_of(x + 2), weight_of(x + 3));
    }
    return;
  }
  if (lane == 0) {
    job.vertical.begin[i] = static_cast<int>(window.begin - job.first_row);
    job.vertical.length[i] = static_cast<int>(window.length);
  }
  for (int64_t tap = lane; tap < window.length; tap += kWarpSize) {
    job.vertical.weights[i * job.vertical.stride + tap] = weight_of(window.begin + tap);
  }
}

template <typename T>
struct FillJob {
  T* out;
  int64_t plane;
  Normalization normalize;
  int value;
};

template <typename T>
__global__ void __launch_bounds__(kResampleThreads) fill_kernel(const FillJob<T> job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kResampleThreads + threadIdx.x;
  if (i >= 3 * job.plane) return;
  store(job.out + i, job.normalize(static_cast<int>(i / job.plane), job.value));
}

unsigned blocks_for(int64_t count, int64_t per_block) {
  // Saturates, so that CUDA still rejects too many blocks.
  return static_cast<unsigned>(
      std::min<int64_t>((count + per_block - 1) / per_block, std::numeric_limits<unsigned>::max()));
}

// Returns the longest input segment, in pixels, that 32 neighboring outputs read.
int64_t longest_segment(const Plan& plan) {
  int64_t longest = 0;
  for (int64_t first = 0; first < plan.output_columns(); first += kWarpSize) {
    const int64_t last = std::min(first + kWarpSize, plan.output_columns()) - 1;
    const int64_t begin = groups_of(plan.columns, first, plan.origin).begin / 16 * 16;
    const Groups end = groups_of(plan.columns, last, plan.origin);
    longest = std::max(longest, end.begin + 4 * end.count - begin);
  }
  return longest;
}

template <typename Sink>
void run_horizontal(const Plan& plan, const HorizontalFilter& filter, const Source& source,
                    const Sink& sink, cudaStream_t stream) {
  const int64_t pitch = (3 * longest_segment(plan) + 15) / 16 * 16;
  HorizontalJob<Sink> job{source, filter, sink, plan.rows_between(), kRowsPerWarp, 0, false};
  if (job.rows_per_warp * kResampleWarps * pitch > kSharedBudget) job.rows_per_warp = 1;
  if (kResampleWarps * pitch <= kSharedBudget) job.pitch = static_cast<int>(pitch);
  job.is_dense = source.pixel_stride == 3 && source.channel_stride == 1 &&
                 source.row_stride % 16 == 0 && reinterpret_cast<uintptr_t>(source.data) % 16 == 0;
  const int rows_per_block = kResampleWarps * job.rows_per_warp;
  const dim3 grid(blocks_for(job.rows, rows_per_block), blocks_for(filter.outputs, kWarpSize));
  launch(kOp, "horizontal_kernel", horizontal_kernel<Sink>, grid, dim3(kResampleThreads),
         static_cast<size_t>(rows_per_block) * job.pitch, stream, job);
}

template <typename Sink>
void run_vertical(const Plan& plan, const VerticalFilter& filter, const Source& source,
                  const Sink& sink, cudaStream_t stream) {
  const VerticalJob<Sink> job{source, filter, sink, std::is_same_v<Sink, ToBytes>};
  const dim3 grid(blocks_for(plan.output_rows(), 1),
                  blocks_for(3 * source.width, kResampleThreads));
  launch(kOp, "vertical_kernel", vertical_kernel<Sink>, grid, dim3(kResampleThreads), 0, stream,
         job);
}

template <typename T>
void run(const Plan& plan, const Scratch& scratch, const TensorView& image, const TensorView& out,
         const PreprocessOptions& options, cudaStream_t stream) {
  const int64_t width = out.shape[2], plane = out.shape[1] * width;
  const auto &mean = options.mean, &std = options.std;
  const Normalization normalize{{mean[0], mean[1], mean[2]}, {std[0], std[1], std[2]}};
  if (plan.output_rows() * plan.output_columns() != plane) {
    launch(kOp, "fill_kernel", fill_kernel<T>, dim3(blocks_for(3 * plane, kResampleThreads)),
           dim3(kResampleThreads), 0, stream,
           FillJob<T>{out.as<T>(), plane, normalize, static_cast<int>(options.fill)});
  }
  const Placement &rows = plan.geometry.rows, &columns = plan.geometry.columns;
  const ToPixels<T> pixels{out.as<T>() + rows.pad * width + columns.pad, plane, width, normalize};
  const uint8_t* first_row = image.as<const uint8_t>() + plan.first_row * image.strides[0];
  if (plan.geometry.vertically_first) {
    const Source source{first_row + plan.first_column * image.strides[1], plan.input_columns,
                        image.strides[0], image.strides[1], image.strides[2]};
    run_vertical(plan, scratch.vertical, source, ToBytes{scratch.between, plan.row_bytes, 3, 1},
                 stream);
    const Source between{scratch.between, plan.input_columns, plan.row_bytes, 3, 1};
    run_horizontal(plan, scratch.horizontal, between, pixels, stream);
  } else {
    const Source source{first_row, image.shape[1], image.strides[0], image.strides[1],
                        image.strides[2]};
    const int64_t count = plan.output_columns();
    run_horizontal(plan, scratch.horizontal, source,
                   ToBytes{scratch.between, plan.row_bytes, 1, count}, stream);
    const Source between{scratch.between, count, plan.row_bytes, 1, count};
    run_vertical(plan, scratch.vertical, between, pixels, stream);
  }
}

}  // namespace

int64_t preprocess_workspace(const TensorView& image, const TensorView& out,
                             const PreprocessOptions& options) {
  Workspace workspace;
  take_scratch(workspace, Plan(image, out, options));
  return workspace.bytes();
}

void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options,
                const CudaOptions& cuda) {
  const Plan plan(image, out, options);
  Workspace needed;
  take_scratch(needed, plan);
  Workspace workspace(kOp, cuda, needed.bytes());
  const Scratch scratch = take_scratch(workspace, plan);
  const auto stream = reinterpret_cast<cudaStream_t>(cuda.stream);
  const int64_t windows = plan.output_columns() + plan.output_rows();
  launch(kOp, "filter_kernel", filter_kernel, dim3(blocks_for(windows, 1)), dim3(kWarpSize), 0,
         stream,
         FilterJob{plan.rows, plan.columns, plan.origin, plan.first_row, scratch.horizontal,
                   scratch.vertical});
  out.dtype == kFloat16 ? run<__half>(plan, scratch, image, out, options, stream)
                        : run<float>(plan, scratch, image, out, options, stream);
}

}  // namespace edgeclip::cuda
