#include "csrc/cpu/scores.h"

#include <cstring>

#include "csrc/cpu/simd.h"

namespace edgeclip::cpu {
namespace {

// A tile of dot products computed together: each loaded vector serves several of them, and all sums
// stay in registers.
struct Tile {
  int samples;
  int classes;
};

constexpr Tile tile_of(Simd level) {
  return level == Simd::kAvx512 ? Tile{4, 4} : level == Simd::kAvx2 ? Tile{2, 6} : Tile{3, 4};
}

constexpr int kClassesAlone = 8;  // classes per tile for a single sample
// Prefetch the next classes from this many floats on, more than a cache holds: a batch is an eighth
// faster. With fewer floats a single sample would be a fifth slower.
constexpr int64_t kPrefetchMinFloats = 1 << 20;

template <typename Lanes>
EDGECLIP_INLINE void load(const float* from, int64_t count, Lanes& lanes) {
  lanes = Lanes{};
  std::memcpy(&lanes, from, static_cast<size_t>(count) * sizeof(float));
}

template <int kLanes>
EDGECLIP_INLINE float sum(const typename Vector<float, kLanes>::Lanes& lanes) {
  if constexpr (kLanes == 4) {
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  } else {
    typename Vector<float, kLanes / 2>::Lanes halves[2];
    std::memcpy(halves, &lanes, sizeof(lanes));
    halves[0] += halves[1];
    return sum<kLanes / 2>(halves[0]);
  }
}

template <int kSamples, int kClasses, typename Lanes>
EDGECLIP_INLINE void accumulate(const float* samples, const float* classes, int64_t dim,
                                int64_t offset, int64_t count, Lanes (&sums)[kSamples][kClasses]) {
  Lanes x[kSamples];
  for (int s = 0; s < kSamples; ++s) load(samples + s * dim + offset, count, x[s]);
  for (int c = 0; c < kClasses; ++c) {
    Lanes y;
    load(classes + c * dim + offset, count, y);
    for (int s = 0; s < kSamples; ++s) sums[s][c] += x[s] * y;
  }
}

// `next` is the next tile's classes, to prefetch, or null.
template <int kLanes, int kSamples, int kClasses>
EDGECLIP_INLINE void tile_scores(const float* samples, const float* classes, const float* next,
                                 int64_t dim, float* scores, int64_t score_stride) {
  typename Vector<float, kLanes>::Lanes sums[kSamples][kClasses] = {};
  int64_t offset = 0;
  for (; offset + kLanes <= dim; offset += kLanes) {
    if (next != nullptr) {
      for (int c = 0; c < kClasses; ++c) __builtin_prefetch(next + c * dim + offset);
    }
    accumulate(samples, classes, dim, offset, kLanes, sums);
  }
  if (offset < dim) accumulate(samples, classes, dim, offset, dim - offset, sums);
  for (int s = 0; s < kSamples; ++s) {
    for (int c = 0; c < kClasses; ++c) scores[s * score_stride + c] = sum<kLanes>(sums[s][c]);
  }
}

template <Simd kLevel, int kClasses>
EDGECLIP_INLINE void all_samples(const float* samples, int64_t sample_count, const float* classes,
                                 const float* next, int64_t dim, float* scores,
                                 int64_t score_stride) {
  constexpr int kLanes = float_lanes(kLevel), kSamples = tile_of(kLevel).samples;
  int64_t s = 0;
  for (; s + kSamples <= sample_count; s += kSamples) {
    tile_scores<kLanes, kSamples, kClasses>(samples + s * dim, classes, s == 0 ? next : nullptr,
                                            dim, scores + s * score_stride, score_stride);
  }
  for (; s < sample_count; ++s) {
    tile_scores<kLanes, 1, kClasses>(samples + s * dim, classes, s == 0 ? next : nullptr, dim,
                                     scores + s * score_stride, score_stride);
  }
}

// Scores the classes from `begin` on that fill whole tiles of kClasses; returns the end of them.
template <Simd kLevel, int kClasses>
EDGECLIP_INLINE int64_t whole_tiles(const float* samples, int64_t sample_count,
                                    const float* classes, int64_t begin, int64_t end, int64_t dim,
                                    float* scores, int64_t score_stride) {
  const bool prefetch = (end - begin) * dim >= kPrefetchMinFloats;
  int64_t c = begin;
  for (; c + kClasses <= end; c += kClasses) {
    const bool has_next = prefetch && c + 2 * kClasses <= end;
    const float* next = has_next ? classes + (c + kClasses) * dim : nullptr;
    all_samples<kLevel, kClasses>(samples, sample_count, classes + c * dim, next, dim, scores + c,
                                  score_stride);
  }
  return c;
}

template <Simd kLevel>
EDGECLIP_INLINE void class_scores_kernel(const float* samples, int64_t sample_count,
                                         const float* classes, int64_t begin, int64_t end,
                                         int64_t dim, float* scores, int64_t stride) {
  if (sample_count == 1) {
    begin =
        whole_tiles<kLevel, kClassesAlone>(samples, 1, classes, begin, end, dim, scores, stride);
  } else {
    begin = whole_tiles<kLevel, tile_of(kLevel).classes>(samples, sample_count, classes, begin, end,
                                                         dim, scores, stride);
  }
  whole_tiles<kLevel, 1>(samples, sample_count, classes, begin, end, dim, scores, stride);
}

}  // namespace

EDGECLIP_SIMD_KERNEL(void, class_scores,
                     (const float* samples, int64_t sample_count, const float* classes,
                      int64_t begin, int64_t end, int64_t dim, float* scores, int64_t score_stride),
                     (samples, sample_count, classes, begin, end, dim, scores, score_stride))

}  // namespace edgeclip::cpu
