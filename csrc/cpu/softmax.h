#ifndef EDGECLIP_CPU_SOFTMAX_H_
#define EDGECLIP_CPU_SOFTMAX_H_

#include <cstdint>

namespace edgeclip::cpu {

inline constexpr int64_t kBlock = 64;  // classes of which the largest is known

// logits[c] = factor * scores[c] + offset * null_scores[c] + bias, in place; null_scores may be
// null. maxima[i] is the largest of the i-th kBlock logits; those that are NaN do not count.
void scores_to_logits(float factor, float offset, float bias, const float* null_scores,
                      int64_t classes, float* row, float* maxima);

// The sum of exp(logits[c] - max), with 1e-7 of relative error; NaN if a logit is.
double sum_of_powers(const float* logits, int64_t classes, float max);

}  // namespace edgeclip::cpu

#endif  // EDGECLIP_CPU_SOFTMAX_H_
