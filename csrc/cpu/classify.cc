#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/cpu/rows.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/softmax.h"
#include "csrc/math.h"
#include "csrc/ops.h"
#include "csrc/parallel.h"

namespace edgeclip::cpu {
namespace {

constexpr double kProductsPerThread = 1 << 22;
constexpr int64_t kMinChunk = 8;   // fewest samples worth a thread's own pass over all classes
constexpr int64_t kMaxChunk = 64;  // most samples that share a pass over all classes
// Above this factor a purified score is a small difference of large numbers, and inexact.
constexpr double kMaxFactor = 16.0;

// Purified score = a * (sample . class) + b * null score.
struct Scaling {
  float a;
  float b;
};

class Classifier {
 public:
  Classifier(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
             const ClassifyOptions& options, const ClassifySizes& sizes)
      : inputs_(inputs), outputs_(outputs), options_(options), sizes_(sizes) {
    if (options.purify.steps > 0) {
      null_text_ = inputs.null_text->as<const float>();
      null_scores_ = inputs.null_scores->as<const float>();
      null_norm_ = checked_norm({"classify", "null_text"}, null_text_, sizes.dim);
    }
  }

  // Classifies the samples [begin, end), at most kMaxChunk.
  void run(int64_t begin, int64_t end, int64_t threads) const {
    const int64_t count = end - begin;
    std::vector<float> samples(count * sizes_.dim);
    std::vector<Scaling> scalings(count);
    for (int64_t i = 0; i < count; ++i) {
      scalings[i] = prepare(begin + i, samples.data() + i * sizes_.dim);
    }
    std::unique_ptr<float[]> scratch;  // unlike a vector, uninitialized
    float* logits = nullptr;
    if (outputs_.logits) {
      logits = outputs_.logits->as<float>() + begin * sizes_.classes;
    } else {
      scratch.reset(new float[count * sizes_.classes]);
      logits = scratch.get();
    }
    parallel_for(sizes_.classes, threads, [&](int64_t first, int64_t last) {
      class_scores(samples.data(), count, inputs_.classes.as<const float>(), first, last,
                   sizes_.dim, logits, sizes_.classes);
    });
    std::vector<float> maxima((sizes_.classes + kBlock - 1) / kBlock);
    for (int64_t i = 0; i < count; ++i) {
      finish(begin + i, scalings[i], logits + i * sizes_.classes, maxima);
    }
  }

 private:
  // Writes the unit vector to score against the classes; returns the scaling of these scores.
  Scaling prepare(int64_t index, float* sample) const {
    const int64_t dim = sizes_.dim;
    const float* z = inputs_.embeddings.as<const float>() + index * dim;
    const double norm = checked_norm({"classify", "embedding", index}, z, dim);
    PlaneRotation rotation;
    if (null_text_ != nullptr) {
      const double cosine = dot(z, null_text_, dim) / (norm * null_norm_);
      rotation = rotate_towards_null_text(cosine, options_.purify.steps, options_.purify.step_size);
    }
    const double scale = 1.0 / norm;
    if (std::fabs(rotation.a) > kMaxFactor) {
      const double a = rotation.a / norm, b = rotation.b / null_norm_;
      for (int64_t i = 0; i < dim; ++i) {
        sample[i] = static_cast<float>(a * static_cast<double>(z[i]) +
                                       b * static_cast<double>(null_text_[i]));
      }
      return {1.0f, 0.0f};
    }
    for (int64_t i = 0; i < dim; ++i) sample[i] = static_cast<float>(z[i] * scale);
    return {static_cast<float>(rotation.a), static_cast<float>(rotation.b)};
  }

  // Turns scores into logits, in place, then writes the top_k of their softmax over all classes.
  void finish(int64_t index, const Scaling& scaling, float* row, std::vector<float>& maxima) const {
    const float scale = static_cast<float>(options_.logit_scale);
    scores_to_logits(scale * scaling.a, scale * scaling.b, static_cast<float>(options_.logit_bias),
                     null_scores_, sizes_.classes, row, maxima.data());
    const float max = *std::max_element(maxima.begin(), maxima.end());
    const double sum = sum_of_exponentials(row, sizes_.classes, max);
    if (!std::isfinite(sum)) {
      throw std::invalid_argument("[classify] the logits of embedding " + std::to_string(index) +
                                  " contain NaN or infinity: check classes, null_scores and "
                                  "logit_scale");
    }
    int32_t* indices = outputs_.indices.as<int32_t>() + index * sizes_.top_k;
    float* probabilities = outputs_.probabilities.as<float>() + index * sizes_.top_k;
    select_top(row, maxima, indices);
    for (int64_t k = 0; k < sizes_.top_k; ++k) {
      probabilities[k] = static_cast<float>(std::exp(row[indices[k]] - max) / sum);
    }
  }

  // Keeps the top_k classes so far in a heap, the worst on top; skips blocks without a better one.
  void select_top(const float* logits, const std::vector<float>& maxima, int32_t* indices) const {
    const auto better = [&](int32_t x, int32_t y) {
      return logits[x] > logits[y] || (logits[x] == logits[y] && x < y);
    };
    int64_t count = 0;
    for (int64_t c = 0; c < sizes_.classes; ++c) {
      if (count < sizes_.top_k) {
        indices[count++] = static_cast<int32_t>(c);
        std::push_heap(indices, indices + count, better);
        continue;
      }
      const float worst = logits[indices[0]];
      if (c % kBlock == 0 && maxima[c / kBlock] <= worst) {
        c += kBlock - 1;
      } else if (logits[c] > worst) {
        std::pop_heap(indices, indices + count, better);
        indices[count - 1] = static_cast<int32_t>(c);
        std::push_heap(indices, indices + count, better);
      }
    }
    std::sort_heap(indices, indices + count, better);
  }

  const ClassifyInputs& inputs_;
  const ClassifyOutputs& outputs_;
  const ClassifyOptions& options_;
  const ClassifySizes& sizes_;
  const float* null_text_ = nullptr;
  const float* null_scores_ = nullptr;
  double null_norm_ = 1.0;
};

}  // namespace

void classify(const ClassifyInputs& inputs, const ClassifyOutputs& outputs,
              const ClassifyOptions& options, const ClassifySizes& sizes) {
  const Classifier classifier(inputs, outputs, options, sizes);
  const double products = static_cast<double>(sizes.samples) * static_cast<double>(sizes.classes) *
                          static_cast<double>(sizes.dim);
  const int64_t threads = automatic_threads(products, kProductsPerThread);
  const int64_t chunk =
      std::clamp<int64_t>((sizes.samples + threads - 1) / threads, kMinChunk, kMaxChunk);
  const int64_t chunks = (sizes.samples + chunk - 1) / chunk;
  parallel_for(chunks, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      classifier.run(i * chunk, std::min((i + 1) * chunk, sizes.samples),
                     chunks == 1 ? threads : 1);
    }
  });
}

}  // namespace edgeclip::cpu
