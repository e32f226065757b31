#ifndef EDGECLIP_GEOMETRY_H_
#define EDGECLIP_GEOMETRY_H_

#include <cstdint>

#include "csrc/filter.h"
#include "csrc/ops.h"

namespace edgeclip {

// An axis of the image and where the wanted pixels go: target[pad, pad + count).
struct Placement {
  Axis axis;
  int64_t pad;
};

// How an image is resized, cropped and padded to a target.
struct Geometry {
  Placement rows;
  Placement columns;
  bool vertically_first;  // each pass rounds to whole pixels, so their order shows
};

// As open_clip's image_transform(is_train=False) and Pillow have it.
Geometry make_geometry(const TensorView& image, const TensorView& out, Resize resize);

}  // namespace edgeclip

#endif  // EDGECLIP_GEOMETRY_H_
