#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "csrc/arrays.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace py = pybind11;

namespace edgeclip {
namespace {

CudaOptions cuda_options(const char* op, const py::object& workspace, uintptr_t stream) {
  return {stream, optional_view_of(op, "workspace", workspace, stream)};
}

template <typename T>
py::object given_or_new(const py::object& given, const std::array<int64_t, 2>& shape) {
  return given.is_none() ? py::array_t<T>(shape) : given;
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
  py::object result = given_or_new<float>(out, shape);
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
  const py::object indices = given_or_new<int32_t>(out_indices, {sizes.samples, sizes.top_k});
  const py::object probabilities =
      given_or_new<float>(out_probabilities, {sizes.samples, sizes.top_k});
  py::object logits = out_logits;
  if (return_logits) logits = given_or_new<float>(out_logits, {sizes.samples, sizes.classes});
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
    R"(Resizes, crops or pads, and normalises one image in a single pass.

The pixels are bit for bit those of Pillow's Image.resize from version 13 on (earlier versions differ
by a few levels on tall images), the sizes and the crop those of open_clip's
image_transform(is_train=False).

image: uint8 (H, W, 3), RGB, any strides; never copied as a whole.
out: writable C-contiguous float32 (3, h, w), for example one row of an encoder's input.
mean, std: 3 values each, in [0, 1] units: out = (image / 255 - mean) / std.
resize: "shortest" (shorter edge to the target, centre crop), "longest" (longer edge to the target,
    centre pad with `fill`) or "squash" (exactly h x w, whatever the aspect).
interpolation: "bicubic" or "bilinear", both antialiased.
fill: the padding's value in all three channels, 0 to 255.
threads: 0 for about one per 150,000 pixels; the result does not depend on it.
workspace, stream: of CUDA arrays, on which `out` may be float16 too. The work is queued on the
    stream (a cudaStream_t as an integer), not waited for, and allocates nothing, so that it can be
    captured in a CUDA graph, after a first call that loads the kernels. workspace:
    preprocess_workspace(image, out) bytes of uint8 on the GPU, which nothing else may use until the
    work is done. Arrays and stream belong to the current device.

Raises ValueError for arrays and values that do not fit, RuntimeError for CUDA's errors.)";

constexpr const char* kPurifyDoc =
    R"(Purifies image embeddings by CLIPure-Cos and keeps their norms.

Zhang et al., CLIPure, ICLR 2025, arXiv 2502.18176; per sample. Every step turns an embedding by
atan(step_size) towards the null text, past it if it is nearer than that. An embedding parallel to
the null text has no direction to turn to and stays.

embeddings: float32 (N, D), C-contiguous, any norms but 0. null_text: float32 (D,), any norm but 0.
steps: >= 0. step_size: >= 0, eta in the paper.
out: where to write; may be `embeddings`. stream: as in preprocess.

CUDA arrays need `out`, and may be float16 but for the null text. There a row that is zero or not
finite, or any row if the null text is, becomes NaN: to raise, one would have to wait for the GPU.

Returns `out`, or a new float32 (N, D). Raises ValueError for arrays and values that do not fit.)";

constexpr const char* kPolarStepDoc =
    R"(One step of CLIPure-Diff: down the gradient of a loss by direction alone, and back to the norm.

z <- |z| normalize(z / |z| - step_size g / |g|), for each row by itself (Zhang et al., CLIPure, ICLR
2025, arXiv 2502.18176). A row without a gradient stays, and one that the step would cancel.

embeddings: float32 (N, D), C-contiguous, any norms but 0. gradients: float32 (N, D). step_size: >= 0.

Returns float32 (N, D). Raises ValueError for arrays and values that do not fit, and for rows that
are not finite.)";

constexpr const char* kClassifyDoc =
    R"(Class probabilities of image embeddings, purified on the way.

logits = logit_scale * (purified embedding / its norm) . classes + logit_bias, then the softmax over
all classes. With steps > 0 the embeddings are purified as by purify_cos, without ever being
formed: in the plane of embedding and null text a step is the turn of two scalars.

embeddings: float32 (N, D), C-contiguous, any norms but 0; N may be 0.
classes: float32 (K, D), C-contiguous, unit rows.
logit_scale: the factor itself, not its logarithm.
null_text, null_scores: float32 (D,) and (K,) = classes @ unit null text; needed with steps > 0.
steps, step_size: of the purification; 0 steps is none.
top_k: >= 1; k = min(top_k, K).
out_indices, out_probabilities, out_logits: where to write what is returned.
workspace, stream: as in preprocess; classify_workspace(N, K) bytes, all zero before its first use.
    Calls of any size may use it one after another, which leave it fit for the next, but nothing
    else may.

CUDA arrays need all but `out_logits` of these; embeddings and classes may both be float16, sums are
float32. There a sample for which NumPy arrays would raise gets the indices -1 and the probabilities
NaN: to raise, one would have to wait for the GPU.

Returns (indices int32 (N, k), probabilities float32 (N, k)), most probable first and equal logits
by the lower index; with return_logits also the logits, float32 (N, K). A sample's answer is the
same bits in any batch. Raises ValueError for arrays and values that do not fit, for embeddings that
are zero or not finite, and for logits that are not finite.)";

constexpr const char* kSimdDoc =
    R"(The instruction set that runs: "avx512", "avx2" or "baseline", the best that the machine has.

Or the one in the environment variable EDGECLIP_SIMD, which is read once. Raises RuntimeError, as all
operations on NumPy arrays then do, where it is none of these or more than the machine has.)";

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled operations of edgeclip.";
  m.attr("__version__") = EDGECLIP_VERSION;
  m.def("preprocess", &preprocess_py, py::arg("image"), py::arg("out"), py::kw_only(),
        py::arg("mean"), py::arg("std"), py::arg("resize") = "shortest",
        py::arg("interpolation") = "bicubic", py::arg("fill") = 0, py::arg("threads") = 0,
        py::arg("workspace") = py::none(), py::arg("stream") = 0, kPreprocessDoc);
  m.def("preprocess_workspace", &preprocess_workspace_py, py::arg("image"), py::arg("out"),
        py::kw_only(), py::arg("resize") = "shortest", py::arg("interpolation") = "bicubic",
        "How many bytes of workspace preprocess needs on the GPU for arrays of these shapes.");
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
        "How many bytes of workspace classify needs on the GPU.");
  m.def("usable_cores", &usable_cores,
        "The cores that operations use at most: those of the affinity, or of set_usable_cores.");
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
      "Sets, for the process, the cores that operations use at most: a quota is not known to "
      "them.");
  m.def("cuda_built", &cuda_built, "Whether edgeclip was built with its CUDA kernels.");
  m.def("simd", &simd, kSimdDoc);
  bind_device(m);
}

}  // namespace edgeclip
