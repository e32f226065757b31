#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "csrc/arrays.h"
#include "csrc/math.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace py = pybind11;

namespace edgeclip {
namespace {

CudaOptions cuda_options(const char* op, const py::object& workspace, uintptr_t stream) {
  return {stream, optional_view_of(op, "workspace", workspace, stream)};
}

template <typename T>
py::object output_or_empty(const py::object& out, const std::array<int64_t, 2>& shape) {
  return out.is_none() ? py::array_t<T>(shape) : out;
}

void preprocess_py(const py::object& image, const py::object& out, std::vector<float> mean,
                   std::vector<float> std, const std::string& resize,
                   const std::string& interpolation, int64_t fill, int64_t threads,
                   const py::object& workspace, uintptr_t stream) {
  const TensorView image_view = view_of("preprocess", "image", image, stream);
  const TensorView out_view = view_of("preprocess", "out", out, stream);
  const CudaOptions cuda = cuda_options("preprocess", workspace, stream);
  const PreprocessOptions options{std::move(mean),
                                  std::move(std),
                                  parse_resize(resize),
                                  parse_interpolation(interpolation),
                                  fill,
                                  threads};
  py::gil_scoped_release release;
  preprocess(image_view, out_view, options, cuda);
}

int64_t preprocess_workspace_py(const py::object& image, const py::object& out,
                                const std::string& resize, const std::string& interpolation) {
  return preprocess_workspace(
      view_of("preprocess", "image", image), view_of("preprocess", "out", out),
      {{0, 0, 0}, {1, 1, 1}, parse_resize(resize), parse_interpolation(interpolation)});
}

py::object purify_cos_py(const py::object& embeddings, const py::object& null_text, int64_t steps,
                         double step_size, const py::object& out, uintptr_t stream) {
  const TensorView embeddings_view = view_of("purify_cos", "embeddings", embeddings, stream);
  const TensorView null_text_view = view_of("purify_cos", "null_text", null_text, stream);
  const PurifyOptions options{steps, step_size};
  const auto shape = check_purify_cos(embeddings_view, null_text_view, options);
  py::object result = output_or_empty<float>(out, shape);
  const TensorView out_view = view_of("purify_cos", "out", result, stream);
  py::gil_scoped_release release;
  purify_cos(embeddings_view, null_text_view, out_view, options, {stream, std::nullopt});
  return result;
}

py::array_t<float> polar_step_py(const py::object& embeddings, const py::object& gradients,
                                 double step_size) {
  const TensorView embeddings_view = view_of("polar_step", "embeddings", embeddings);
  const TensorView gradients_view = view_of("polar_step", "gradients", gradients);
  py::array_t<float> out(check_polar_step(embeddings_view, gradients_view, step_size));
  const TensorView out_view = view_of("polar_step", "out", out);
  py::gil_scoped_release release;
  polar_step(embeddings_view, gradients_view, out_view, step_size);
  return out;
}

py::tuple classify_py(const py::object& embeddings, const py::object& classes, double logit_scale,
                      double logit_bias, const py::object& null_text, const py::object& null_scores,
                      int64_t steps, double step_size, int64_t top_k, bool return_logits,
                      const py::object& out_indices, const py::object& out_probabilities,
                      const py::object& out_logits, const py::object& workspace, uintptr_t stream) {
  const char* op = "classify";
  const ClassifyInputs inputs{view_of(op, "embeddings", embeddings, stream),
                              view_of(op, "classes", classes, stream),
                              optional_view_of(op, "null_text", null_text, stream),
                              optional_view_of(op, "null_scores", null_scores, stream)};
  const ClassifyOptions options{logit_scale, logit_bias, {steps, step_size}, top_k};
  const CudaOptions cuda = cuda_options(op, workspace, stream);
  const ClassifySizes sizes = check_classify(inputs, options);
  const py::object indices = output_or_empty<int32_t>(out_indices, {sizes.samples, sizes.top_k});
  const py::object probabilities =
      output_or_empty<float>(out_probabilities, {sizes.samples, sizes.top_k});
  py::object logits = out_logits;
  if (return_logits) logits = output_or_empty<float>(out_logits, {sizes.samples, sizes.classes});
  const ClassifyOutputs outputs{view_of(op, "out_indices", indices, stream),
                                view_of(op, "out_probabilities", probabilities, stream),
                                optional_view_of(op, "out_logits", logits, stream)};
  {
    py::gil_scoped_release release;
    classify(inputs, outputs, options, cuda);
  }
  if (logits.is_none()) return py::make_tuple(indices, probabilities);
  return py::make_tuple(indices, probabilities, logits);
}

constexpr const char* kPreprocessDoc =
    R"(Resize, crop or pad, and normalize one image in a single pass.

Pixels equal those of Pillow's Image.resize bit for bit from Pillow 13 on (earlier versions
differ by a few levels on tall images). Sizes and crop follow open_clip's
image_transform(is_train=False).

image: uint8 (H, W, 3), RGB, any strides; never copied as a whole.
out: writable C-contiguous float32 (3, h, w), for example one row of an encoder's input.
mean, std: 3 values each, in [0, 1] units: out = (image / 255 - mean) / std.
resize: "shortest" (shorter edge to the target, center crop), "longest" (longer edge to the
    target, center pad with `fill`) or "squash" (exactly h x w, ignoring the aspect ratio).
interpolation: "bicubic" or "bilinear", both antialiased.
fill: padding value in all three channels, 0 to 255.
threads: 0 for about one per 150,000 pixels; the result does not depend on it.
stream: CUDA arrays only; a cudaStream_t as an integer. The work is queued on the stream and not
    awaited. It allocates nothing, so a CUDA graph can capture it after a first call has loaded
    the kernels.
workspace: CUDA arrays only; preprocess_workspace(image, out) bytes of uint8 on the GPU. Nothing
    else may use it until the work is done.

On the GPU `out` may also be float16. Arrays and stream belong to the current device.

Raises ValueError for invalid arrays and values, CudaError if CUDA fails.)";

