"""`python -m rhythm_kernels.tuning`."""

import sys

from .tune import main

raise SystemExit(main(sys.argv[1:]))
