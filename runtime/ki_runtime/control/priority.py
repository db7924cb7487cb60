"""The control thread before all others, as far as the system lets it; and nothing that interrupts it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SWITCH = 5e-4  # seconds until Python lets another thread on
REAL_TIME = 20  # of 99: before every usual thread, behind those of the kernel
NICE = -10  # of this process's other threads: one that is not run while it holds Python's lock stops the control thread
TASKS = Path("/proc/self/task")


@contextmanager
def undisturbed() -> Iterator[str]:
    """For a control thread: garbage is not collected, other threads give way sooner, the system runs it first.

    Gives what the system allowed, in words. All is as before afterwards.
    """
    interval, collecting = sys.getswitchinterval(), gc.isenabled()
    gc.collect()
    gc.disable()
    sys.setswitchinterval(SWITCH)
    niceness = _lower_niceness()
    real_time = _set_real_time()
    words = ["real-time priority"] * (real_time is not None) + [f"nice {NICE}"] * bool(niceness)
    try:
        yield " and ".join(words) or "usual priority: the system allows no other"
    finally:
        if real_time is not None:
            _give_back(*real_time)
        for thread, value in niceness.items():
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, value)
        sys.setswitchinterval(interval)
        if collecting:
            gc.enable()


def _set_real_time() -> tuple[int, os.sched_param] | None:
    """The policy and priority before; None where nothing was set."""
    if not hasattr(os, "sched_setscheduler"):
        return None
    try:
        before = os.sched_getscheduler(0), os.sched_getparam(0)
        # what it starts is not of this priority: a film's ffmpeg, for one
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(REAL_TIME))
    except OSError:
        return None
    return before


def _give_back(policy: int, priority: os.sched_param) -> None:
    # a user who is not root may lower the priority, but not take back that it ends at a fork
    for again in (policy, policy | os.SCHED_RESET_ON_FORK):
        with suppress(OSError):
            os.sched_setscheduler(0, again, priority)
            return


def _lower_niceness() -> dict[int, int]:
    """Thread -> niceness before."""
    before: dict[int, int] = {}
    threads = [int(entry.name) for entry in TASKS.iterdir()] if TASKS.is_dir() else []
    with suppress(OSError):
        for thread in threads:
            value = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, min(value, NICE))
            before[thread] = value
    return before
