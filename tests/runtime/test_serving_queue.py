"""Who is served next, what is not run at all, and what runs together."""

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest

from ki_edge.errors import BackendError, DeviceError
from ki_runtime.serving import LocalEngine, Server, ServerOptions
from ki_runtime.serving.batching import measure_batching

from .serving_parts import (
    BatchPolicy,
    HeldPolicy,
    Watching,
    ask,
    connected,
    in_line,
    seen,
    send,
    serving,
    take,
    wait_until,
)


@pytest.fixture
def stack():
    with ExitStack() as opened:
        yield opened


def clients(stack, server, count):
    return [stack.enter_context(connected(server)) for _ in range(count)]


def waiting(server, count):
    wait_until(lambda: server.status().waiting == count)


def numbers(policy):
    """The first number of each state that the policy saw."""
    return [int(observation["state"][0]) for observation, _ in policy.calls]


def test_clients_take_turns_however_much_one_of_them_sends(stack):
    policy = HeldPolicy(held=True)
    server = stack.enter_context(serving(policy))
    busy, calm, late = clients(stack, server, 3)
    send(busy, seen(1))
    policy.wait()
    for number in (2, 3, 4):
        send(busy, seen(number))
    in_line(server, [4])
    send(calm, seen(10))
    waiting(server, 2)
    send(late, seen(20))
    waiting(server, 3)
    send(busy, seen(5))
    in_line(server, [5, 10, 20])  # it keeps the place of the one that it replaces
    policy.go.set()
    assert take(calm)["actions"][0, 0] == 10 and take(late)["actions"][0, 0] == 20
    found = [take(busy) for _ in range(5)]
    assert [type(one) is str for one in found] == [False, True, True, True, False]
    assert numbers(policy) == [1, 5, 10, 20]


def test_what_is_replaced_keeps_no_picture(stack):
    policy = HeldPolicy(held=True)
    server = stack.enter_context(serving(policy))
    (one,) = clients(stack, server, 1)
    send(one, seen(1))
    policy.wait()
    for number in range(2, 6):
        send(one, seen(number))
    in_line(server, [5])
    (client,) = server._clients
    held = [request.asked.question.observation for request in list(client._answers._queue)]
    assert [bool(observation) for observation in held] == [False, False, False, True]
    policy.go.set()


def test_who_waits_too_long_is_told_while_the_model_runs(stack):
    policy = HeldPolicy(held=True)
    server = stack.enter_context(serving(policy, longest_wait=0.3))
    first, other, hasty = clients(stack, server, 3)
    send(first, seen(1))
    policy.wait()
    send(other, seen(2))
    send(hasty, seen(3, ki_edge={"patience_ms": 1}))
    assert take(other).startswith("late: it waited") and take(hasty).startswith("late: it waited")
    policy.go.set()
    assert take(first)["actions"][0, 0] == 1


def test_what_a_client_asked_that_left_is_not_run(stack):
    policy, watching = HeldPolicy(held=True), Watching()
    server = stack.enter_context(serving(policy, watching))
    first, leaving = clients(stack, server, 2)
    send(first, seen(1))
    policy.wait()
    send(leaving, seen(2))
    waiting(server, 1)
    leaving.close()
    waiting(server, 0)
    policy.go.set()
    assert take(first)["actions"][0, 0] == 1
    outcomes = {request.outcome: request for request in watching.wait(2)}
    assert set(outcomes) == {"answered", "gone"} and outcomes["gone"].batch == 0 and numbers(policy) == [1]


def test_a_client_that_leaves_while_its_request_runs_hinders_nobody(stack):
    policy, watching = HeldPolicy(held=True), Watching()
    server = stack.enter_context(serving(policy, watching))
    leaving, other = clients(stack, server, 2)
    send(leaving, seen(1))
    policy.wait()
    leaving.close()
    send(other, seen(2))
    waiting(server, 1)
    policy.go.set()
    assert take(other)["actions"][0, 0] == 2
    assert {request.outcome for request in watching.wait(2)} == {"answered", "gone"}


def test_over_the_bound_a_client_is_told_that_it_is_busy(stack):
    policy = HeldPolicy(held=True)
    server = stack.enter_context(serving(policy, most_waiting=2))
    first, *others = clients(stack, server, 4)
    send(first, seen(1))
    policy.wait()
    for number, one in enumerate(others[:2]):
        send(one, seen(10 + number))
    waiting(server, 2)
    assert ask(others[2], seen(3)).startswith("busy: 2 requests wait already, and no more may")
    policy.go.set()
    assert [take(one)["actions"][0, 0] for one in (first, *others[:2])] == [1, 10, 11]
    assert ask(others[2], seen(4))["actions"][0, 0] == 4


@pytest.mark.parametrize(("options", "extra"), [({"longest_wait": 0.01}, {}), ({}, {"ki_edge": {"patience_ms": 1}})])
def test_what_waited_too_long_is_not_run(stack, options, extra):
    policy = HeldPolicy(held=True)
    server = stack.enter_context(serving(policy, **options))
    first, other = clients(stack, server, 2)
    send(first, seen(1))
    policy.wait()
    send(other, seen(2, **extra))
    waiting(server, 1)
    asyncio.run(asyncio.sleep(0.05))  # longer than it would wait
    policy.go.set()
    assert take(first)["actions"][0, 0] == 1
    assert take(other).startswith("late: it waited 0.") and numbers(policy) == [1]


