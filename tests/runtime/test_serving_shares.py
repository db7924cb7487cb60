"""What waits is shared among the batches that an engine computes at once, by the engine that is there when it comes."""

import asyncio
import time

import pytest

from ki_runtime.serving.dispatcher import Dispatcher
from ki_runtime.serving.question import read_question
from ki_runtime.serving.request import Request
from ki_runtime.serving.waiting import WaitingRoom

from .serving_parts import HeldPolicy, seen


class Replicas:
    """Computes `at_once` batches, all of which end together; `batches`: the sizes of those it was given."""

    contract, metadata = HeldPolicy.contract, {}

    def __init__(self, at_once, largest_batch):
        self.at_once, self.largest_batch, self.batches = at_once, largest_batch, []
        self.go = asyncio.Event()

    async def answer(self, questions):
        self.batches.append(len(questions))
        await self.go.wait()
        return [{"actions": question.observation["state"]} for question in questions]

    def close(self):
        pass


def ask(room, count):
    """So many requests that may run in one batch, each of another client."""
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(count):
        made.append(Request("", read_question(seen(), 100), time.monotonic(), 0, loop.create_future()))
        room.put(object(), made[-1])
    return made


async def turns():
    """Until every task has done what it can; nothing here waits for a clock."""
    for _ in range(100):
        await asyncio.sleep(0)


async def settled(requests):
    for request in requests:
        outcome = await asyncio.wait_for(request.done, 60)
        assert outcome.kind == "answered"


@pytest.mark.parametrize(
    ("at_once", "largest", "waiting", "first"),
    [
        (4, 8, 8, [2, 2, 2, 2]),
        (4, 8, 3, [1, 1, 1]),
        (3, 8, 7, [3, 2, 2]),
        (2, 3, 9, [3, 3]),
        (1, 8, 5, [5]),
    ],
)
def test_no_replica_idles_while_another_computes_a_batch(at_once, largest, waiting, first):
    async def serve():
        engine, room = Replicas(at_once, largest), WaitingRoom(100, 60.0)
        dispatcher = Dispatcher(engine, room, debug=False, lost=print)
        dispatcher.start()
        requests = ask(room, waiting)
        await turns()
        assert engine.batches == first
        engine.go.set()
        await settled(requests)
        dispatcher.cancel()

    asyncio.run(asyncio.wait_for(serve(), 60))


def test_a_replica_that_is_free_alone_takes_all_that_waits():
    async def serve():
        engine, room = Replicas(2, 8), WaitingRoom(100, 60.0)
        dispatcher = Dispatcher(engine, room, debug=False, lost=print)
        dispatcher.start()
        requests = ask(room, 1)
        await turns()
        requests += ask(room, 6)
        await turns()
        assert engine.batches == [1, 6]
        engine.go.set()
        await settled(requests)
        dispatcher.cancel()

    asyncio.run(asyncio.wait_for(serve(), 60))


@pytest.mark.parametrize(("before", "after", "batches"), [(1, 4, [4]), (4, 1, [1, 1, 1, 1])])
def test_the_first_batch_after_a_reload_has_the_new_size(before, after, batches):
    async def serve():
        room = WaitingRoom(100, 60.0)
        dispatcher = Dispatcher(Replicas(1, before), room, debug=False, lost=print)
        dispatcher.start()
        await asyncio.sleep(0)  # it waits for requests
        new = Replicas(1, after)
        new.go.set()
        dispatcher.engine = new
        await settled(ask(room, 4))
        assert new.batches == batches
        dispatcher.cancel()

    asyncio.run(asyncio.wait_for(serve(), 60))
