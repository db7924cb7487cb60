"""The proof on the device: an engine answers the bundle's witness before its first action, or is refused.

Its actions are computed step by step, and as the sequence that a backend may record and replay, several times with
other inputs in between, so that a replay which reads what is no longer there shows. Both are held to the reference's
actions and to each other. FAST tokens are proven when they are first asked for: their engine is not opened before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ki_edge import graphs
from ki_edge.bundle import Bundle, sha256
from ki_edge.bundle.witness import WITNESS, Witness, has_witness, read_witness
from ki_edge.errors import BackendError, BundleError
from ki_runtime.backends.backend import Backend, SessionOptions, Setting, Unproven
from ki_runtime.backends.registry import choose_backend

from . import verdict as verdicts
from .rounding import widened
from .verdict import ACTIONS, FAST, Row, Verdict

if TYPE_CHECKING:
    from .sampler import Sampler

F32 = npt.NDArray[np.float32]
ROUNDS = 3  # of the recorded sequence: it is recorded in the first, and replayed in the others
GRAPHS = {ACTIONS: (graphs.PREFIX.name, graphs.DENOISE.name), FAST: (graphs.FAST_DECODE.name, graphs.PREFIX.name)}


AT_EXPORT = "proven at its export, by the same engine on the same processor"


@dataclass(frozen=True)
class Standing:
    """`proven`: None if nothing is known. `text`: in a few words, with figures and date."""

    proven: bool | None
    text: str


@dataclass(frozen=True, eq=False)
class Prover:
    """The proof of one backend that has opened a bundle."""

    bundle: Bundle
    backend: Backend
    options: SessionOptions

    def require(self, part: str, sampler: Sampler) -> str:
        """See to it that a part, "actions" or "fast", is proven here; what is known of it, in a few words.

        A verdict that was written down is trusted, good or bad. BackendError with the figures if the engine is refused,
        BundleError if the witness is damaged.
        """
        if not has_witness(self.bundle.manifest):
            return Unproven(without_witness(self.bundle))
        setting = self._setting(part, sampler)
        environment = environment_of(self.bundle, setting, self.options.record)
        found = verdicts.find(part, environment, setting.folder)
        if found is None and proven_by(self.bundle) == proving_environment(setting):
            return AT_EXPORT
        if found is None:
            self.options.say(f"{self.backend.name}: runs the bundle's witness, once, before its first {_WORDS[part]}")
            found = self._judge(part, sampler, environment, setting)
        if not found.passed:
            raise BackendError(refusal(self.backend.name, found, self.bundle))
        return f"proven here on {found.date[:10]}: {found.figures()}"

    def repeat(self, part: str, sampler: Sampler) -> Verdict:
        """Run the witness whatever was found before, and write the verdict down."""
        setting = self._setting(part, sampler)
        return self._judge(part, sampler, environment_of(self.bundle, setting, self.options.record), setting)

    def _setting(self, part: str, sampler: Sampler) -> Setting:
        """What computes this part: the engines that the sampler has loaded, whatever lies on the disk by now."""
        setting = self.backend.setting(self.bundle, GRAPHS[part])
        loaded = [facts for graph in GRAPHS[part] if (facts := sampler.facts(graph)) is not None]
        if not loaded:
            return setting
        environment = {
            **setting.environment,
            **{key: value for each in loaded for key, value in each.environment.items()},
        }
        return replace(setting, environment=environment, folder=loaded[0].folder)

    def _judge(self, part: str, sampler: Sampler, environment: Mapping[str, str], setting: Setting) -> Verdict:
        witness = widened(read_witness(self.bundle), setting.rounding)
        if sha256(self.bundle.file(WITNESS)) != self.bundle.manifest.files[WITNESS].get("sha256"):
            raise BundleError(f"{self.bundle.path}: '{WITNESS}' has changed since the export; copy the bundle again")
        rounds = 1 if self.backend.device == "CPU" else ROUNDS  # nothing is recorded on a CPU
        rows = examine(sampler, witness, rounds) if part == ACTIONS else [continued(sampler, witness, rounds)]
        found = Verdict(part, environment, datetime.now(timezone.utc).isoformat(timespec="seconds"), tuple(rows))
        if part == ACTIONS and found.passed and not self._replayed(sampler):
            return found  # it says nothing of records, so it is not written down
        if verdicts.keep(found, setting.folder) is None:
            self.options.say("the verdict cannot be written, beside the engine or in the user's cache: kept until exit")
        return found

    def _replayed(self, sampler: Sampler) -> bool:
        """Whether what may be recorded was replayed; else nothing is recorded in this process any more."""
        if self.options.record is False:
            return True
        sessions = [session for graph in GRAPHS[ACTIONS] if (session := sampler.session(graph)) is not None]
        idle = [session for session in sessions if session.replays == 0]
        for session in idle:
            session.stop_recording()
        if idle:
            names = " and ".join(session.spec.name for session in idle)
            self.options.say(f"{names}: proven without CUDA graphs, and used without until the next start proves again")
        return not idle


_WORDS = {ACTIONS: "action", FAST: "FAST token"}


def standing(bundle: Bundle, backend: str) -> Standing:
    """What is known of a backend here, from what was written down; nothing is run. BackendError for an unknown name."""
    chosen = choose_backend(backend, bundle)
    if not has_witness(bundle.manifest):
        return Standing(None, without_witness(bundle))
    parts = (ACTIONS, FAST) if bundle.manifest.has_fast else (ACTIONS,)
    found = {part: _written(bundle, chosen, part) for part in parts}
    wrong = next((v for v in found.values() if isinstance(v, Verdict) and not v.passed), None)
    if wrong is not None:
        return Standing(False, f"refused here on {wrong.date[:10]}: {wrong.figures()}")
    acting = found[ACTIONS]
    if isinstance(acting, Verdict):
        fast = "; FAST tokens too" if isinstance(found.get(FAST), Verdict) else ""
        return Standing(True, f"proven here on {acting.date[:10]}: {acting.figures()}{fast}")
    return Standing(True if acting else None, acting or "not yet proven here")


def _written(bundle: Bundle, backend: Backend, part: str) -> Verdict | str:
    """The verdict that was written down, or why none is needed; empty if neither."""
    try:
        setting = backend.setting(bundle, GRAPHS[part])
    except BackendError:  # its engines do not exist
        return ""
    found = verdicts.find(part, environment_of(bundle, setting), setting.folder)
    return found or (AT_EXPORT if proven_by(bundle) == proving_environment(setting) else "")


def examine(sampler: Sampler, witness: Witness, rounds: int = ROUNDS) -> list[Row]:
    """Every observation step by step, and `rounds` times as a sequence, held to the reference and to each other."""
    runs: list[list[F32]] = [[] for _ in range(len(witness))]
    eager = [_step_by_step(sampler, witness, row) for row in range(len(witness))]
    right = [_error(eager[row], witness.actions[row]) <= witness.max_abs[row] for row in range(len(witness))]
    again: list[F32] = []
    for turn in range(rounds if all(right) else 0):  # what is wrong step by step needs no second look
        for row in np.roll(np.arange(len(witness)), -turn):
            runs[row].append(sampler.sample_actions(*witness.inputs(row), **witness.more(row))[0])
        if turn == rounds - 2:  # step by step once more: the last replays come after it
            again = [_step_by_step(sampler, witness, row) for row in range(len(witness))]
    return [_row(witness, row, eager[row], runs[row], again[row : row + 1]) for row in range(len(witness))]


def continued(sampler: Sampler, witness: Witness, rounds: int = ROUNDS) -> Row:
    """The FAST continuation, `rounds` times with another observation's in between."""
    fast = witness.fast
    assert fast is not None  # the witness of a bundle with fast_decode has it
    arguments: dict[str, Any] = {"forced": fast.forced, "constrained": fast.constrained}
    wrong: list[int] = []
    for turn in range(rounds):
        if turn:
            other = witness.inputs((fast.row + turn) % len(witness))
            sampler.sample_fast_tokens(*other, max_tokens=1, **arguments)
        ids = sampler.sample_fast_tokens(*witness.inputs(fast.row), max_tokens=fast.max_tokens, **arguments)[0]
        wrong.append(0 if fast.matches(ids) else max(len(ids), len(fast.ids)) - fast.agreement(ids))
    return Row(witness.describe(fast.row), float(wrong[0]), float(max(wrong)), 0.0)


