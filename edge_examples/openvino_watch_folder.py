"""An OpenVINO box that watches a folder: each new picture is inspected; Ctrl-C ends it cleanly.

A camera or a PLC puts pictures into INBOX (by renaming them there, so none is half written); answers go to OUTBOX as
JSON lines and overlays. Needs only: pip install 'edgead[openvino]'

    python openvino_watch_folder.py part.bundle INBOX OUTBOX
"""

import sys
import time
from pathlib import Path

from edgead.runtime import Inspector, read_image
from edgead.runtime.errors import EdgeadError
from edgead.runtime.files import write_file
from edgead.runtime.image import encode_png, is_image_path
from edgead.runtime.inspection import encode_line, result_line
from edgead.runtime.overlay import overlay

PAUSE = 0.2


def watch(bundle: Path, inbox: Path, outbox: Path, *, target: str = "openvino", rounds: int | None = None) -> int:
    """Look `rounds` times (for ever if None); returns how many pictures were answered."""
    outbox.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    with Inspector(bundle, target=target) as inspector, open(outbox / "results.jsonl", "ab") as results:
        while rounds is None or rounds > 0:
            for path in sorted(path for path in inbox.iterdir() if is_image_path(path)):
                if path.name in seen:
                    continue
                seen.add(path.name)
                try:
                    frame = read_image(path)
                    inspection = inspector.inspect(frame)
                    picture = overlay(frame, inspection, inspector.spec.preprocessing)
                    write_file(outbox / f"{path.stem}.png", encode_png(picture))
                except EdgeadError as error:
                    inspection = inspector.refusal(error.got)
                results.write(encode_line(result_line(inspection, path.name)))
                results.flush()
                print(f"{inspection.verdict.value:<14}{path.name}", flush=True)
            if rounds is not None:
                rounds -= 1
            time.sleep(PAUSE)
    return len(seen)


if __name__ == "__main__":
    try:
        watch(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    except KeyboardInterrupt:
        print("stopped")