constexpr const char* kPurifyDoc =
    R"(Purify image embeddings with CLIPure-Cos, preserving their norms.

Zhang et al., CLIPure, ICLR 2025, arXiv 2502.18176; per sample. Each step rotates an embedding by
atan(step_size) towards the null text, and past it if their angle is smaller. An embedding
parallel to the null text has no direction to rotate in and stays unchanged.

embeddings: float32 (N, D), C-contiguous, nonzero norms. null_text: float32 (D,), nonzero norm.
steps: >= 0. step_size: >= 0, eta in the paper.
out: output array; may be `embeddings`. stream: as in preprocess.

CUDA arrays require `out`; embeddings and `out` may be float16. On the GPU a row that is zero or not
finite becomes NaN, and every row does if the null text is: raising would need to wait for the GPU.

Returns `out`, or a new float32 (N, D). Raises ValueError for invalid arrays and values,
CudaError if CUDA fails.)";

constexpr const char* kPolarStepDoc =
    R"(Take one step of CLIPure-Diff: descend along the normalized gradient, then restore the norm.

z <- |z| normalize(z / |z| - step_size g / |g|), independently for each row (Zhang et al., CLIPure,
ICLR 2025, arXiv 2502.18176). A row stays unchanged if its gradient is zero or the step would cancel
it.

embeddings: float32 (N, D), C-contiguous, nonzero norms. gradients: float32 (N, D). step_size: >= 0.

Returns float32 (N, D). Raises ValueError for invalid arrays and values, and for rows that are
not finite.)";

constexpr const char* kClassifyDoc =
    R"(Return class probabilities of image embeddings, optionally purified.

logits = logit_scale * (purified embedding / its norm) . classes + logit_bias, then the softmax over
all classes. With steps > 0 the result is that of purify_cos, but purified embeddings are never
formed: in the plane of embedding and null text a step is a rotation of two scalars.

embeddings: float32 (N, D), C-contiguous, nonzero norms; N may be 0.
classes: float32 (K, D), C-contiguous, unit rows.
logit_scale: the factor itself, not its logarithm.
null_text, null_scores: float32 (D,) and (K,) = classes @ unit null text; required if steps > 0.
steps, step_size: purification as in purify_cos; 0 steps disable it.
top_k: >= 1; k = min(top_k, K).
out_indices, out_probabilities, out_logits: output arrays.
workspace, stream: as in preprocess; classify_workspace(N, K) bytes, zero before the first use.
    Successive calls of any size may share a workspace; nothing else may write to it.

