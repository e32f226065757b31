#ifndef EDGECLIP_CPU_SCORES_H_
#define EDGECLIP_CPU_SCORES_H_

#include <cstdint>

namespace edgeclip::cpu {

// Computes scores[s][c] = samples[s] . classes[c] for all samples and the classes [begin, end). The
// summation order depends on `dim` alone, so a score has the same bits in any batch. Rows of
// `scores` are `score_stride` floats apart.
void class_scores(const float* samples, int64_t sample_count, const float* classes, int64_t begin,
                  int64_t end, int64_t dim, float* scores, int64_t score_stride);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_SCORES_H_
