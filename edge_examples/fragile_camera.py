"""`updating_camera.py` on a machine whose driver ends the process at the first frame under one release.

No test of a release on a device can foresee that. The program is started again as often as it dies, and the device goes
back by itself: a release that was not confirmed gets three starts.

    python fragile_camera.py FOLDER photos/ SHIFT_OVER
"""

import os
import sys
from pathlib import Path
from typing import Any

import updating_camera

from edgead.runtime import Inspection
from edgead.runtime.live import LiveInspector

DEADLY = 5


class FragileInspector(LiveInspector):
    def inspect(self, *words: Any, **options: Any) -> Inspection:
        if self.active.release.counter == DEADLY:
            os._exit(139)  # as after a fault of memory: nothing is closed, nothing is said
        return super().inspect(*words, **options)


if __name__ == "__main__":
    updating_camera.main(*map(Path, sys.argv[1:4]), inspector=FragileInspector)
