"""How many actions will be executed while an inference runs, predicted from how many really were."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 100  # inferences
SHARE = 0.95  # of them were no longer than what is predicted


class DelayPredictor:
    """The 95th percentile of the last inferences: a running maximum would never recover from one slow inference.

    `guess`: the delay until something was measured. `predicted`, `real`: all of a run, for its report.
    """

    def __init__(self, guess: int) -> None:
        self._guess = guess
        self._last: deque[int] = deque(maxlen=WINDOW)
        self.predicted: list[int] = []
        self.real: list[int] = []

    def predict(self) -> int:
        """Actions that the next inference will probably take."""
        if not self._last:
            return self._guess
        ordered = sorted(self._last)
        return ordered[math.ceil(SHARE * len(ordered)) - 1]

    def add(self, predicted: int, real: int, ticks: int) -> None:
        """An inference that answered: actions executed meanwhile, and ticks that passed (more, if the robot starved).

        The first inference of an episode, for which the robot waited, is none.
        """
        self.predicted.append(predicted)
        self.real.append(real)
        self._last.append(ticks)
