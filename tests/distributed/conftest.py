"""Children of the tests find the helper modules of this folder and of tests/bindings."""

import os
import sys
from pathlib import Path

_here = Path(__file__).parent
_folders = [str(_here), str(_here.parent / "bindings")]
sys.path[:0] = _folders
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*_folders, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
