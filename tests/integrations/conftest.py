"""Packages that this project's environment cannot or need not have, in environments of their own in build/, kept.

LeRobot needs another Python and another torch: 6 GB and some minutes, unless KI_LEROBOT_PYTHON names an interpreter of
an environment that has it. Triton's client takes 150 MB, Ray 650 MB.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "3.12"
PACKAGES = ("lerobot[pi,dataset]==0.6.1", "datasets<5", "av<16")
HERE = Path(__file__).parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def succeed(*command: object, **options: object) -> None:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"


@pytest.fixture(scope="session")
def lerobot_python() -> Path:
    """An interpreter with LeRobot; skipped where there is neither one nor a Python to make it with."""
    if given := os.environ.get("KI_LEROBOT_PYTHON"):
        return Path(given)
    home = ROOT / "build" / "lerobot"
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        ours = max(map(str, pyenv.glob(f"versions/{VERSION}.*/bin/python")), default=None)
        if (base := ours or shutil.which(f"python{VERSION}")) is None:
            pytest.skip(
                f"LeRobot needs Python {VERSION}, which is not here; KI_LEROBOT_PYTHON may name one that has it"
            )
        succeed(base, "-m", "venv", "--clear", home)
        succeed(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
        (home / ".ready").touch()
    return python


def environment(name: str, *packages: str) -> Path:
    """The interpreter of an environment build/NAME of this Python with some packages, made once."""
    home = ROOT / "build" / name
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        succeed(sys.executable, "-m", "venv", "--clear", home)
        succeed(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
        (home / ".ready").touch()
    return python


@pytest.fixture(scope="session")
def triton_python() -> Path:
    """An interpreter with Triton's client, which has the protobuf of its configurations."""
    return environment("triton", "tritonclient[grpc]>=2.50")


@pytest.fixture(scope="session")
def ray_python() -> Path:
    """An interpreter with Ray Serve, an engine, and what a server needs: 650 MB."""
    base = ("numpy", "sentencepiece", "tokenizers", "pillow", "tqdm", "onnxruntime")
    return environment("ray", "ray[serve]>=2.60", *base, "websockets>=15", "msgpack", "prometheus-client")


@pytest.fixture(scope="session")
def lerobot_site(lerobot_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin as pip installs it, the engine, and a robot and an environment that LeRobot finds."""
    site = tmp_path_factory.mktemp("site")
    into = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", site)
    sources = tmp_path_factory.mktemp("sources") / "plugin"  # a copy, in which setuptools may build
    shutil.copytree(ROOT / "integrations" / "lerobot_policy_ki_edge", sources)
    succeed(lerobot_python, *into, "onnxruntime", "websockets", "msgpack")
    succeed(sys.executable, *into, "--no-build-isolation", sources)
    for source, name in (("dummy_robot.py", "lerobot_robot_dummy"), ("dummy_env.py", "lerobot_env_dummy")):
        shutil.copy(HERE / source, site / f"{name}.py")
        (site / f"{name}-0.0.0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.0\n"
        (site / f"{name}-0.0.0.dist-info" / "METADATA").write_text(metadata)
    return site


@pytest.fixture(scope="session")
def run_lerobot(lerobot_python: Path, lerobot_site: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run_lerobot(*arguments): LeRobot's Python with the plugin and this checkout, in a folder of its own."""
    folder = tmp_path_factory.mktemp("work")
    places = [lerobot_site, ROOT, ROOT / "export", ROOT / "runtime"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(lerobot_python), *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=550, check=False, cwd=folder, env=environment
        )

    return run


@pytest.fixture(scope="session")
def lerobot_checkpoint(data: Path) -> Path:
    """A small π0.5 that LeRobot saved."""
    return data / "policies" / "h_a01_q_2cam_480x640"


@pytest.fixture(scope="session")
def lerobot_bundle(lerobot_checkpoint: Path, made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Its bundle, with real-time chunking."""
    export = (sys.executable, "-m", "ki_export.cli", lerobot_checkpoint, "--target", "ort", "--rtc", "-o")
    return made_once("lerobot_bundle", lambda path: succeed(*export, path))
