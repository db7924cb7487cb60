"""An environment with the real openpi-client, which asks for numpy below 2.

KI_OPENPI_PYTHON names the interpreter of one that has it.
"""

import os
import shutil
from pathlib import Path

import pytest

from .lerobot_environment import run

VERSION = "3.11"
NEEDS = ("openpi-client==0.1.2", "msgpack", "websockets>=15", "onnxruntime>=1.20", "sentencepiece>=0.2",
         "tokenizers>=0.20", "pillow>=10", "tqdm>=4.66", "typing_extensions")  # fmt: skip


@pytest.fixture(scope="session")
def openpi_python(made_once) -> Path:
    """Its interpreter; skipped where there is no Python to make it with."""
    if given := os.environ.get("KI_OPENPI_PYTHON"):
        return Path(given)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    base = max(map(str, pyenv.glob(f"versions/{VERSION}.*/bin/python")), default=None)
    base = base or shutil.which(f"python{VERSION}")
    if base is None:
        pytest.skip(f"openpi-client 0.1.2 needs a Python with numpy 1: no Python {VERSION} is here")

    def make(place: Path) -> None:
        run([base, "-m", "venv", place])
        run([place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *NEEDS])

    return made_once("openpi_environment", make) / "bin" / "python"
