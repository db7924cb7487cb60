"""This project beside the real LeRobot in its environment, as somebody with an arm of LeRobot has it."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What of the base package LeRobot may not have brought; the robot's engine.
OURS = ("numpy", "sentencepiece>=0.2", "tokenizers>=0.20", "pillow>=10", "tqdm>=4.66", "onnxruntime>=1.20")
Made = Callable[[str, Callable[[Path], object]], Path]


def beside_lerobot(python: Path, made_once: Made, *sources: Path) -> list[str]:
    """Folders for PYTHONPATH in that environment: packages of these sources, our own code, and what it needs and
    LeRobot has not brought. Nothing is installed into the environment itself.
    """

    def make(place: Path) -> None:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", place]
        wanted = [need for need in OURS if not _has(python, need)]
        if wanted:
            run([*pip, "--no-deps", *wanted])
        for source in sources:
            copy = place.parent / source.name
            shutil.copytree(source, copy, dirs_exist_ok=True)
            run([*pip, "--no-deps", copy])

    place = made_once("beside_lerobot_" + "_".join(source.name for source in sources), make)
    return [str(place), str(ROOT), str(ROOT / "runtime")]


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=1500, check=False, **options
    )  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def _has(python: Path, requirement: str) -> bool:
    name = requirement.partition(">")[0]
    code = f"import importlib.metadata as m; m.version({name!r})"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
