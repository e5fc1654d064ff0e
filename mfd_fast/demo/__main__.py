"""``python -m mfd_fast.demo``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
