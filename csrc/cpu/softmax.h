#ifndef EDGECLIP_CPU_SOFTMAX_H_
#define EDGECLIP_CPU_SOFTMAX_H_

#include <cstdint>

namespace edgeclip::cpu {

inline constexpr int64_t kBlock = 64;  // classes per block maximum

// Computes logits[c] = factor * scores[c] + offset * null_scores[c] + bias, in place; null_scores
// may be null. maxima[i] becomes the largest logit of the i-th block, ignoring NaN.
void scores_to_logits(float factor, float offset, float bias, const float* null_scores,
                      int64_t classes, float* row, float* maxima);

// Returns the sum of exp(logits[c] - max), to a relative error of 1e-7; NaN if any logit is NaN.
double sum_of_exponentials(const float* logits, int64_t classes, float max);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_SOFTMAX_H_