def proving_environment(setting: Setting) -> dict[str, str]:
    """What an engine is recorded by in the bundle that it proved."""
    return {"ki-edge": own_version(), **setting.environment}


def environment_of(bundle: Bundle, setting: Setting, record: bool | None = None) -> dict[str, str]:
    """Everything that a verdict holds for: witness, weights and graphs, what computes them, and this version."""
    manifest = bundle.manifest
    names = (str(manifest.weights["file"]), *(bundle.graph(name).name for name in sorted(manifest.graphs)))
    model = hashlib.sha256("".join(str(manifest.files[name].get("sha256")) for name in names).encode()).hexdigest()
    return {
        "witness": str(manifest.files[WITNESS].get("sha256")),
        "model": model,
        "precision": manifest.precision,
        "ki-edge": own_version(),
        "CUDA graphs": {None: "as the backend does", True: "on", False: "off"}[record],
        **setting.environment,
    }


def proven_by(bundle: Bundle) -> Mapping[str, Any] | None:
    """The environment of the backend that proved a bundle at its export; None if none of this machine's kind did."""
    found = bundle.manifest.parity.get("proven_by")
    return found if isinstance(found, dict) and bundle.manifest.parity.get("verified") is True else None


def without_witness(bundle: Bundle) -> str:
    """Why nothing can be proven."""
    verified = bundle.manifest.parity.get("verified") is True
    why = "exported by an older version" if verified else "exported with --no-verify"
    return f"not proven here: the bundle has no witness ({why})"


