"""The command ki-train, for `python -m`, `accelerate launch -m` and `torchrun -m ki_edge.train`."""

import sys

from .cli import main

sys.exit(main())
