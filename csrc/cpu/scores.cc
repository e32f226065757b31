#include "csrc/cpu/scores.h"

#include <cstring>

#include "csrc/cpu/simd.h"

namespace edgeclip::cpu {
namespace {

template <int kLanes>
struct Vector {
  typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
};

// How many dot products are computed together, so that each loaded vector serves several of them
// while all sums stay in registers.
template <int kLaneCount, int kSampleCount, int kClassCount>
struct Tile {
  static constexpr int kLanes = kLaneCount;
  static constexpr int kSamples = kSampleCount;
  static constexpr int kClasses = kClassCount;
};

template <typename Lanes>
EDGECLIP_INLINE void load(const float* from, int64_t count, Lanes& lanes) {
  lanes = Lanes{};
  std::memcpy(&lanes, from, static_cast<size_t>(count) * sizeof(float));
}

template <int kLanes, typename Lanes>
EDGECLIP_INLINE float sum(const Lanes& lanes) {
  float values[kLanes];
  std::memcpy(values, &lanes, sizeof(lanes));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

template <int kSamples, int kClasses, typename Lanes>
EDGECLIP_INLINE void accumulate(const float* samples, const float* classes, int64_t dim, int64_t at,
                                int64_t count, Lanes (&sums)[kSamples][kClasses]) {
  Lanes x[kSamples];
  for (int s = 0; s < kSamples; ++s) load(samples + s * dim + at, count, x[s]);
  for (int c = 0; c < kClasses; ++c) {
    Lanes y;
    load(classes + c * dim + at, count, y);
    for (int s = 0; s < kSamples; ++s) sums[s][c] += x[s] * y;
  }
}

template <int kLanes, int kSamples, int kClasses>
EDGECLIP_INLINE void tile_scores(const float* samples, const float* classes, int64_t dim,
                                 float* scores, int64_t score_stride) {
  typename Vector<kLanes>::Lanes sums[kSamples][kClasses] = {};
  int64_t at = 0;
  for (; at + kLanes <= dim; at += kLanes) accumulate(samples, classes, dim, at, kLanes, sums);
  if (at < dim) accumulate(samples, classes, dim, at, dim - at, sums);
  for (int s = 0; s < kSamples; ++s) {
    for (int c = 0; c < kClasses; ++c) scores[s * score_stride + c] = sum<kLanes>(sums[s][c]);
  }
}

template <typename Tile, int kClasses>
EDGECLIP_INLINE void all_samples(const float* samples, int64_t sample_count, const float* classes,
                                 int64_t dim, float* scores, int64_t score_stride) {
  int64_t s = 0;
  for (; s + Tile::kSamples <= sample_count; s += Tile::kSamples) {
    tile_scores<Tile::kLanes, Tile::kSamples, kClasses>(samples + s * dim, classes, dim,
                                                        scores + s * score_stride, score_stride);
  }
  for (; s < sample_count; ++s) {
    tile_scores<Tile::kLanes, 1, kClasses>(samples + s * dim, classes, dim,
                                           scores + s * score_stride, score_stride);
  }
}

template <typename Tile>
EDGECLIP_INLINE void all_scores(const float* samples, int64_t sample_count, const float* classes,
                                int64_t begin, int64_t end, int64_t dim, float* scores,
                                int64_t score_stride) {
  int64_t c = begin;
  for (; c + Tile::kClasses <= end; c += Tile::kClasses) {
    all_samples<Tile, Tile::kClasses>(samples, sample_count, classes + c * dim, dim, scores + c,
                                      score_stride);
  }
  for (; c < end; ++c) {
    all_samples<Tile, 1>(samples, sample_count, classes + c * dim, dim, scores + c, score_stride);
  }
}

#ifdef EDGECLIP_HAVE_TARGET_CLONES
__attribute__((target(EDGECLIP_AVX512))) void scores_avx512(const float* samples, int64_t count,
                                                            const float* classes, int64_t begin,
                                                            int64_t end, int64_t dim, float* scores,
                                                            int64_t stride) {
  all_scores<Tile<16, 4, 4>>(samples, count, classes, begin, end, dim, scores, stride);
}

__attribute__((target(EDGECLIP_AVX2))) void scores_avx2(const float* samples, int64_t count,
                                                        const float* classes, int64_t begin,
                                                        int64_t end, int64_t dim, float* scores,
                                                        int64_t stride) {
  all_scores<Tile<8, 2, 6>>(samples, count, classes, begin, end, dim, scores, stride);
}
#endif

// SSE2 and NEON.
void scores_baseline(const float* samples, int64_t count, const float* classes, int64_t begin,
                     int64_t end, int64_t dim, float* scores, int64_t stride) {
  all_scores<Tile<4, 3, 4>>(samples, count, classes, begin, end, dim, scores, stride);
}

// Not target_clones: the tile that fits the registers differs with the instruction set.
auto choose_scores() {
#ifdef EDGECLIP_HAVE_TARGET_CLONES
  if (simd_level() == Simd::kAvx512) return scores_avx512;
  if (simd_level() == Simd::kAvx2) return scores_avx2;
#endif
  return scores_baseline;
}

}  // namespace

void class_scores(const float* samples, int64_t sample_count, const float* classes, int64_t begin,
                  int64_t end, int64_t dim, float* scores, int64_t score_stride) {
  static const auto run = choose_scores();
  run(samples, sample_count, classes, begin, end, dim, scores, score_stride);
}

}  // namespace edgeclip::cpu
