"""`python -m ki_edge.train`, `accelerate launch -m ki_edge.train`, `torchrun -m ki_edge.train`: the command ki-train."""

import sys

from .cli import main

sys.exit(main())
