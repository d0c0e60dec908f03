"""``python -m torch_distro``: the same as the command ``torch-distro``."""

import sys

from torch_distro._cli import main

if __name__ == "__main__":
    sys.exit(main())
