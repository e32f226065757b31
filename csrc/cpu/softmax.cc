#include "csrc/cpu/softmax.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "csrc/cpu/simd.h"

namespace edgeclip::cpu {
namespace {

template <Simd kLevel>
EDGECLIP_INLINE void scores_to_logits_kernel(float factor, float offset, float bias,
                                             const float* __restrict null_scores, int64_t classes,
                                             float* __restrict row, float* __restrict maxima) {
  constexpr int kLanes = 16;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = begin + kBlock < classes ? begin + kBlock : classes;
    if (null_scores == nullptr) {
      for (int64_t c = begin; c < end; ++c) row[c] = factor * row[c] + bias;
    } else {
      for (int64_t c = begin; c < end; ++c) {
        row[c] = factor * row[c] + offset * null_scores[c] + bias;
      }
    }
    // Sixteen independent maxima, since the compiler may not reorder float comparisons.
    float lanes[kLanes];
    for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      for (int i = 0; i < kLanes; ++i) lanes[i] = row[c + i] > lanes[i] ? row[c + i] : lanes[i];
    }
    for (; c < end; ++c) lanes[0] = row[c] > lanes[0] ? row[c] : lanes[0];
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    maxima[begin / kBlock] = lanes[0];
  }
}

// x = exp(x) for x <= 0 or NaN; results below 1e-38 become about 1e-38. As in Cephes (expf):
// x = n ln 2 + r, with a polynomial for exp(r), and 2^n built from its exponent bits.
template <int kLanes>
EDGECLIP_INLINE void exponential(typename Vector<float, kLanes>::Lanes& x) {
  using Lanes = typename Vector<float, kLanes>::Lanes;
  using Bits = typename Vector<uint32_t, kLanes>::Lanes;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes shifted = x * 1.44269504f + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  Bits exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + 127) << 23;  // shifts out the bits of kRound
  Lanes scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  x = y * scale;
}

template <Simd kLevel>
EDGECLIP_INLINE double sum_of_exponentials_kernel(const float* logits, int64_t classes, float max) {
  constexpr int kLanes = float_lanes(kLevel);
  using Lanes = typename Vector<float, kLanes>::Lanes;
  using Doubles = typename Vector<double, kLanes>::Lanes;
  Doubles sums = {};  // double, since there may be millions of terms
  for (int64_t c = 0; c < classes; c += kLanes) {
    const int64_t count = kLanes < classes - c ? kLanes : classes - c;
    Lanes x = Lanes{} - std::numeric_limits<float>::infinity();
    std::memcpy(&x, logits + c, static_cast<size_t>(count) * sizeof(float));
    x -= max;
    exponential<kLanes>(x);
    if (count < kLanes) {
      for (int64_t i = count; i < kLanes; ++i) x[i] = 0.0f;
    }
    sums += __builtin_convertvector(x, Doubles);
  }
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}

}  // namespace

EDGECLIP_SIMD_KERNEL(void, scores_to_logits,
                     (float factor, float offset, float bias, const float* null_scores,
                      int64_t classes, float* row, float* maxima),
                     (factor, offset, bias, null_scores, classes, row, maxima))

EDGECLIP_SIMD_KERNEL(double, sum_of_exponentials, (const float* logits, int64_t classes, float max),
                     (logits, classes, max))

}  // namespace edgeclip::cpu
