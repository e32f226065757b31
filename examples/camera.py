"""Name what a camera sees, always in its newest frame.

pip install opencv-python-headless
python -m examples.camera --label "a person" --label "an empty room" --bundle vit-b-32
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import edgeclip


def frames(camera: Any) -> Iterator[np.ndarray]:
    """uint8 RGB frames (H, W, 3) until the camera gives no more."""
    while True:
        taken, frame = camera.read()
        if not taken:
            return
        yield frame[:, :, ::-1]  # OpenCV has blue first


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--camera", default="0", help="number, file or URL (default: 0)")
    parser.add_argument("--label", action="append", required=True, help="a class; give several")
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded demonstration")
    args = parser.parse_args(arguments)
    try:
        import cv2
    except ImportError:
        print("error: OpenCV is missing: pip install opencv-python-headless", file=sys.stderr)
        return 2
    camera = cv2.VideoCapture(int(args.camera) if args.camera.isdecimal() else args.camera)
    if not camera.isOpened():
        print(f"error: camera {args.camera} does not open", file=sys.stderr)
        return 2
    try:
        rt = edgeclip.Runtime(args.bundle)
        for answer in rt.stream(frames(camera), args.label, top_k=1):
            if isinstance(answer.predictions, edgeclip.ImageError):
                print(f"frame {answer.index}: error: {answer.predictions}", file=sys.stderr)
                continue
            (best,) = answer.predictions
            print(f"frame {answer.index}: {best.score:.1%} {best.label}", flush=True)
    except edgeclip.EdgeclipError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        camera.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
