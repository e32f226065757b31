#ifndef EDGECLIP_GEOMETRY_H_
#define EDGECLIP_GEOMETRY_H_

#include <cstdint>

#include "csrc/filter.h"
#include "csrc/ops.h"

namespace edgeclip {

// An axis of the image; its output pixels go to target[pad, pad + count).
struct Placement {
  Axis axis;
  int64_t pad;
};

// Resize, crop and padding of an image to its target size.
struct Geometry {
  Placement rows;
  Placement columns;
  bool vertically_first;  // each pass rounds to whole pixels, so the order changes the result
};

// Follows open_clip's image_transform(is_train=False) for the sizes, and Pillow for the pass order.
Geometry make_geometry(const TensorView& image, const TensorView& out, Resize resize);

}  // namespace edgeclip

#endif  // EDGECLIP_GEOMETRY_H_
