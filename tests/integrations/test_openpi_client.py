"""openpi's interfaces with the real openpi-client: its frames, its client, its environments."""

import os
import subprocess
from pathlib import Path

import pytest

from .lerobot_environment import ROOT
from .openpi_environment import openpi_python  # noqa: F401

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
CHECKS = Path(__file__).parent / "openpi_client_checks.py"


def test_frames_client_and_environments_of_the_real_package(openpi_python, fetch_bundle):  # noqa: F811
    path = os.pathsep.join(map(str, (CHECKS.parent, ROOT, ROOT / "runtime")))
    result = subprocess.run(
        [openpi_python, CHECKS, fetch_bundle], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 4, result.stdout
