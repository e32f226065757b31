#ifndef EDGECLIP_OPS_H_
#define EDGECLIP_OPS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace edgeclip {

enum class Device { kCpu, kCuda };

// NumPy's kind character and item size: float32 is {'f', 4}.
struct DType {
  char kind;
  int bytes;
  bool native_order = true;

  bool operator==(const DType& other) const {
    return kind == other.kind && bytes == other.bytes && native_order == other.native_order;
  }
  std::string name() const;
};

inline constexpr DType kUint8{'u', 1};
inline constexpr DType kInt32{'i', 4};
inline constexpr DType kFloat16{'f', 2};
inline constexpr DType kFloat32{'f', 4};

// Non-owning view of a tensor's memory. Strides are in bytes and may be negative or zero.
struct TensorView {
  void* data = nullptr;
  DType dtype = kFloat32;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  Device device = Device::kCpu;
  bool writable = false;
  bool pinned = false;                    // host memory that the GPU reads and writes too
  std::shared_ptr<void> owner = nullptr;  // keeps a DLPack capsule alive as long as the view

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

enum class Resize { kShortest, kLongest, kSquash };
enum class Interpolation { kBicubic, kBilinear };

// Names of the enumerators, in their order.
inline constexpr std::array<const char*, 3> kResizeNames{"shortest", "longest", "squash"};
inline constexpr std::array<const char*, 2> kInterpolationNames{"bicubic", "bilinear"};

// Throw std::invalid_argument for an unknown name.
Resize parse_resize(const std::string& name);
Interpolation parse_interpolation(const std::string& name);

struct PreprocessOptions {
  std::vector<float> mean;
  std::vector<float> std;
  Resize resize = Resize::kShortest;
  Interpolation interpolation = Interpolation::kBicubic;
  int64_t fill = 0;
  int64_t threads = 0;  // 0: chosen from the amount of work
};

struct PurifyOptions {
  int64_t steps = 0;
  double step_size = 0.0;
};

struct ClassifyInputs {
  TensorView embeddings;
  TensorView classes;
  std::optional<TensorView> null_text;
  std::optional<TensorView> null_scores;
};

struct ClassifyOptions {
  double logit_scale = 1.0;
  double logit_bias = 0.0;
  PurifyOptions purify;
  int64_t top_k = 5;
};

struct ClassifyOutputs {
  TensorView indices;
  TensorView probabilities;
  std::optional<TensorView> logits;
};

struct ClassifySizes {
  int64_t samples;
  int64_t dim;
  int64_t classes;
  int64_t top_k;
};

// Options for CUDA tensors: the stream on which work is queued (not awaited), and scratch memory.
struct CudaOptions {
  uintptr_t stream = 0;  // a cudaStream_t
  std::optional<TensorView> workspace;
};

// Each operation checks its arguments (std::invalid_argument), then runs on its tensors' device.
void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options,
                const CudaOptions& cuda = {});

void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options, const CudaOptions& cuda = {});

void polar_step(const TensorView& embeddings, const TensorView& gradients, const TensorView& out,
                double step_size);

void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const CudaOptions& cuda = {});

// Checks without the operation, for callers that allocate the outputs; they return the sizes.
std::array<int64_t, 2> check_purify_cos(const TensorView& embeddings, const TensorView& null_text,
                                        const PurifyOptions& options);
std::array<int64_t, 2> check_polar_step(const TensorView& embeddings, const TensorView& gradients,
                                        double step_size);
ClassifySizes check_classify(const ClassifyInputs& inputs, const ClassifyOptions& options);

// Return the bytes of workspace that a CUDA operation needs. `preprocess_workspace` never accesses
// the memory of its tensors.
int64_t preprocess_workspace(const TensorView& image, const TensorView& out,
                             const PreprocessOptions& options);
int64_t classify_workspace(int64_t samples, int64_t classes);

bool cuda_built();
std::string simd();

namespace cpu {
void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options);
void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options);
void polar_step(const TensorView& embeddings, const TensorView& gradients, const TensorView& out,
                double step_size);
void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const ClassifySizes& sizes);
}  // namespace cpu

namespace cuda {
bool built();
void preprocess(const TensorView& image, const TensorView& out, const PreprocessOptions& options,
                const CudaOptions& cuda);
void purify_cos(const TensorView& embeddings, const TensorView& null_text, const TensorView& out,
                const PurifyOptions& options, const CudaOptions& cuda);
void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const ClassifySizes& sizes, const CudaOptions& cuda);
int64_t preprocess_workspace(const TensorView& image, const TensorView& out,
                             const PreprocessOptions& options);
int64_t classify_workspace(const ClassifySizes& sizes);
}  // namespace cuda

}  // namespace edgeclip

#endif  // EDGECLIP_OPS_H_
