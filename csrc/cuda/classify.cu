#include <algorithm>
#include <cstdint>

#include "csrc/cuda/check.cuh"
#include "csrc/cuda/finish.cuh"
#include "csrc/cuda/purify.cuh"
#include "csrc/cuda/warp.cuh"
#include "csrc/cuda/workspace.h"
#include "csrc/ops.h"

namespace edgeclip::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int64_t kOneLaunchClasses = 1024;  // most classes for which one launch does everything
constexpr int64_t kTickets = 1024;
constexpr int64_t kChunk = 4 * kTickets;  // samples per launch, in tiles of 4 or more
// Beyond these limits float32 scores of the raw embedding cannot be combined into a purified score:
// it would be a small difference of large numbers, or products would overflow or underflow.
constexpr double kMaxFactor = 16.0;
constexpr double kMaxNorm = 1e15;

// A tile of dot products that a warp computes together, so that each load serves several of them. A
// block has at least one warp per sample of the tile, to prepare and finish that sample.
template <int kSampleCount, int kClassCount>
struct Tile {
  static constexpr int kSamples = kSampleCount;
  static constexpr int kClasses = kClassCount;
  static constexpr int kSums = kSamples * kClasses;
  static constexpr int kUnroll = kSums == 1 ? 4 : 1;  // keeps more loads in flight
};

// Computes a sample's Scaling. Run by one warp.
template <typename T>
__device__ void prepare(const ClassifyJob& job, int64_t sample, int lane) {
  const T* z = static_cast<const T*>(job.embeddings) + sample * job.dim;
  const Purification p = purify(z, job.null_text, job.dim, job.purify, lane);
  if (lane != 0) return;
  const bool exact =
      fabs(p.rotation.a) > kMaxFactor || p.norm > kMaxNorm || p.norm < 1.0 / kMaxNorm;
  Scaling& scaling = job.scalings[sample];
  scaling.embedding = p.rotation.a / p.norm;
  scaling.null_text = p.rotation.b / p.null_norm;
  scaling.null_score = static_cast<float>(p.rotation.b);
  scaling.state = !p.valid ? State::kInvalid : exact ? State::kExact : State::kLinear;
}

// Computes scores[s][c] = embedding s . class c for raw embeddings. A lane's elements and the
// summation order depend on `dim` alone, so a score has the same bits in every tile shape.
template <typename T, bool kAligned, typename Tile>
__device__ void score(const ClassifyJob& job, int64_t first_sample, int64_t first_class, int lane) {
  const T* z = static_cast<const T*>(job.embeddings) + first_sample * job.dim;
  const T* w = static_cast<const T*>(job.classes) + first_class * job.dim;
  // At the edges the last sample or class is computed again, and not written.
  const int64_t samples = min(job.samples - first_sample, static_cast<int64_t>(Tile::kSamples));
  const int64_t classes = min(job.class_count - first_class, static_cast<int64_t>(Tile::kClasses));
  float sums[Tile::kSums] = {};
#pragma unroll Tile::kUnroll
  for (int64_t offset = lane * kPack<T>; offset < job.dim; offset += kWarpSize * kPack<T>) {
    float y[Tile::kClasses][kPack<T>];
#pragma unroll
    for (int c = 0; c < Tile::kClasses; ++c) {
      load_pack<kAligned>(w + min(static_cast<int64_t>(c), classes - 1) * job.dim, offset, job.dim,
                          y[c]);
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      float x[kPack<T>];
      load_pack<kAligned>(z + min(static_cast<int64_t>(s), samples - 1) * job.dim, offset, job.dim,
                          x);
#pragma unroll
      for (int c = 0; c < Tile::kClasses; ++c) {
        float& sum = sums[s * Tile::kClasses + c];
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) sum = fmaf(x[i], y[c][i], sum);
      }
    }
  }
  const float sum = warp_sums<Tile::kSums>(sums, lane);
  constexpr int kLanesPerSum = kWarpSize / Tile::kSums;
  const int s = lane / kLanesPerSum / Tile::kClasses, c = lane / kLanesPerSum % Tile::kClasses;
  if (lane % kLanesPerSum != 0 || s >= samples || c >= classes) return;
  job.scores[(first_sample + s) * job.class_count + first_class + c] = sum;
}

// Returns whether this block is the last of `blocks` to arrive; the last one sees all earlier
// writes of the others. The ticket only counts arrivals, so their order does not change results.
// The last block resets it to zero for the next call.
__device__ bool is_last_block(unsigned* ticket, unsigned blocks, bool* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *shared = atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();
    if (*shared) *ticket = 0;
  }
  __syncthreads();
  return *shared;
}

// In each row of the grid, the first block prepares the samples and the others share the classes to
// score. With tickets, the last block to arrive finishes the samples, one warp per sample.
template <typename T, bool kAligned, typename Tile>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(const ClassifyJob job) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t first_sample = static_cast<int64_t>(blockIdx.y) * Tile::kSamples;
  const int64_t sample = first_sample + warp;
  const bool has_sample = warp < Tile::kSamples && sample < job.samples;
  const int64_t first_class =
      ((static_cast<int64_t>(blockIdx.x) - 1) * kWarps + warp) * Tile::kClasses;
  if (blockIdx.x == 0) {
    if (has_sample) prepare<T>(job, sample, lane);
  } else if (first_class < job.class_count) {
    score<T, kAligned, Tile>(job, first_sample, first_class, lane);
  }
  if (job.tickets == nullptr) return;
  bool* const is_last = static_cast<bool*>(shared_memory());
  if (!is_last_block(job.tickets + blockIdx.y, gridDim.x, is_last) || !has_sample) return;
  float* const logits = reinterpret_cast<float*>(is_last + 16) + warp * job.class_count;
  finish<T>(job, sample, logits, Team<1>(lane));
}

