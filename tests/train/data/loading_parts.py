"""A training in a process of its own, whose workers the tests count: python loading_parts.py FOLDER MAP [heeds].

It says "go" when its first batch is there, takes batches until it is stopped, and says how many came after SIGTERM.
"""

import signal
import sys

from ki_edge.config import TINY
from ki_edge.planning.settings import TrainSettings
from ki_edge.train.data.opening import open_data
from ki_edge.train.data.start import Start
from ki_edge.train.step.training_data import Share


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    folder, told = sys.argv[1:3]
    asked = []
    if len(sys.argv) > 3:
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    settings = TrainSettings(steps=1_000_000, batch=4, flow_draws=1)
    data = open_data([folder], Start.from_nothing(TINY), settings, horizon=4, map_file=told, workers=2)
    after = 0
    try:
        for number, _ in enumerate(data.steps(0, Share())):
            if number == 0:
                say("go")
            after += bool(asked)
            if after > 20:
                break
    except KeyboardInterrupt:
        say("interrupted")
    data.close()
    say(f"{after} after")
