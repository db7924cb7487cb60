"""The tests of --rerun, in a venv that has rerun-sdk: `make test-integrations`."""

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

from .test_packaging import ROOT, run

pytestmark = pytest.mark.integration


def test_what_rerun_is_given(tmp_path: Path) -> None:
    python: Path | str = sys.executable
    if find_spec("rerun") is None:  # beside what is installed here, which it does not change
        run([sys.executable, "-m", "venv", tmp_path / "venv"])
        python = tmp_path / "venv" / "bin" / "python"
        place = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).stdout.strip()
        (Path(place) / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "rerun-sdk>=0.24"])
    places = os.pathsep.join(str(ROOT / place) for place in (".", "export", "runtime"))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/runtime/test_rerun.py"]
    result = run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": places})
    assert " passed" in result.stdout and "skipped" not in result.stdout
