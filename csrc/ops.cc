#include "csrc/ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "csrc/cpu/simd.h"

namespace edgeclip {
namespace {

constexpr int64_t kAny = -1;

[[noreturn]] void fail(const char* op, const std::string& message) {
  throw std::invalid_argument("[" + std::string(op) + "] " + message);
}

// Returns the enumerator whose name is at the same position in `names`.
template <typename Enum, size_t kCount>
Enum parse_enum(const char* option, const std::array<const char*, kCount>& names,
                const std::string& name) {
  std::string choices;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    choices += std::string(i == 0 ? "'" : i + 1 < kCount ? ", '" : " or '") + names[i] + "'";
  }
  fail("preprocess", "expected " + std::string(option) + " " + choices + ", got '" + name + "'");
}

std::string tuple(const std::vector<std::string>& items) {
  std::string text = "(";
  for (size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + items[i];
  return text + (items.size() == 1 ? ",)" : ")");
}

std::string tuple(const std::vector<int64_t>& shape) {
  std::vector<std::string> items;
  for (int64_t size : shape) items.push_back(std::to_string(size));
  return tuple(items);
}

// As in NumPy, an array without elements is contiguous whatever its strides.
bool is_contiguous(const TensorView& view) {
  if (std::count(view.shape.begin(), view.shape.end(), 0) > 0) return true;
  int64_t expected = view.dtype.bytes;
  for (size_t axis = view.shape.size(); axis-- > 0;) {
    if (view.shape[axis] != 1 && view.strides[axis] != expected) return false;
    expected *= view.shape[axis];
  }
  return true;
}

bool is_aligned(const TensorView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(view.dtype.bytes) == 0;
}

// Expected shape and dtype of an argument. A size of kAny matches any size; messages show its
// letter.
struct Expected {
  const char* name;
  std::vector<int64_t> shape;
  std::vector<const char*> letters;
  DType dtype;

  std::string text() const {
    std::vector<std::string> items;
    for (size_t i = 0; i < shape.size(); ++i) {
      items.push_back(shape[i] == kAny ? letters[i] : std::to_string(shape[i]));
    }
    return std::string(name) + " " + tuple(items) + " " + dtype.name();
  }
};

void check_shape(const char* op, const TensorView& view, const Expected& expected) {
  bool matches = view.dtype == expected.dtype && view.shape.size() == expected.shape.size();
  for (size_t i = 0; matches && i < view.shape.size(); ++i) {
    matches = expected.shape[i] == kAny || expected.shape[i] == view.shape[i];
  }
  if (!matches) {
    fail(op,
         "expected " + expected.text() + ", got " + tuple(view.shape) + " " + view.dtype.name());
  }
}

void check_dense(const char* op, const TensorView& view, const Expected& expected) {
  check_shape(op, view, expected);
  const std::string name = expected.name;
  if (!is_contiguous(view)) {
    fail(op, "expected " + name + " to be C-contiguous, got strides " + tuple(view.strides) +
                 " for shape " + tuple(view.shape));
  }
  if (!is_aligned(view)) fail(op, "expected " + name + " to be aligned to its element size");
}

void check_writable(const char* op, const TensorView& view, const char* name) {
  if (!view.writable) fail(op, "expected " + std::string(name) + " to be writable");
}

void check_device(const char* op, const TensorView& view, const char* name, Device device) {
  const auto text = [](Device d) { return std::string(d == Device::kCpu ? "CPU" : "CUDA"); };
  if (view.device != device && !view.pinned) {
    fail(op, "expected " + std::string(name) + " in " + text(device) + " memory, got " +
                 text(view.device));
  }
}

// Returns the dtype to expect: float16 is supported on the GPU only.
DType float_type(const TensorView& view) {
  return view.device == Device::kCuda && view.dtype == kFloat16 ? kFloat16 : kFloat32;
}

void check_output(const char* op, const TensorView& view, const Expected& expected, Device device) {
  // Without CUDA support, let the operation itself report that.
  if (device == Device::kCuda && !cuda::built()) return;
  check_device(op, view, expected.name, device);
  check_dense(op, view, expected);
  check_writable(op, view, expected.name);
}

void check_step_size(const char* op, double step_size) {
  if (!std::isfinite(step_size) || step_size < 0) {
    fail(op, "expected a finite step_size >= 0, got " + std::to_string(step_size));
  }
}

void check_purify_options(const char* op, const PurifyOptions& options) {
  if (options.steps < 0) fail(op, "expected steps >= 0, got " + std::to_string(options.steps));
  check_step_size(op, options.step_size);
}

void check_normalization(const PreprocessOptions& options) {
  const char* op = "preprocess";
  for (const auto* values : {&options.mean, &options.std}) {
    const std::string name = values == &options.mean ? "mean" : "std";
    if (values->size() != 3) {
      fail(op, "expected " + name + " of 3 values, got " + std::to_string(values->size()));
    }
    for (float value : *values) {
      if (!std::isfinite(value)) fail(op, "expected finite " + name);
    }
  }
  for (float value : options.std) {
    if (value == 0) fail(op, "expected nonzero std");
  }
}

void check_preprocess(const TensorView& image, const TensorView& out,
                      const PreprocessOptions& options) {
  const char* op = "preprocess";
  check_shape(op, image, {"image", {kAny, kAny, 3}, {"H", "W", ""}, kUint8});
  check_dense(op, out, {"out", {3, kAny, kAny}, {"", "h", "w"}, float_type(out)});
  check_writable(op, out, "out");
  for (int64_t side : {image.shape[0], image.shape[1], out.shape[1], out.shape[2]}) {
    if (side == 0 || side > std::numeric_limits<int32_t>::max()) {
      fail(op, "expected sides of 1 to 2147483647 pixels, got image " + tuple(image.shape) +
                   " and out " + tuple(out.shape));
    }
  }
  check_normalization(options);
  if (options.fill < 0 || options.fill > 255) {
    fail(op, "expected fill in 0..255, got " + std::to_string(options.fill));
  }
  if (options.threads < 0) {
    fail(op, "expected threads >= 0, got " + std::to_string(options.threads));
  }
}

void check_optional_row(const char* op, const std::optional<TensorView>& view, const char* name,
                        int64_t size, const char* letter, Device device) {
  if (!view) return;
  check_dense(op, *view, {name, {size}, {letter}, kFloat32});
  check_device(op, *view, name, device);
}

}  // namespace

std::string DType::name() const {
  const std::string bits = std::to_string(8 * bytes);
  const std::string order = native_order ? "" : " (byte-swapped)";
  switch (kind) {
    case 'b':
      return "bool";
    case 'i':
      return "int" + bits + order;
    case 'u':
      return "uint" + bits + order;
    case 'f':
      return "float" + bits + order;
    case 'c':
      return "complex" + bits + order;
    default:
      return std::string("dtype kind '") + kind + "'";
  }
}

Resize parse_resize(const std::string& name) {
  return parse_enum<Resize>("resize", kResizeNames, name);
}

Interpolation parse_interpolation(const std::string& name) {
  return parse_enum<Interpolation>("interpolation", kInterpolationNames, name);
}

void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options,
                const CudaOptions& cuda) {
  check_preprocess(image, out, options);
  const bool on_gpu = image.device == Device::kCuda || out.device == Device::kCuda;
  const Device device = on_gpu ? Device::kCuda : Device::kCpu;
  check_device("preprocess", image, "image", device);
  check_device("preprocess", out, "out", device);
  if (on_gpu) return cuda::preprocess(image, out, options, cuda);
  cpu::preprocess(image, out, options);
}

