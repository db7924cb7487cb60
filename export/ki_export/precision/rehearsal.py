"""A policy's graphs run over observations before there is a bundle; weights are read from the checkpoint in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from ki_edge import flow, graphs
from ki_edge.checkpoints import Checkpoint
from ki_edge.overlap import nothing_before
from ki_export.arithmetic.evaluator import Evaluator, Replacement, Shelf, Watch
from ki_export.arithmetic.readers import CheckpointWeights
from ki_export.weights.weights import TensorSlice

from .calibration import Observed

STEPS = 10
PADDING = 2  # masked tokens behind a prompt; all are the same token, so a few stand for any number
DECODED = 8  # tokens that the FAST graph is fed
Prefixes = list[dict[str, Tensor]]


class Rehearsal:
    """Traced graphs by name, in float32 or lowered. `budget`: bytes of weights that stay in memory over the steps.

    `exponents`: weights by site that are divided by 2^k; `replaced`: what some products of the graphs are instead.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        models: Mapping[str, ir.Model],
        origins: Mapping[str, Mapping[str, TensorSlice]],
        budget: int,
        exponents: Mapping[str, int] | None = None,
        replaced: Mapping[ir.Node, Replacement] | None = None,
    ) -> None:
        self._checkpoint, self._models, self._origins = checkpoint, models, origins
        self._budget, self._exponents, self._replaced = budget, exponents, replaced

    def prefix(self, observations: Sequence[Observed], watch: Watch | None = None) -> Prefixes:
        """K/V and mask of each observation."""
        return self._evaluator(graphs.PREFIX.name).run([_prefix_feed(o) for o in observations], watch)

    def actions(self, observations: Sequence[Observed], prefixes: Prefixes, watch: Watch | None = None) -> list[Tensor]:
        """Actions f32 [1,H,A] of each observation after STEPS steps."""
        return self.states(observations, prefixes, watch)[-1]

    def states(
        self, observations: Sequence[Observed], prefixes: Prefixes, watch: Watch | None = None
    ) -> list[list[Tensor]]:
        """What the actions are after each of STEPS steps: f32 [1,H,A] of each observation."""
        states = []
        checkpoint, evaluator = self._checkpoint, self._evaluator(graphs.DENOISE.name)
        times = flow.denoise_times(STEPS, checkpoint.time_convention)
        table = torch.from_numpy(flow.modulation_table(checkpoint.source.array, times, checkpoint.config))
        alone = {name: torch.from_numpy(zeros) for name, zeros in nothing_before(checkpoint.config, 1).items()}
        feeds = [
            {
                **prefix,
                "x_t": torch.from_numpy(o.noise),
                "dt": torch.tensor(flow.step_size(STEPS)),
                **({} if o.state is None else {"state": torch.from_numpy(o.state)}),
                **alone,
            }
            for prefix, o in zip(prefixes, observations, strict=True)
        ]
        for row in table:
            found = evaluator.run([{**feed, "modulation": row} for feed in feeds], watch)
            for feed, made in zip(feeds, found, strict=True):
                feed["x_t"] = made["x_next"]
            states.append([feed["x_t"] for feed in feeds])
        return states

    def decode(
        self,
        observations: Sequence[Observed],
        prefixes: Prefixes,
        ids: npt.NDArray[np.int64],
        watch: Watch | None = None,
    ) -> list[dict[str, Tensor]]:
        """One run of the FAST graph for each observation: its last prompt token and random ones of `ids`."""
        feeds = [
            _decode_feed(at, o, prefix, ids) for at, (o, prefix) in enumerate(zip(observations, prefixes, strict=True))
        ]
        return self._evaluator(graphs.FAST_DECODE.name).run(feeds, watch)

    def _evaluator(self, name: str) -> Evaluator:
        reader = CheckpointWeights(self._checkpoint.source, self._origins[name], self._exponents)
        loops = name == graphs.DENOISE.name  # all others run once, so keeping their weights gains nothing
        weights = Shelf(reader, self._budget) if loops else reader
        return Evaluator(self._models[name].graph, weights, replaced=self._replaced)


def _prefix_feed(observed: Observed) -> dict[str, Tensor]:
    """With padding behind the prompt, as an engine gets it: what overflows there would reach every row as 0 * NaN."""
    tokens = np.pad(observed.prompt_tokens, ((0, 0), (0, PADDING)))
    mask = np.arange(tokens.shape[1])[None] < observed.prompt_tokens.shape[1]
    return {
        "images": torch.from_numpy(observed.images),
        "camera_mask": torch.ones(observed.images.shape[:2], dtype=torch.bool),
        "prompt_tokens": torch.from_numpy(tokens),
        "prompt_mask": torch.from_numpy(mask),
    }


def _decode_feed(
    at: int, observed: Observed, prefix: Mapping[str, Tensor], ids: npt.NDArray[np.int64]
) -> dict[str, Tensor]:
    """Over the prefix's K/V, as the runtime decodes: the last prompt token is fed again and its place masked."""
    drawn = np.random.default_rng(at).choice(ids, (1, DECODED - 1))
    new = np.concatenate([observed.prompt_tokens[:, -1:], drawn], axis=1)
    mask = prefix["prefix_mask"].clone()
    mask[:, -1 - PADDING] = False
    positions = int(prefix["prefix_mask"].sum()) - 1 + np.arange(DECODED)
    return {
        "tokens": torch.from_numpy(new.astype(np.int32)),
        "positions": torch.from_numpy(positions.astype(np.int32)[None]),
        "cache_k": prefix["prefix_k"],
        "cache_v": prefix["prefix_v"],
        "cache_mask": mask,
    }
