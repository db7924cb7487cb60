"""The built wheel: it holds the three packages and nothing else, and alone it runs a bundle."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, clean = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("sources")
    for name in ("ki_edge", "export", "runtime"):  # a copy: setuptools would pack what an older build left behind
        shutil.copytree(ROOT / name, clean / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clean)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, clean])
    return next(out.glob("*.whl"))


def test_wheel_holds_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ki_edge", "ki_export", "ki_runtime"}
    expected = set()
    for source, package in (
        ("ki_edge", "ki_edge"),
        ("export/ki_export", "ki_export"),
        ("runtime/ki_runtime", "ki_runtime"),
    ):
        files = [*(ROOT / source).rglob("*.py"), ROOT / source / "py.typed", *(ROOT / source).rglob("mappings/*.json")]
        files += (ROOT / source).rglob("web/*")
        expected |= {f"{package}/{path.relative_to(ROOT / source).as_posix()}" for path in files}
    assert {name for name in names if ".dist-info/" not in name} == expected


def interpreter(version: str) -> str | None:
    """A Python of that version: on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    ours = max(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), default=None)
    return ours or shutil.which(f"python{version}")


def test_wheel_alone_runs_a_bundle(wheel: Path, fetch_bundle: Path, fetch_replay: Path, tmp_path: Path) -> None:
    runs_alone(sys.executable, wheel, fetch_bundle, fetch_replay, tmp_path, "-c", ROOT / "constraints.txt")


@pytest.mark.integration
@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13"])
def test_wheel_runs_a_bundle_on(
    version: str, wheel: Path, fetch_bundle: Path, fetch_replay: Path, tmp_path: Path
) -> None:
    """With the newest packages that the index has for that Python."""
    if (python := interpreter(version)) is None:
        pytest.skip(f"no Python {version} here, neither python{version} nor one of pyenv's")
    runs_alone(python, wheel, fetch_bundle, fetch_replay, tmp_path)


def runs_alone(
    interpreter: str, wheel: Path, fetch_bundle: Path, fetch_replay: Path, tmp_path: Path, *pins: str | Path
) -> None:
    home = tmp_path / "robot"
    run([interpreter, "-m", "venv", home])
    python = home / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins, f"{wheel}[ort]"])
    installed = {p["name"].lower() for p in json.loads(run([python, "-m", "pip", "list", "--format=json"]).stdout)}
    assert not installed & {"torch", "onnx", "safetensors", "transformers"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    report = run(
        [home / "bin" / "ki-run", fetch_bundle, "--robot", f"replay:{fetch_replay}", "--json"],
        cwd=tmp_path, env=environment,
    )  # fmt: skip
    result = json.loads(report.stdout)
    assert result["torch_loaded"] is False
    assert result["episodes"]
