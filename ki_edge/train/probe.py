"""Was this checkpoint trained with FAST tokens in view of its action expert? Then it must be trained again.

python -m ki_edge.train.probe CHECKPOINT DATASET...

Flow loss with and without the tokens in view, on episodes that it was not trained on (give such a dataset). Exit status
0 if it was not, 1 if it was, 2 for an error, 3 if it cannot be told: the policy has not learnt such data, or too few
frames were looked at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from ki_edge.commands import Parser, run_command, show, show_json, tell
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.model import Pi05, load_model
from ki_edge.planning.settings import TrainSettings

from .data.opening import MixedData, open_data
from .data.start import Start
from .step.batch import Batch
from .step.training_data import Share
from .watching.old_ki import Probe, probe, told_by_config

LEAKS, UNKNOWN = 1, 3


def probe_checkpoint(
    checkpoint: Path, datasets: Sequence[str], *, samples: int = 64, batch: int = 8, map_file: Path | None = None
) -> Probe:
    """The probe of a checkpoint of any format that ki-export reads, on samples of datasets, drawn the same every time.

    CheckpointError, DatasetError or ArgumentError for what cannot be opened, or does not fit each other.
    """
    if samples < 1 or batch < 1:
        raise ArgumentError(f"samples {samples}, batch {batch}: expected at least 1 each")
    start = Start.from_checkpoint(checkpoint)
    if start.checkpoint is None or start.config.variant != "pi05":
        raise CheckpointError(f"{checkpoint} holds a {start.config.variant}: only a π0.5 is trained with FAST tokens")
    settings = TrainSettings(steps=-(-samples // batch), batch=batch, warmup=1, flow_draws=4)
    data = open_data(datasets, start, settings, map_file=map_file, workers=0, say=tell)
    try:
        model = load_model(start.checkpoint)
        assert isinstance(model, Pi05)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return probe(model, islice(_batches(data), settings.steps))
    finally:
        data.close()


def _batches(data: MixedData) -> Iterator[Batch]:
    for step in data.steps(0, Share()):
        yield from step


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    parser = Parser(
        prog="ki_edge.train.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="LeRobotDatasets that it was not trained on")
    parser.add_argument("--samples", type=int, default=64, help="samples that are looked at (64)")
    parser.add_argument("--batch", type=int, default=8, help="of them at once (8)")
    parser.add_argument("--map", type=Path, metavar="FILE", help="which feature is which camera, state, action (JSON)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    options = parser.parse_args(arguments)

    def run() -> int:
        if (suspicion := told_by_config(options.checkpoint)) is not None:
            tell(suspicion)
        found = probe_checkpoint(
            options.checkpoint, options.datasets, samples=options.samples, batch=options.batch, map_file=options.map
        )
        if options.json:
            show_json(found.to_json())
        else:
            show([found.line()])
        return LEAKS if found.leaks else UNKNOWN if found.doubt else 0

    return run_command("ki_edge.train.probe", run, "nothing was written", needs="train")


if __name__ == "__main__":
    sys.exit(main())
