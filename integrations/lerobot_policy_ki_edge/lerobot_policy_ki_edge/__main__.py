"""python -m lerobot_policy_ki_edge BUNDLE FOLDER: a folder for LeRobot's --policy.path, which names the bundle.

For commands that take no --policy.type, and for LeRobot's own --rename_map, which it applies to saved policies alone.
"""

import argparse
import sys
from pathlib import Path

from ki_edge.bundle import Bundle
from ki_edge.errors import ArgumentError, KiEdgeError
from ki_runtime.policy.assets import read_assets

from .configuration_ki_edge import KiEdgeConfig
from .observations import input_features, output_features
from .processor_ki_edge import make_ki_edge_pre_post_processors


def save(bundle: Path, folder: Path) -> None:
    """Write the folder. ArgumentError if it exists; errors of `Bundle.open` for what is not a bundle of a policy."""
    if folder.exists():
        raise ArgumentError(f"{folder} exists: give the name of a new folder")
    contract = read_assets(Bundle.open(bundle)).contract
    config = KiEdgeConfig(bundle=str(bundle.resolve()), device="cpu")
    config.input_features, config.output_features = input_features(contract), output_features(contract)
    config.save_pretrained(folder)
    for processor in make_ki_edge_pre_post_processors(config):
        processor.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lerobot_policy_ki_edge", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder written by ki-export")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder, for --policy.path")
    options = parser.parse_args()
    try:
        save(options.bundle, options.folder)
    except KiEdgeError as error:
        print(f"lerobot_policy_ki_edge: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"lerobot_policy_ki_edge: next: lerobot-rollout --policy.path={options.folder} ...")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
