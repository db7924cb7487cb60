"""One table of all precisions: size, time, error and success of a checkpoint's exports, on every engine that is here.

    python benchmarks/precision.py examples/fetch/checkpoint --robot gym:FetchReach-v4 --success 100
    python benchmarks/precision.py build/depth2 --observations 4 --only fp32,int8,fp16

Each export computes the same observations with the same noise. With --robot they come from the robot, at the start of
an episode and some steps into it, while float32 controls it; without, they are drawn: random pixels, random prompts.
Errors are in the model's space, over the dimensions that the robot has, against ONNX Runtime in float32: relative L2
over all observations, the cosine of the worst chunk. Time: median inference here, as a multiple of ONNX Runtime's in
float32 of the same run; what needs a GPU is computed in its own arithmetic instead and has no time, but a floor for
known devices. Size: weights that acting needs. --folder keeps the exports, and takes those that it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from precision_exports import CONTENDERS, Contender, exported
from precision_measures import Row, describe_success, drawn_inputs, floors, measure, robot_inputs, success
from tqdm import tqdm

from ki_edge.errors import ArgumentError, KiEdgeError


def chosen(only: str) -> list[Contender]:
    """The contenders of these names; the first, which the others are measured against, is always there."""
    names = [name.strip() for name in only.split(",")] if only else [each.key for each in CONTENDERS]
    if unknown := set(names) - {each.key for each in CONTENDERS}:
        raise ArgumentError(f"--only {sorted(unknown)}: expected some of {', '.join(c.key for c in CONTENDERS)}")
    return [each for each in CONTENDERS if each is CONTENDERS[0] or each.key in names]


def table(rows: Sequence[Row]) -> list[str]:
    """The rows in markdown."""
    head = ["precision", "computed by", "MB to act", "time", "relative L2", "smallest cosine", "success"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if row.missing:
            lines.append([row.precision, row.engine, "", "", "", "", row.missing])
            continue
        time = "" if row.ratio is None else f"{row.ratio:.2f}"
        reached = "" if row.success is None else describe_success(row.success)
        size, error, cosine = f"{row.acting / 1e6:.1f}", f"{row.relative:.2g}", f"{row.cosine:.7f}"
        lines.append([row.precision, row.engine, size, time, error, cosine, reached])
    return [f"| {' | '.join(line)} |" for line in lines]


def rows_of(options: argparse.Namespace, folder: Path) -> list[Row]:
    """A row for each contender, one after the other: each may hold the whole model."""
    rows: list[Row] = []
    contenders = chosen(options.only)
    with tqdm(total=len(contenders), desc="precisions", disable=None, leave=False) as bar:
        first = exported(options.checkpoint, folder, contenders[0], policy=bool(options.robot))
        inputs = robot_inputs(first, options.robot, options.observations) if options.robot else drawn_inputs(
            first, options.observations
        )  # fmt: skip
        for contender in contenders:
            bundle = exported(options.checkpoint, folder, contender, policy=bool(options.robot))
            row = measure(contender, bundle, inputs, rows[0] if rows else None)
            if options.success and options.robot and not row.missing:
                row.success = success(bundle.path, contender, options.robot, options.success, options.seed)
            rows.append(row)
            bar.update()
    return rows


def main() -> int:
    """Parse, measure, print, draw."""
    parser = argparse.ArgumentParser(description="Size, time, error and success by precision and engine.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the exports here, or take them from here")
    parser.add_argument("--observations", type=int, default=24, help="each with its own noise (%(default)s)")
    parser.add_argument("--robot", help="take observations from this robot, for example gym:FetchReach-v4")
    parser.add_argument("--success", type=int, default=0, metavar="N", help="episodes with each precision on the robot")
    parser.add_argument("--seed", type=int, default=1000, help="scene of the first episode (%(default)s)")
    parser.add_argument("--only", default="", metavar="NAMES", help=", ".join(each.key for each in CONTENDERS))
    parser.add_argument("--picture", type=Path, help="draw success, or else cosine, against size into this PNG")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rows = rows_of(options, options.folder or Path(scratch))
    except KiEdgeError as error:
        print(f"precision: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    print("\n" + "\n".join(floors(rows)))
    if options.json:
        options.json.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if options.picture:
        from precision_picture import draw

        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
