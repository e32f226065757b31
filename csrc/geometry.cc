#include "csrc/geometry.h"

#include <algorithm>
#include <cmath>

namespace edgeclip {
namespace {

struct Size {
  int64_t height;
  int64_t width;
};

// Python's round(): to nearest, ties to even.
int64_t round_half_even(double x) { return static_cast<int64_t>(std::nearbyint(x)); }

// torchvision's Resize(size): the shorter edge becomes `size`; the longer edge is rounded down.
int64_t longer_edge(int64_t size, int64_t longer, int64_t shorter) {
  return static_cast<int64_t>(static_cast<double>(size * longer) / static_cast<double>(shorter));
}

// Returns the size before crop and padding, as in open_clip's image_transform(is_train=False).
Size resized(const Size& image, const Size& target, Resize resize) {
  if (resize == Resize::kSquash) return target;
  if (resize == Resize::kShortest && target.height == target.width) {
    if (image.width <= image.height) {
      return {longer_edge(target.width, image.height, image.width), target.width};
    }
    return {target.height, longer_edge(target.height, image.width, image.height)};
  }
  const double height = image.height, width = image.width;
  const double ratio_height = height / target.height, ratio_width = width / target.width;
  const double ratio = resize == Resize::kLongest ? std::max(ratio_height, ratio_width)
                                                  : std::min(ratio_height, ratio_width);
  // At least one pixel, since Pillow rejects an empty image.
  return {std::max<int64_t>(round_half_even(height / ratio), 1),
          std::max<int64_t>(round_half_even(width / ratio), 1)};
}

Placement place(int64_t input, int64_t resized, int64_t target) {
  if (resized < target) return {{input, resized, 0, resized}, (target - resized) / 2};
  const int64_t first = round_half_even(static_cast<double>(resized - target) / 2.0);
  return {{input, resized, first, target}, 0};
}

// The order of Pillow 13 and later (pull request 9549): vertical first if the height shrinks much
// more than the width.
bool vertically_first(const Size& image, const Size& scaled) {
  const int64_t shorter = image.height - scaled.height, narrower = image.width - scaled.width;
  return shorter > 0 && shorter > 2 * narrower;
}

}  // namespace

Geometry make_geometry(const TensorView& image, const TensorView& out, Resize resize) {
  const Size size = {image.shape[0], image.shape[1]};
  const Size target = {out.shape[1], out.shape[2]};
  const Size scaled = resized(size, target, resize);
  return {place(size.height, scaled.height, target.height),
          place(size.width, scaled.width, target.width), vertically_first(size, scaled)};
}

}  // namespace edgeclip
