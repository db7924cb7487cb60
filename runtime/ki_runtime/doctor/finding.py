"""What a check found, and which backends can run a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "problem"]


def in_bytes(count: float) -> str:
    """A size for people: "6.5 GB", "3.1 MB", "12 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.{0 if name == 'kB' else 1}f} {name}"
    return f"{count:.0f} bytes"


@dataclass(frozen=True)
class Finding:
    """One check in one line. `fix`: the command or the step that mends it; None where there is nothing to mend."""

    level: Level
    name: str
    text: str
    fix: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can run here; `detail`: on what it runs, or why it does not."""

    backend: str
    runs: bool
    detail: str


@dataclass(frozen=True)
class Checkup:
    """Everything that was found. `facts`: the same machine as JSON values, for programs."""

    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    facts: Mapping[str, Any]

    @property
    def runs(self) -> bool:
        """Whether anything here can run a bundle (the bundle, if one was given)."""
        return any(verdict.runs for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "runs": self.runs,
            "checks": [asdict(finding) for finding in self.findings],
            "backends": [asdict(verdict) for verdict in self.verdicts],
            "facts": dict(self.facts),
        }

    def lines(self) -> Iterator[str]:
        """For people: a line a check, its fix below it, and the verdict at the end."""
        width = max(len(finding.name) for finding in self.findings)
        for finding in self.findings:
            yield f"{finding.level:8} {finding.name:{width}}  {finding.text}"
            if finding.fix is not None:
                yield f"{'':8} {'':{width}}  fix: {finding.fix}"
        yield self.summary()

    def summary(self) -> str:
        """One line: what runs, and why the rest does not."""
        can = ", ".join(f"{v.backend} ({v.detail})" for v in self.verdicts if v.runs) or "nothing"
        cannot = ", ".join(f"{v.backend} ({v.detail})" for v in self.verdicts if not v.runs)
        return f"this machine can run: {can}" + (f"; not: {cannot}" if cannot else "")