def refusal(backend: str, found: Verdict, bundle: Bundle) -> str:
    """Why a backend is not used, with its figures and what to do."""
    return (
        f"backend '{backend}' is refused: it does not compute this model here ({found.figures()}; {found.date}). "
        f"Update its packages or the driver, or take another --backend; ki-parity {bundle.path} --backend {backend} "
        "repeats the proof"
    )


def _step_by_step(sampler: Sampler, witness: Witness, row: int) -> F32:
    return np.asarray(sampler.trace(*witness.inputs(row), **witness.more(row)).x[-1][0])


def _row(witness: Witness, row: int, eager: F32, runs: Sequence[F32], again: Sequence[F32]) -> Row:
    expected, ran = witness.actions[row], [eager, *again, *runs]
    errors = [_error(each, expected) for each in ran]
    return Row(
        what=witness.describe(row),
        eager=max(errors[: 1 + len(again)]),
        recorded=max(errors[1 + len(again) :], default=None),
        allowed=float(witness.max_abs[row]),
        cosine=max(_cosine_distance(each, expected) for each in ran),
        cosine_allowed=witness.cosine_distance,
        apart=max((_error(each, eager) for each in ran[1:]), default=None),
        apart_allowed=witness.apart,
    )


def _error(given: F32, expected: F32) -> float:
    """Largest difference; infinite for what is not finite."""
    if not np.isfinite(given).all():
        return float(np.inf)
    return float(np.abs(given.astype(np.float64) - expected).max(initial=0.0))


def _cosine_distance(given: F32, expected: F32) -> float:
    ours, theirs = given.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    lengths = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    if not np.isfinite(ours).all():
        return float(np.inf)
    if lengths == 0:
        return 0.0 if not ours.any() and not theirs.any() else 1.0
    return max(0.0, 1.0 - float(ours @ theirs) / lengths)


def own_version() -> str:
    """Of ki-edge, as it is installed."""
    try:
        return version("ki-edge")
    except PackageNotFoundError:
        return "unknown"
