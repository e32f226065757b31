#ifndef EDGECLIP_CUDA_FINISH_CUH_
#define EDGECLIP_CUDA_FINISH_CUH_

#include <cstdint>

#include "csrc/cuda/warp.cuh"
#include "csrc/ops.h"

namespace edgeclip::cuda {

enum class State : int32_t { kLinear, kExact, kInvalid };

// Coefficients that turn a sample's raw scores into purified ones. Its purified unit vector is
// `embedding` * z + `null_text` * t, so with kLinear its score for class c is
// `embedding` * (z . c) + `null_score` * (null score of c). With kExact the vector must be formed.
struct Scaling {
  double embedding;
  double null_text;
  float null_score;
  State state;
};

struct ClassifyJob {
  const void* embeddings;
  const void* classes;
  const float* null_text;    // nullptr if steps = 0
  const float* null_scores;  // nullptr if steps = 0
  int64_t samples;
  int64_t dim;
  int64_t class_count;
  int64_t top_k;
  PurifyOptions purify;
  float logit_scale;
  float logit_bias;
  int32_t* indices;
  float* probabilities;
  float* logits;      // nullptr: not requested
  unsigned* tickets;  // nullptr: finish_kernel follows
  Scaling* scalings;
  float* scores;
};

// Threads that cooperate on one sample: a warp, or a block of 32 warps.
template <int kWarpCount>
struct Team {
  static_assert(kWarpCount == 1 || kWarpCount == kWarpSize);
  static constexpr int kWarps = kWarpCount;
  static constexpr int kThreads = kWarpCount * kWarpSize;
  static constexpr size_t kSharedBytes = kWarpCount == 1 ? 0 : 2 * kWarpCount * sizeof(uint64_t);

  __device__ explicit Team(int thread_in_team, void* shared = nullptr)
      : thread(thread_in_team), exchange(static_cast<uint64_t*>(shared)) {}

  __device__ void synchronize() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // Calls alternate between two rows, so that one barrier per call is enough: before a row is
  // written again, the barrier of the call in between ensures that all threads have read it.
  template <typename T, typename Op>
  __device__ T reduce(T value, Op op) {
    value = warp_reduce(value, op);
    if constexpr (kWarps == 1) return value;
    T* row = reinterpret_cast<T*>(exchange + turn * kWarps);
    turn ^= 1;
    if (thread % kWarpSize == 0) row[thread / kWarpSize] = value;
    __syncthreads();
    return warp_reduce(row[thread % kWarpSize], op);
  }

  const int thread;
  uint64_t* const exchange;
  int turn = 0;
};

// Returns a key that orders by logit, then by lower index. No key is 0, which sorts below all.
__device__ inline uint64_t key_of(float logit, int64_t index) {
  const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are a tie
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(index));
}

__device__ inline float logit_of(uint64_t key) {
  const auto ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ inline int32_t index_of(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<unsigned>(key));
}

// Returns the best key below `last` among this thread's logits; 0 if none.
template <typename Team>
__device__ uint64_t best_below(const float* logits, int64_t count, uint64_t last,
                               const Team& team) {
  uint64_t best = 0;
#pragma unroll 4
  for (int64_t c = team.thread; c < count; c += Team::kThreads) {
    const uint64_t key = key_of(logits[c], c);
    if (key < last && key > best) best = key;
  }
  return best;
}

// Recomputes a sample's scores from its purified unit vector, formed as on the CPU.
template <typename T, typename Team>
__device__ void rescore(const ClassifyJob& job, int64_t sample, const Scaling& scaling,
                        const Team& team) {
  const T* z = static_cast<const T*>(job.embeddings) + sample * job.dim;
  const int lane = team.thread % kWarpSize;
  for (int64_t c = team.thread / kWarpSize; c < job.class_count; c += Team::kWarps) {
    const T* w = static_cast<const T*>(job.classes) + c * job.dim;
    float sum = 0.0f;
    for (int64_t i = lane; i < job.dim; i += kWarpSize) {
      const double t = job.null_text == nullptr ? 0.0 : job.null_text[i];
      const double x = scaling.embedding * to_float(z[i]) + scaling.null_text * t;
      sum = fmaf(static_cast<float>(x), to_float(w[i]), sum);
    }
    sum = warp_reduce(sum, Sum());
    if (lane == 0) job.scores[sample * job.class_count + c] = sum;
  }
  team.synchronize();
}

template <typename Team>
__device__ void write_invalid(const ClassifyJob& job, int64_t sample, const Team& team) {
  const float nan = __uint_as_float(0x7fc00000u);
  for (int64_t k = team.thread; k < job.top_k; k += Team::kThreads) {
    job.indices[sample * job.top_k + k] = -1;
    job.probabilities[sample * job.top_k + k] = nan;
  }
}

// Each pick is the maximum of the threads' best keys; only its owner then searches for its next.
template <typename Team>
__device__ void write_top_k(const ClassifyJob& job, int64_t sample, const float* logits,
                            uint64_t best, float max, float sum, Team& team) {
  for (int64_t k = 0; k < job.top_k; ++k) {
    const uint64_t picked = team.reduce(best, Max());
    if (team.thread == 0) {
      job.indices[sample * job.top_k + k] = index_of(picked);
      job.probabilities[sample * job.top_k + k] = expf(logit_of(picked) - max) / sum;
    }
    if (best == picked) best = best_below(logits, job.class_count, picked, team);
  }
}

// Computes logits, softmax and top-k of one sample. `logits` is scratch and may alias the scores:
// each thread reads only logits that it wrote. A sample for which the CPU path would throw gets
// indices -1 and probabilities NaN.
template <typename T, typename Team>
__device__ void finish(const ClassifyJob& job, int64_t sample, float* logits, Team team) {
  const Scaling scaling = job.scalings[sample];
  const bool linear = scaling.state == State::kLinear;
  if (scaling.state == State::kExact) rescore<T>(job, sample, scaling, team);
  const float* scores = job.scores + sample * job.class_count;
  const float a = linear ? static_cast<float>(scaling.embedding) : 1.0f;
  const float b = scaling.null_score;
  const bool adds_null_scores = linear && job.null_scores != nullptr;
  float max = -__uint_as_float(0x7f800000u);  // infinity
#pragma unroll 4
  for (int64_t c = team.thread; c < job.class_count; c += Team::kThreads) {
    const float score = a * scores[c] + (adds_null_scores ? b * job.null_scores[c] : 0.0f);
    const float logit = job.logit_scale * score + job.logit_bias;
    logits[c] = logit;
    if (job.logits != nullptr) job.logits[sample * job.class_count + c] = logit;
    max = fmaxf(max, logit);
  }
  max = team.reduce(max, Max());
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t c = team.thread; c < job.class_count; c += Team::kThreads) {
    sum += expf(logits[c] - max);
  }
  sum = team.reduce(sum, Sum());
  // The comparison fails if any logit is NaN or infinite, where the CPU path throws.
  if (scaling.state == State::kInvalid || !(sum < 3.4e38f)) {
    return write_invalid(job, sample, team);
  }
  const uint64_t best = best_below(logits, job.class_count, ~uint64_t{0}, team);
  write_top_k(job, sample, logits, best, max, sum, team);
}

}  // namespace edgeclip::cuda

#endif  // EDGECLIP_CUDA_FINISH_CUH_
