"""Several simulated robots at the same time, whose inferences are computed in one batch."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from ki_runtime.control.loop import ControlLoop
from ki_runtime.control.options import LoopOptions
from ki_runtime.robots import open_robot


class Together:
    """Takes the place of a sampler's `sample_actions` for several threads: what all of them ask for is one batch.

    A batch is computed when every thread that has not `left` is waiting. Shorter prompts are padded, which changes no
    action but by rounding.
    """

    def __init__(self, sample: Callable[..., Any], threads: int) -> None:
        self._sample, self._active = sample, threads
        self._turn = threading.Condition()
        self._asked: list[tuple[tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __call__(self, *inputs: Any, **given: Any) -> Any:
        answer: list[Any] = []
        with self._turn:
            self._asked.append((inputs, given, answer))
            self._compute()
            self._turn.wait_for(lambda: answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def leave(self) -> None:
        """A thread asks no more."""
        with self._turn:
            self._active -= 1
            self._compute()

    def _compute(self) -> None:
        if not self._asked or len(self._asked) < self._active:
            return
        asked, self._asked = self._asked, []
        width = max(inputs[2].shape[1] for inputs, _, _ in asked)
        rows = [(*inputs[:2], *(_padded(array, width) for array in inputs[2:])) for inputs, _, _ in asked]
        noise = np.concatenate([given["noise"] for _, given, _ in asked])
        try:
            batch = [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]
            found = self._sample(*batch, noise=noise, num_steps=asked[0][1].get("num_steps"))
            answers: list[Any] = [found[at : at + 1] for at in range(len(asked))]
        except Exception as error:
            answers = [error] * len(asked)
        for (_, _, answer), actions in zip(asked, answers, strict=True):
            answer.append(actions)
        self._turn.notify_all()


def _padded(array: Any, width: int) -> Any:
    return np.pad(array, ((0, 0), (0, width - array.shape[1])))


DRAWING = threading.RLock()  # software renderers crash when two threads draw at once


class OneAtATime:
    """A robot that only one thread moves or looks through at a time."""

    def __init__(self, robot: Any) -> None:
        self._robot = robot

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._robot, name)
        if not callable(value):
            return value

        def call(*inputs: Any, **given: Any) -> Any:
            with DRAWING:
                return value(*inputs, **given)

        return call


def run_episodes(policy: Any, robot: str, options: LoopOptions) -> list[Any]:
    """The episodes of a loop, each with the success at its last and at any step."""
    with DRAWING:
        arm: Any = OneAtATime(open_robot(robot))
    try:
        return list(ControlLoop(policy, arm, options).run().episodes)
    finally:
        arm.close()


def run_together(policy: Any, robot: str, options: LoopOptions, threads: int) -> list[Any]:
    """The same with `threads` robots at the same time, whose inferences are computed together."""
    together = Together(policy.sampler.sample_actions, threads)
    policy.sampler.sample_actions = together
    bounds = np.linspace(0, options.episodes, threads + 1).astype(int).tolist()

    def run(first: int, last: int) -> list[Any]:
        try:
            mine = replace(options, episodes=last - first, seed=options.seed + first)
            return run_episodes(policy, robot, mine)
        finally:
            together.leave()

    with ThreadPoolExecutor(threads) as pool:
        return [episode for found in pool.map(run, bounds[:-1], bounds[1:]) for episode in found]
