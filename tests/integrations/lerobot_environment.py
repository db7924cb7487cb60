"""An environment with the real LeRobot, and beside it this project, as somebody with an arm of LeRobot has it.

KI_LEROBOT_PYTHON names the Python of an environment that has LeRobot already: that is used, and nothing is installed.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "3.12"  # that LeRobot 0.6 needs
LEROBOT = ("lerobot==0.6.1", "datasets<5", "av<16")
# What of the base package LeRobot may not have brought; the robot's engine.
OURS = ("numpy", "sentencepiece>=0.2", "tokenizers>=0.20", "pillow>=10", "tqdm>=4.66", "onnxruntime>=1.20")
Made = Callable[[str, Callable[[Path], object]], Path]


def lerobot_python(made_once: Made) -> Path:
    """The Python of LeRobot's environment, made once for all tests (some minutes, 6 GB); skips where none is found."""
    if (given := os.environ.get("KI_LEROBOT_PYTHON")) is not None:
        return Path(given)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    base = max(map(str, pyenv.glob(f"versions/{VERSION}.*/bin/python")), default=None)
    base = base or shutil.which(f"python{VERSION}")
    if base is None:
        pytest.skip(f"LeRobot 0.6 needs Python {VERSION}: neither python{VERSION} nor one of pyenv's is here")

    def make(place: Path) -> None:
        run([base, "-m", "venv", place])
        pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, *LEROBOT])

    return made_once("lerobot_environment", make) / "bin" / "python"


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
