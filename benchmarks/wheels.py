"""Which wheels a Jetson would install: every dependency of the base package and of the backends, looked up with pip.

    python benchmarks/wheels.py                          JetPack 6 (Python 3.10) and 7 (Python 3.12)
    python benchmarks/wheels.py --packages numpy pillow

Each requirement is downloaded with its own dependencies for aarch64 and glibc as new as the system's (at most 2.35 and
2.39); only wheels are taken, so whatever is printed installs without a compiler. Environment markers are those of the
Python that runs this script. Exit status 1 if a wheel is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

from boards import markdown

OLDEST_GLIBC = 17


@dataclass(frozen=True)
class System:
    """A JetPack: its Python, and the newest glibc 2.x that wheels may want."""

    name: str
    python: str
    glibc: int
    extra: tuple[str, ...]


SYSTEMS = (
    System("JetPack 6, Python 3.10", "3.10", 35, ("onnxruntime>=1.20", "cuda-python>=12.6,<13")),
    System("JetPack 7, Python 3.12", "3.12", 39, ("onnxruntime>=1.20", "cuda-python>=13,<14")),
)


def base_requirements() -> list[str]:
    """What the package itself requires, without extras."""
    return [text for text in requires("ki-edge") or [] if "extra ==" not in text]


def download(requirement: str, system: System, folder: Path) -> str | None:
    """Fetch a requirement and what it requires; pip's last line if it cannot."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(OLDEST_GLIBC, system.glibc + 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += [
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        system.python,
        "--dest",
        str(folder),
    ]
    for platform in ("manylinux2014_aarch64", *platforms):
        command += ["--platform", platform]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return None if done.returncode == 0 else (errors or ["ERROR: no message"])[-1]


def look_up(system: System, requirements: list[str]) -> tuple[dict[str, tuple[str, str, int]], list[str]]:
    """{distribution: (version, tags, bytes)}, and a line for each requirement that has no wheel."""
    found, missing = {}, []
    for requirement in requirements:
        with tempfile.TemporaryDirectory() as scratch:
            error = download(requirement, system, Path(scratch))
            missing += [f"{requirement}: {error}"] if error else []
            for wheel in sorted(Path(scratch).glob("*.whl")):
                name, version, *tags = wheel.stem.split("-")
                found[name] = (version, "-".join(tags).split(".")[0], wheel.stat().st_size)
    return found, missing


def main() -> int:
    """Parse, look up, print a table."""
    parser = argparse.ArgumentParser(description="Wheels for aarch64 of everything that a robot installs.")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="only these requirements")
    options = parser.parse_args()
    columns, missing = {}, []
    for system in SYSTEMS:
        wanted = options.packages or [*base_requirements(), *system.extra]
        columns[system.name], without = look_up(system, wanted)
        missing += [f"{system.name}: {line}" for line in without]
    names = sorted({name for found in columns.values() for name in found})
    rows = []
    for name in names:
        cells = [found.get(name) for found in columns.values()]
        rows.append([name, *(f"{c[0]}, {c[1]}, {c[2] / 1e6:.1f} MB" if c else "" for c in cells)])
    totals = [f"{sum(size for *_, size in found.values()) / 1e6:.0f} MB" for found in columns.values()]
    print("\n".join(markdown(["", *columns], [*rows, ["together", *totals]])))
    for line in missing:
        print(f"MISSING {line}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