std::array<int64_t, 2> check_purify_cos(const TensorView& embeddings, const TensorView& null_text,
                                        const PurifyOptions& options) {
  const char* op = "purify_cos";
  check_dense(op, embeddings, {"embeddings", {kAny, kAny}, {"N", "D"}, float_type(embeddings)});
  const int64_t samples = embeddings.shape[0], dim = embeddings.shape[1];
  if (dim == 0) fail(op, "expected embeddings with D >= 1, got " + tuple(embeddings.shape));
  check_dense(op, null_text, {"null_text", {dim}, {""}, kFloat32});
  check_device(op, null_text, "null_text", embeddings.device);
  check_purify_options(op, options);
  return {samples, dim};
}

void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options, const CudaOptions& cuda) {
  check_purify_cos(embeddings, null_text, options);
  const Device device = embeddings.device;
  check_output("purify_cos", out, {"out", embeddings.shape, {}, embeddings.dtype}, device);
  if (device == Device::kCuda) return cuda::purify_cos(embeddings, null_text, out, options, cuda);
  cpu::purify_cos(embeddings, null_text, out, options);
}

// CPU only: the gradients come from ONNX Runtime in host memory.
std::array<int64_t, 2> check_polar_step(const TensorView& embeddings, const TensorView& gradients,
                                        double step_size) {
  const char* op = "polar_step";
  check_dense(op, embeddings, {"embeddings", {kAny, kAny}, {"N", "D"}, kFloat32});
  check_device(op, embeddings, "embeddings", Device::kCpu);
  const int64_t samples = embeddings.shape[0], dim = embeddings.shape[1];
  if (dim == 0) fail(op, "expected embeddings with D >= 1, got " + tuple(embeddings.shape));
  check_dense(op, gradients, {"gradients", {samples, dim}, {}, kFloat32});
  check_device(op, gradients, "gradients", Device::kCpu);
  check_step_size(op, step_size);
  return {samples, dim};
}

