"""A Jetson: build the TensorRT plans on the device once, then inspect with them.

The bundle was exported on a server with `--target tensorrt:fp16`. Plans run only on the kind of GPU, and with the
TensorRT version, that built them, so the device builds its own; a later start finds them and goes on.

    python jetson.py part.bundle photos/
"""

import sys
from pathlib import Path

from edgead.runtime import Inspector, open_bundle, read_image
from edgead.runtime.compile_cli import compile_bundle
from edgead.runtime.errors import EdgeadError
from edgead.runtime.image import list_images


def main(bundle_path: Path, photos: Path) -> int:
    bundle = open_bundle(bundle_path)
    try:
        for result in compile_bundle(bundle, target="tensorrt"):
            print(result["engine"], "built" if result["built"] else "up to date", "for", result["for"])
        inspector = Inspector(bundle, target="tensorrt")
    except EdgeadError as error:
        # No GPU, no driver or no TensorRT here: say so, and what would help.
        print(f"this machine cannot run TensorRT: {error}", file=sys.stderr)
        return error.exit_code
    with inspector:
        for path in list_images(photos):
            inspection = inspector.inspect(read_image(path))
            print(f"{inspection.verdict.value:<14}{inspection.timings['total']:7.2f} ms  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
