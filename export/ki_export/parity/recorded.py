"""Compare a bundle with recorded outputs of another system: two .npz files, inputs and outputs.

    inputs   image/<camera> u8 [B,h,w,3], image_mask/<camera> bool [B], tokenized_prompt int [B,T] and
             tokenized_prompt_mask bool [B,T] (or prompt_only_tokens, prompt_only_mask), noise f32 [B,H,A], num_steps;
             of a π0 also state f32 [B,A]; of a model that takes pictures as floats they may also be f32 in [-1, 1]
    outputs  any of: actions [B,H,A], x_steps or v_steps [steps,B,H,A] (before each step), times [steps],
             kv_k, kv_v [L,B,K,S,D] over all cameras and the padded prompt, greedy_tokens int [B,n]

Whatever of the outputs is there is compared. A 16-bit bundle is computed in exactly its types, others by ONNX Runtime,
unless a backend is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ki_edge.bundle import Bundle
from ki_edge.errors import DatasetError, KiEdgeError
from ki_edge.flow import denoise_times, step_size
from ki_edge.policy.contract import PolicyContract
from ki_edge.recordings.model_inputs import PROMPTS, read_arrays, recorded_pictures
from ki_export.arithmetic.session import ROUNDED, arithmetic_sampler
from ki_runtime.backends.registry import connect
from ki_runtime.policy.sampler import Sampler

from .bars import Measurement, measure
from .cases import Array, Case
from .comparison import DIRECTION, RUNTIME, Comparison, by_layer
from .diagnosis import summary

KNOWN = ("actions", "x_steps", "v_steps", "times", "kv_k", "kv_v", "greedy_tokens")
CAUSES = {
    "times": "the recording was made under the other time convention",
    "prefix_k": "other weights, other pictures, or cameras in another order",
    "prefix_v": "other weights, other pictures, or cameras in another order",
    "x": "the expert's weights, or the time convention",
    "actions": "the expert's weights, the noise, or the time convention",
    "greedy_ids": "other weights, or a prompt that is not the recorded one",
}


def compare_with_recording(
    bundle: Bundle, outputs: Path, inputs: Path | None = None, *, backend: str | None = None
) -> Comparison:
    """Everything that `outputs` holds; `inputs` defaults to inputs.npz beside it. DatasetError if a file is unfit.

    `backend`: what computes the bundle, proven or not.
    """
    recorded = read_arrays(outputs)
    if not set(KNOWN) & set(recorded):
        raise DatasetError(f"{outputs}: none of {', '.join(KNOWN)} in it, only {', '.join(sorted(recorded)[:8])}")
    given = read_arrays(inputs or outputs.with_name("inputs.npz"), "" if inputs else "; or name them with --inputs")
    exact = bundle.manifest.precision in ROUNDED and backend is None
    sampler = arithmetic_sampler(bundle) if exact else _sampler(bundle, backend or "ort")
    try:
        return _compared(bundle, sampler, outputs, recorded, given)
    except (KiEdgeError, MemoryError):
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        why = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{outputs}: its arrays and those of the inputs fit neither each other nor the bundle ({why})"
        ) from error


def _compared(
    bundle: Bundle, sampler: Sampler, outputs: Path, recorded: Mapping[str, Array], given: Mapping[str, Array]
) -> Comparison:
    case = read_case(given, bundle, sampler, outputs)
    name = f"recorded outputs {outputs.parent.name}/{outputs.name}"
    result = Comparison(name, bundle.manifest.precision, "recorded", [case.describe()])
    result.measurements += _actions(sampler, case, recorded, result)
    if "greedy_tokens" in recorded and bundle.manifest.has_fast:
        expected = recorded["greedy_tokens"]
        full = bundle.manifest.vocabulary.count == bundle.manifest.config.vocab_size
        ids = sampler.sample_fast_tokens(*case.inputs, max_tokens=expected.shape[1], constrained=not full)
        result.measurements.append(measure(case.name, RUNTIME, "greedy_ids", ids, expected, bars=result.bars))
    if result.failures:
        first = result.failures[0]
        result.explanation = f"{summary(first)}; usual cause: {CAUSES.get(first.tensor, 'other weights')}"
    return result


def _sampler(bundle: Bundle, backend: str) -> Sampler:
    connection = connect(bundle, backend)
    return Sampler(bundle, connection.open, connection.backend)


def read_case(given: Mapping[str, Array], bundle: Bundle, sampler: Sampler, source: Path) -> Case:
    """The recorded observation, its cameras in the contract's order if there is a contract."""
    cameras = [name.removeprefix("image/") for name in given if name.startswith("image/")]
    contract = None if bundle.manifest.contract is None else PolicyContract.from_json(bundle.manifest.contract)
    if contract is not None and {c.slot for c in contract.cameras} == set(cameras):
        cameras = [camera.slot for camera in contract.cameras]
    tokens, mask = next((pair for pair in PROMPTS if set(pair) <= set(given)), PROMPTS[-1])
    wanted = [f"image_mask/{camera}" for camera in cameras] + [tokens, mask]
    if sampler.config.has_state:
        wanted.append("state")
    missing = [name for name in wanted if name not in given] + ([] if cameras else ["image/<camera>"])
    if missing:
        raise DatasetError(f"recorded inputs of {source}: {', '.join(missing)} missing")
    config = sampler.config
    shape = (len(given[tokens]), config.action_horizon, config.action_dim)
    return Case(
        name=source.parent.name,
        images=recorded_pictures(np.stack([given[f"image/{camera}"] for camera in cameras], axis=1), config),
        camera_mask=np.stack([given[f"image_mask/{camera}"] for camera in cameras], axis=1),
        prompt_tokens=given[tokens],
        prompt_mask=given[mask],
        noise=given.get("noise", np.zeros(shape, np.float32)),
        num_steps=int(given.get("num_steps", sampler.num_steps)),
        state=given["state"].astype(np.float32) if config.has_state else None,
    )


def _actions(sampler: Sampler, case: Case, recorded: Mapping[str, Array], result: Comparison) -> Iterator[Measurement]:
    """Times, K/V, every step and the actions, as far as they were recorded."""
    if "times" in recorded:
        convention = sampler.bundle.manifest.sampling["time_convention"]
        yield measure(
            case.name, RUNTIME, "times", denoise_times(case.num_steps, convention), recorded["times"], bars=result.bars
        )
    trace = sampler.trace(*case.inputs, state=case.state, noise=case.noise, num_steps=case.num_steps)
    for name, ours in (("kv_k", trace.prefix_k), ("kv_v", trace.prefix_v)):
        if name in recorded:
            tensor, expected = name.replace("kv", "prefix"), recorded[name][:, :, :, trace.columns]
            yield from by_layer(case.name, RUNTIME, tensor, ours, expected, trace.prefix_mask, result.bars)
    for step, expected in enumerate(_states(case, recorded)):
        yield measure(case.name, RUNTIME, "x", trace.x[step + 1], expected, step, result.bars)
    if "actions" in recorded:
        result.traces = trace.x[-1][0], recorded["actions"][0]
        for name in ("actions", DIRECTION):
            if name in result.bars:
                yield measure(case.name, RUNTIME, name, trace.x[-1], recorded["actions"], bars=result.bars)


def _states(case: Case, recorded: Mapping[str, Array]) -> list[Array]:
    """x after each recorded step but the last, which is `actions`."""
    if "x_steps" in recorded:
        return list(recorded["x_steps"][1:])
    states, dt = [case.noise], step_size(case.num_steps)
    for velocity in recorded.get("v_steps", ())[:-1]:
        states.append(states[-1] + dt * velocity)
    return states[1:]