// One block per sample. The logits overwrite the scores.
template <typename T>
__global__ void __launch_bounds__(Team<kWarpSize>::kThreads) finish_kernel(const ClassifyJob job) {
  const int64_t sample = blockIdx.x;
  finish<T>(job, sample, job.scores + sample * job.class_count,
            Team<kWarpSize>(static_cast<int>(threadIdx.x), shared_memory()));
}

template <typename T, bool kAligned, typename Tile>
void run_tile(const ClassifyJob& job, cudaStream_t stream) {
  const int64_t per_block = static_cast<int64_t>(kWarps) * Tile::kClasses;
  const dim3 grid(static_cast<unsigned>(1 + (job.class_count + per_block - 1) / per_block),
                  static_cast<unsigned>((job.samples + Tile::kSamples - 1) / Tile::kSamples));
  const size_t shared =
      job.tickets == nullptr ? 0 : 16 + Tile::kSamples * job.class_count * sizeof(float);
  launch("classify", "score_kernel", score_kernel<T, kAligned, Tile>, grid, dim3(kThreads), shared,
         stream, job);
  if (job.tickets != nullptr) return;
  launch("classify", "finish_kernel", finish_kernel<T>, dim3(static_cast<unsigned>(job.samples)),
         dim3(Team<kWarpSize>::kThreads), Team<kWarpSize>::kSharedBytes, stream, job);
}

template <typename T, bool kAligned>
void run_aligned(const ClassifyJob& job, cudaStream_t stream) {
  // Square tiles read less memory; flat tiles give more blocks.
  if (job.samples == 1) return run_tile<T, kAligned, Tile<1, 1>>(job, stream);
  if (job.samples <= 16) return run_tile<T, kAligned, Tile<8, 1>>(job, stream);
  run_tile<T, kAligned, Tile<4, 4>>(job, stream);
}

template <typename T>
void run(const ClassifyJob& job, cudaStream_t stream) {
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(uint4) == 0;
  };
  if (job.dim % kPack<T> == 0 && is_aligned(job.embeddings) && is_aligned(job.classes)) {
    run_aligned<T, true>(job, stream);
  } else {
    run_aligned<T, false>(job, stream);
  }
}

struct Scratch {
  unsigned* tickets;
  Scaling* scalings;
  float* scores;
};

// The tickets come first: at a fixed place, calls of every size leave them zero.
Scratch take_scratch(Workspace& workspace, const ClassifySizes& sizes) {
  const int64_t samples = std::min(sizes.samples, kChunk);
  unsigned* tickets = workspace.take<unsigned>(kTickets);
  Scaling* scalings = workspace.take<Scaling>(samples);
  return {tickets, scalings, workspace.take<float>(samples * sizes.classes)};
}

// Describes the launch for up to kChunk samples from `begin` on.
ClassifyJob make_job(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
                     const ClassifyOptions& options, const ClassifySizes& sizes,
                     const Scratch& scratch, int64_t begin) {
  const bool purifies = options.purify.steps > 0;
  ClassifyJob job{};
  job.embeddings =
      inputs.embeddings.as<const char>() + begin * sizes.dim * inputs.embeddings.dtype.bytes;
  job.classes = inputs.classes.data;
  job.null_text = purifies ? inputs.null_text->as<const float>() : nullptr;
  job.null_scores = purifies ? inputs.null_scores->as<const float>() : nullptr;
  job.samples = std::min(sizes.samples - begin, kChunk);
  job.dim = sizes.dim;
  job.class_count = sizes.classes;
  job.top_k = sizes.top_k;
  job.purify = options.purify;
  job.logit_scale = static_cast<float>(options.logit_scale);
  job.logit_bias = static_cast<float>(options.logit_bias);
  job.indices = outputs.indices.as<int32_t>() + begin * sizes.top_k;
  job.probabilities = outputs.probabilities.as<float>() + begin * sizes.top_k;
  job.logits = outputs.logits ? outputs.logits->as<float>() + begin * sizes.classes : nullptr;
  job.tickets = sizes.classes <= kOneLaunchClasses ? scratch.tickets : nullptr;
  job.scalings = scratch.scalings;
  job.scores = scratch.scores;
  return job;
}

}  // namespace

int64_t classify_workspace(const ClassifySizes& sizes) {
  Workspace workspace;
  take_scratch(workspace, sizes);
  return workspace.bytes();
}

void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const ClassifySizes& sizes, const CudaOptions& cuda) {
  Workspace workspace("classify", cuda, classify_workspace(sizes));
  const Scratch scratch = take_scratch(workspace, sizes);
  const auto stream = reinterpret_cast<cudaStream_t>(cuda.stream);
  for (int64_t begin = 0; begin < sizes.samples; begin += kChunk) {
    const ClassifyJob job = make_job(inputs, outputs, options, sizes, scratch, begin);
    inputs.embeddings.dtype == kFloat16 ? run<__half>(job, stream) : run<float>(job, stream);
  }
}

}  // namespace edgeclip::cuda
