"""A command of this project in a process that does not outlive the one that started it, even where that is killed.

python -m ki_edge.train.watching.child PARENT MODULE ARGUMENTS...
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux' prctl: the signal that comes when the parent ends


def main() -> None:
    """Run MODULE as `python -m` would, unless the process PARENT is gone already."""
    parent, module, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before that was asked for
        sys.exit(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
