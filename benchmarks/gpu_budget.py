"""Steps of the GPU benchmark within a budget of minutes: each is done, failed or skipped, and recorded as such."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_process import Failed

from ki_edge.errors import KiEdgeError


@dataclass
class Record:
    """What happened to a step. `state`: "done", "failed", "skipped"; `note`: why."""

    name: str
    state: str
    seconds: float
    note: str = ""


@dataclass
class Budget:
    """`results` is what the steps return, by name; it is written to `file` after each of them."""

    seconds: float
    file: Path
    results: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the end of the budget."""
        return self.seconds - (time.monotonic() - self.start)

    def step(self, name: str, least: float, run: Callable[[], Any], needs: tuple[str, ...] = ()) -> Any:
        """Run a step if `least` seconds are left and the steps that it `needs` are done; its result, or None."""
        missing = [need for need in needs if need not in self.results]
        if missing:
            return self._note(Record(name, "skipped", 0.0, f"without {', '.join(missing)}"))
        if self.left < least:
            return self._note(
                Record(name, "skipped", 0.0, f"needs {least:.0f} s, {max(0.0, self.left):.0f} s are left")
            )
        sys.stderr.write(f"{self.seconds - self.left:5.0f} s  {name}\n")
        begun = time.monotonic()
        try:
            result = run()
        except (Failed, KiEdgeError, OSError, ImportError) as error:
            note = " ".join(str(error).split()) or type(error).__name__
            return self._note(Record(name, "failed", time.monotonic() - begun, note))
        self.results[name] = result
        self._note(Record(name, "done", time.monotonic() - begun))
        return result

    def _note(self, record: Record) -> None:
        self.records.append(record)
        if record.state != "done":
            sys.stderr.write(f"{self.seconds - self.left:5.0f} s  {record.name}: {record.state}: {record.note}\n")
        content = {"steps": [asdict(each) for each in self.records], "results": self.results}
        self.file.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
