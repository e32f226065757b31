"""Classify the newest frame of a camera, again and again.

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
    """Yield RGB frames, uint8 (H, W, 3), until the camera ends."""
    while True:
        taken, frame = camera.read()
        if not taken:
            return
        yield frame[:, :, ::-1]  # OpenCV gives BGR


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the best label of each frame; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--camera", default="0", help="number, file or URL of a camera (default: 0)"
    )
    parser.add_argument("--label", action="append", required=True, help="label; repeat for more")
    parser.add_argument(
        "--bundle", help="bundle directory, or an embedded bundle's name (default: edgeclip's)"
    )
    args = parser.parse_args(arguments)
    try:
        import cv2
    except ImportError:
        print("error: OpenCV is missing: pip install opencv-python-headless", file=sys.stderr)
        return 2
    camera = cv2.VideoCapture(int(args.camera) if args.camera.isdecimal() else args.camera)
    if not camera.isOpened():
        print(
            f"error: camera {args.camera} does not open: name another with --camera",
            file=sys.stderr,
        )
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