CUDA arrays require workspace, out_indices and out_probabilities; embeddings and classes may both
be float16, with sums in float32. On the GPU a sample for which NumPy arrays would raise gets
indices -1 and probabilities NaN: raising would need to wait for the GPU.

Returns (indices int32 (N, k), probabilities float32 (N, k)), most probable first, ties by the
lower index; with return_logits also the logits, float32 (N, K). A sample's result has the same
bits in any batch. Raises ValueError for invalid arrays and values, for embeddings that are zero
or not finite, and for logits that are not finite; CudaError if CUDA fails.)";

constexpr const char* kSimdDoc =
    R"(Return the instruction set in use: "avx512", "avx2" or "baseline".

It is the best this machine supports, or the one named by the environment variable EDGECLIP_SIMD,
read once. Raises RuntimeError, as do all operations on NumPy arrays, if EDGECLIP_SIMD names none
of the three or one the machine does not support.)";

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Compiled operations of edgeclip.";
  m.attr("__version__") = EDGECLIP_VERSION;
  m.attr("MIN_SINE") = kMinSine;
  m.attr("RESIZES") = py::tuple(py::cast(kResizeNames));
  m.attr("INTERPOLATIONS") = py::tuple(py::cast(kInterpolationNames));
  m.def("preprocess", &preprocess_py, py::arg("image"), py::arg("out"), py::kw_only(),
        py::arg("mean"), py::arg("std"), py::arg("resize") = "shortest",
        py::arg("interpolation") = "bicubic", py::arg("fill") = 0, py::arg("threads") = 0,
        py::arg("workspace") = py::none(), py::arg("stream") = 0, kPreprocessDoc);
  m.def(
      "preprocess_workspace", &preprocess_workspace_py, py::arg("image"), py::arg("out"),
      py::kw_only(), py::arg("resize") = "shortest", py::arg("interpolation") = "bicubic",
      "Return the bytes of workspace that preprocess needs on the GPU for arrays of these shapes.");
  m.def("purify_cos", &purify_cos_py, py::arg("embeddings"), py::arg("null_text"), py::kw_only(),
        py::arg("steps"), py::arg("step_size"), py::arg("out") = py::none(), py::arg("stream") = 0,
        kPurifyDoc);
  m.def("polar_step", &polar_step_py, py::arg("embeddings"), py::arg("gradients"), py::kw_only(),
        py::arg("step_size"), kPolarStepDoc);
  m.def("classify", &classify_py, py::arg("embeddings"), py::arg("classes"), py::kw_only(),
        py::arg("logit_scale"), py::arg("logit_bias") = 0.0, py::arg("null_text") = py::none(),
        py::arg("null_scores") = py::none(), py::arg("steps") = 0, py::arg("step_size") = 0.0,
        py::arg("top_k") = 5, py::arg("return_logits") = false, py::arg("out_indices") = py::none(),
        py::arg("out_probabilities") = py::none(), py::arg("out_logits") = py::none(),
        py::arg("workspace") = py::none(), py::arg("stream") = 0, kClassifyDoc);
  m.def("classify_workspace", &classify_workspace, py::arg("samples"), py::arg("classes"),
        "Return the bytes of workspace that classify needs on the GPU.");
  m.def("usable_cores", &usable_cores,
        "Return the maximum number of cores per operation: the CPU affinity or set_usable_cores.");
  m.def(
      "set_usable_cores",
      [](int64_t cores) {
        if (cores < 1) {
          throw py::value_error("[set_usable_cores] expected cores >= 1, got " +
                                std::to_string(cores));
        }
        set_usable_cores(cores);
      },
      py::arg("cores"),
      "Limit the cores per operation in this process, for example to a CPU quota, which the "
      "default ignores.");
  m.def("cuda_built", &cuda_built, "Return whether edgeclip was built with CUDA kernels.");
  m.def("simd", &simd, kSimdDoc);
  bind_device(m);
}

}  // namespace edgeclip