void polar_step(const TensorView& embeddings, const TensorView& gradients, const TensorView& out,
                double step_size) {
  check_polar_step(embeddings, gradients, step_size);
  check_dense("polar_step", out, {"out", embeddings.shape, {}, kFloat32});
  check_writable("polar_step", out, "out");
  cpu::polar_step(embeddings, gradients, out, step_size);
}

ClassifySizes check_classify(const ClassifyInputs& inputs, const ClassifyOptions& options) {
  const char* op = "classify";
  check_dense(op, inputs.classes,
              {"classes", {kAny, kAny}, {"K", "D"}, float_type(inputs.classes)});
  const int64_t classes = inputs.classes.shape[0], dim = inputs.classes.shape[1];
  if (classes < 1 || dim < 1 || classes > std::numeric_limits<int32_t>::max()) {
    fail(op, "expected classes (K, D) with K, D >= 1, got " + tuple(inputs.classes.shape));
  }
  check_dense(op, inputs.embeddings, {"embeddings", {kAny, dim}, {"N", ""}, inputs.classes.dtype});
  const Device device = inputs.embeddings.device;
  check_device(op, inputs.classes, "classes", device);
  check_optional_row(op, inputs.null_text, "null_text", dim, "", device);
  check_optional_row(op, inputs.null_scores, "null_scores", classes, "", device);
  check_purify_options(op, options.purify);
  if (options.purify.steps > 0 && !(inputs.null_text && inputs.null_scores)) {
    fail(op, "expected null_text and null_scores with steps > 0");
  }
  if (!std::isfinite(static_cast<float>(options.logit_scale)) ||
      !std::isfinite(static_cast<float>(options.logit_bias))) {
    fail(op, "expected finite logit_scale and logit_bias");
  }
  if (options.top_k < 1) fail(op, "expected top_k >= 1, got " + std::to_string(options.top_k));
  return {inputs.embeddings.shape[0], dim, classes, std::min(options.top_k, classes)};
}

void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const CudaOptions& cuda) {
  const char* op = "classify";
  const ClassifySizes sizes = check_classify(inputs, options);
  const Device device = inputs.embeddings.device;
  const std::vector<int64_t> top = {sizes.samples, sizes.top_k};
  check_output(op, outputs.indices, {"out_indices", top, {}, kInt32}, device);
  check_output(op, outputs.probabilities, {"out_probabilities", top, {}, kFloat32}, device);
  if (outputs.logits) {
    const std::vector<int64_t> all = {sizes.samples, sizes.classes};
    check_output(op, *outputs.logits, {"out_logits", all, {}, kFloat32}, device);
  }
  if (device == Device::kCuda) return cuda::classify(inputs, outputs, options, sizes, cuda);
  cpu::classify(inputs, outputs, options, sizes);
}

int64_t preprocess_workspace(const TensorView& image, const TensorView& out,
                             const PreprocessOptions& options) {
  check_preprocess(image, out, options);
  return cuda::preprocess_workspace(image, out, options);
}

int64_t classify_workspace(int64_t samples, int64_t classes) {
  if (samples < 0 || classes < 1 || classes > std::numeric_limits<int32_t>::max()) {
    fail("classify_workspace", "expected samples >= 0 and classes >= 1, got " +
                                   std::to_string(samples) + " and " + std::to_string(classes));
  }
  return cuda::classify_workspace({samples, 0, classes, 0});
}

bool cuda_built() { return cuda::built(); }

std::string simd() { return simd_name(simd_level()); }

}  // namespace edgeclip
