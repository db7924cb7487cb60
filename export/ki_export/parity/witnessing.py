"""What the proof leaves for the robot: a few of its observations with the reference's answers, as witness.npz.

Observations and answers are those of the cases that were compared anyway; added is a twin of the first in shape, and of
a model that is compared in pieces all cameras with a full prompt, whose layers are read once for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ki_edge.bundle import Manifest
from ki_edge.bundle.witness import Continuation, Witness
from ki_edge.errors import ParityError
from ki_edge.model.sampling import denoise_trace
from ki_edge.policy.contract import PolicyContract
from ki_edge.progress import Progress

from .bars import FAST_TIE, FLOAT32, WITNESS, Measurement, measure
from .cases import Array, Case, compact_companions, twin
from .comparison import DIRECTION, RUNTIME, Answer, Comparison, observe
from .diagnosis import summary
from .pair import ParityPair

CAMERAS, TOKENS = 3, 200  # that engines of a bundle without a contract are built for


def call_witness(pair: ParityPair, comparison: Comparison, progress: Progress) -> tuple[Witness, list[Measurement]]:
    """The witness of a bundle that passed, and what its own engine makes of the observations that were added.

    ParityError if that misses a bar.
    """
    manifest = pair.bundle.manifest
    cameras, tokens = limits(manifest)
    suitable = [answer for answer in comparison.answers if _fits(answer.case, cameras, tokens)]
    first = suitable[0]
    config = pair.model.config
    if pair.method == "streamed":
        more = compact_companions(config, first.case, cameras=cameras, max_prompt=tokens)
    else:
        more = twin(config, first.case)
    with progress.stage("the witness", pair.steps(config.vision.depth + config.backbone.depth)):
        actions, found = _answer(pair, more)
    fast = _continuation(manifest, first, bool(pair.model.decode_ids)) if pair.has_fast else None
    answers = [(answer.case, answer.actions) for answer in suitable] + [(more, actions)]
    return _gather(manifest, fast, answers), found


def limits(manifest: Manifest) -> tuple[int, int]:
    """Cameras and prompt tokens that a robot with this bundle may have."""
    if manifest.contract is None:
        return CAMERAS, TOKENS
    contract = PolicyContract.from_json(manifest.contract)
    return max(1, sum(camera.key is not None for camera in contract.cameras)), contract.max_token_len


def _fits(case: Case, cameras: int, tokens: int) -> bool:
    alone = len(case.images) == 1
    return alone and int(case.camera_mask.sum()) <= cameras and int(case.prompt_mask.sum()) <= tokens


@torch.no_grad()
def _answer(pair: ParityPair, case: Case) -> tuple[Array, list[Measurement]]:
    """The reference's actions f32 [B,H,A]; ParityError if the proving engine's are not those."""
    convention = pair.bundle.manifest.sampling["time_convention"]
    noise, steps = torch.from_numpy(case.noise), case.num_steps
    trace = denoise_trace(pair.model, observe(case), noise=noise, num_steps=steps, time_convention=convention)
    expected = trace[-1].numpy()
    given = pair.sampler.sample_actions(*case.inputs, state=case.state, noise=case.noise, num_steps=steps)
    names = [name for name in ("actions", DIRECTION) if name in pair.bars]
    found = [measure(case.name, RUNTIME, name, given, expected, bars=pair.bars) for name in names]
    failed = next((m for m in found if not m.passed), None)
    if failed is not None:
        raise ParityError(f"{summary(failed)}; of the witness, though all cases passed: a bar is too close to rounding")
    return expected, found


def _gather(manifest: Manifest, fast: Continuation | None, answers: Sequence[tuple[Case, Array]]) -> Witness:
    bars = WITNESS[manifest.precision]
    cases = [case for case, _ in answers]
    actions = np.concatenate([found for _, found in answers])
    width = max(case.prompt_tokens.shape[1] for case in cases)
    states = [case.state for case in cases if case.state is not None]
    sizes = [float(np.abs(rows).max(initial=0.0)) for rows in actions]
    return Witness(
        images=np.concatenate([case.images for case in cases]),
        camera_mask=np.concatenate([case.camera_mask for case in cases]),
        prompt_tokens=np.concatenate([_padded(case.prompt_tokens, width) for case in cases]).astype(np.int32),
        prompt_mask=np.concatenate([_padded(case.prompt_mask, width) for case in cases]),
        noise=np.concatenate([case.noise for case in cases]),
        state=np.concatenate(states) if states else None,
        num_steps=cases[0].num_steps,
        actions=actions,
        max_abs=np.array([bars["actions"].at(size) for size in sizes]),
        cosine_distance=bars[DIRECTION].limit if manifest.budget is None else 1.0 - manifest.budget,
        apart=bars["apart"].limit,
        fast=fast,
    )


def _continuation(manifest: Manifest, answer: Answer, constrained: bool) -> Continuation:
    ties = np.array([2 * FLOAT32["logits"].at(float(size)) for size in answer.sizes], np.float32)
    if manifest.precision != "float32":
        ties = np.maximum(ties, np.float32(FAST_TIE) * answer.errors)
    return Continuation(
        row=0,
        forced=answer.case.forced,
        max_tokens=answer.case.max_tokens,
        constrained=constrained,
        ids=answer.ids[0].astype(np.int64),
        margins=answer.margins,
        ties=ties,
    )


def _padded(rows: Array, width: int) -> npt.NDArray[np.generic]:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))
