"""Imported by the fork server, before it starts workers: what they need, and signals that are not for them.

A job that is preempted gets SIGTERM in all its processes. The training saves and ends; until then it needs its workers,
and they their server, which ends with the training.
"""

from __future__ import annotations

import signal
import sys

from . import loading

__all__ = ["loading"]

if any("multiprocessing.forkserver" in part for part in sys.orig_argv):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
