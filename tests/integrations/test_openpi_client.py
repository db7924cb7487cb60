"""openpi's interfaces with the real openpi-client, in an environment of its own: it asks for numpy below 2."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .lerobot_environment import ROOT, run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
VERSION = "3.11"
NEEDS = ("openpi-client==0.1.2", "msgpack", "websockets>=15", "onnxruntime>=1.20", "sentencepiece>=0.2",
         "tokenizers>=0.20", "pillow>=10", "tqdm>=4.66", "typing_extensions")  # fmt: skip
CHECKS = Path(__file__).parent / "openpi_client_checks.py"


def test_frames_client_and_environments_of_the_real_package(made_once, fetch_bundle):
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    base = max(map(str, pyenv.glob(f"versions/{VERSION}.*/bin/python")), default=None)
    base = base or shutil.which(f"python{VERSION}")
    if base is None:
        pytest.skip(f"openpi-client 0.1.2 needs a Python with numpy 1: no Python {VERSION} is here")

    def make(place: Path) -> None:
        run([base, "-m", "venv", place])
        run([place / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *NEEDS])

    python = made_once("openpi_environment", make) / "bin" / "python"
    path = os.pathsep.join(map(str, (CHECKS.parent, ROOT, ROOT / "runtime")))
    result = subprocess.run(
        [python, CHECKS, fetch_bundle], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 4, result.stdout
