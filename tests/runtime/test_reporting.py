"""What waits for slow watchers is bounded, in number and in bytes of pictures."""

import threading

import numpy as np

from ki_runtime.control import reporting
from ki_runtime.control.reporting import Reporter, Watcher


class Slow(Watcher):
    """Takes nothing until it may."""

    def __init__(self):
        self.may, self.begun, self.seen = threading.Event(), threading.Event(), []

    def observed(self, tick, observation):
        self.begun.set()
        assert self.may.wait(60)
        self.seen.append(tick)


def test_pictures_that_wait_have_a_limit(monkeypatch):
    monkeypatch.setattr(reporting, "MOST_BYTES", 1000)
    watcher = Slow()
    reporter = Reporter([watcher], threaded=True)

    def tell(tick, size):
        observation = {"images": {"cam": np.zeros(size, np.uint8)}}
        reporter.tell(lambda each: each.observed(tick, observation), size=size)

    tell(0, 2000)  # larger than all that may wait, but nothing waits
    assert watcher.begun.wait(60)
    tell(1, 10)  # the first is still being told, and counts
    assert reporter.dropped == 1
    watcher.may.set()
    while reporter._bytes:
        pass
    for tick in range(2, 5):
        tell(tick, 400)
    reporter.close()
    assert watcher.seen[:2] == [0, 2] and len(watcher.seen) + reporter.dropped == 5
    assert reporter._bytes == 0