def test_what_waits_runs_in_one_batch_where_it_asks_the_same(stack):
    policy, watching = BatchPolicy(held=True), Watching()
    server = stack.enter_context(serving(LocalEngine(policy, largest_batch=3), watching))
    first, *others = clients(stack, server, 7)
    send(first, seen(1))
    policy.wait()
    extras = [{}, {}, {"num_steps": 3}, {"seed": 4}, {}, {"rtc": {"actions": np.ones((2, 2)), "delay": 0}}]
    for number, (one, extra) in enumerate(zip(others, extras, strict=True)):
        send(one, seen(10 + number, ki_edge=extra))
        waiting(server, number + 1)
    policy.go.set()
    for number, one in enumerate(others):
        answer = take(one)
        assert answer["actions"][0, 0] == 10 + number
        assert answer["ki_edge"]["batch"] == {2: 1, 4: 1, 5: 1}.get(number, 3)
    assert [[int(one.observation["state"][0]) for one in batch] for batch in policy.batches] == [[10, 11, 13]]
    assert policy.batches[0][2].seed == 4
    assert sorted(request.batch for request in watching.wait(7)) == [1, 1, 1, 1, 3, 3, 3]


def test_one_that_fails_in_a_batch_fails_alone(stack):
    policy = BatchPolicy(held=True)
    server = stack.enter_context(serving(LocalEngine(policy, largest_batch=4)))
    first, good, bad = clients(stack, server, 3)
    send(first, seen(1))
    policy.wait()
    send(good, seen(2))
    waiting(server, 1)
    send(bad, {"images": {}})
    waiting(server, 2)
    policy.go.set()
    assert take(good)["actions"][0, 0] == 2
    assert take(bad) == "observation: state is missing; expected {}" and len(policy.batches) == 1


class Engine:
    """One that answers as a test wants; `answers`: what it gives."""

    contract, metadata, largest_batch = HeldPolicy.contract, {"name": "other"}, 2

    def __init__(self, answers):
        self.answers = answers

    async def answer(self, questions):
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def close(self):
        pass


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        (BackendError("no replica answers"), "policy: no replica answers"),
        ([], "policy: RuntimeError: the engine gave 0 answers to 1 questions"),
        ([{"actions": object()}], "policy: a part of the observation: expected an array of numbers, got object"),
    ],
)
def test_an_engine_that_fails_answers_all_the_same(stack, answers, line):
    server = stack.enter_context(serving(Engine(answers)))
    (one,) = clients(stack, server, 1)
    for _ in range(2):
        assert ask(one, seen()).startswith(line)


def test_a_lost_device_ends_the_server_after_the_client_was_told(stack):
    server = Server(Engine([DeviceError("the GPU fell off the bus")]), ServerOptions(port=0))
    server.start()
    (one,) = clients(stack, server, 1)
    assert ask(one, seen()) == "policy: the GPU fell off the bus"
    server.close()
    assert str(server.failure) == "the GPU fell off the bus"


class Timed(BatchPolicy):
    """A batch of n takes `of(n)` milliseconds, on a clock of its own."""

    def __init__(self, monkeypatch, of):
        super().__init__()
        self.now, self.of = 0.0, of
        monkeypatch.setattr("ki_runtime.serving.batching.time.perf_counter", lambda: self.now)

    def infer_many(self, requests):
        self.now += 1e-3 * self.of(len(requests))
        return super().infer_many(requests)


@pytest.mark.parametrize(
    ("of", "most", "largest", "text"),
    [
        (lambda n: 10 + n, 8, 8, "up to 8 requests run at once (1: 11 ms, 2: 12 ms, 4: 14 ms, 8: 18 ms)"),
        (lambda n: 10 + n, 6, 6, "up to 6 requests run at once (1: 11 ms, 2: 12 ms, 4: 14 ms, 6: 16 ms)"),
        (lambda n: 10 * n, 8, 1, "requests run one after the other (1: 10 ms, 2: 20 ms)"),
        (lambda n: 10 + max(0, n - 2) * 40, 8, 2, "up to 2 requests run at once (1: 10 ms, 2: 10 ms, 4: 90 ms)"),
        (lambda n: 10, 1, 1, "requests run one after the other (--max-batch 1)"),
    ],
)
def test_how_many_run_at_once_is_measured(monkeypatch, of, most, largest, text):
    found = measure_batching(Timed(monkeypatch, of), most)
    assert (found.largest, found.text) == (largest, text)


def test_a_batch_that_memory_does_not_hold_is_none(monkeypatch):
    policy = Timed(monkeypatch, lambda n: 10)
    batch = policy.infer_many
    monkeypatch.setattr(
        policy, "infer_many", lambda asked: [BackendError("no memory")] * len(asked) if len(asked) > 2 else batch(asked)
    )
    found = measure_batching(policy, 8)
    assert found.largest == 2 and "a batch of 4 failed: no memory" in found.text
    assert measure_batching(HeldPolicy(), 8).text.endswith("this policy takes one at a time")


def noise(seed):
    """How many times longer a busy machine makes each run."""
    random = np.random.default_rng(seed)
    return lambda: float(random.choice([1.0, 1.02, 1.7, 3.0], p=[0.3, 0.3, 0.2, 0.2]))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("of", "largest"), [(lambda n: 10 + n, 8), (lambda n: 10 * n, 1), (lambda n: 9.2 * n + 0.8, 1)]
)
def test_a_busy_machine_does_not_change_what_is_found(monkeypatch, of, largest, seed):
    """Some runs take up to three times as long, others none: the gain is there or it is not."""
    slower = noise(seed)
    assert measure_batching(Timed(monkeypatch, lambda n: of(n) * slower()), 8).largest == largest


def test_a_slow_policy_is_measured_for_fewer_rounds(monkeypatch):
    policy = Timed(monkeypatch, lambda n: 4000.0 * n)
    assert measure_batching(policy, 8).largest == 1 and len(policy.batches) == 8  # 1, 2, and three times both
