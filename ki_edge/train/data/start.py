"""What a run starts from, before its data are read: a geometry and new weights, or a checkpoint and what it records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ki_edge.checkpoints import Checkpoint
from ki_edge.config import Pi05Config
from ki_edge.errors import ArgumentError, CheckpointError
from ki_edge.policy.contract import FastContract
from ki_edge.policy.fast import FastCodec
from ki_edge.policy.prompt import PromptFormat, PromptTokenizer
from ki_export.policies import PolicyDescription, PolicyRequest, describe_policy
from ki_export.policies.tokenizers import GET_IT, find_tokenizer
from ki_export.source.opening import CheckpointRef, Say, open_checkpoint

from .vocabulary import PALIGEMMA_IDS

PI05_PROMPT, FAST_POSTFIX = 200, 256  # tokens, as openpi trains
OPENPI_SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
# fields of a contract that say how a model was trained, whatever robot it drove
OF_MODEL = (
    "resize", "normalization", "action_normalization", "normalization_epsilon", "pad_state_first", "prompt_state_dim",
    "time_convention", "num_steps",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Start:
    """`tokenizer`: a tokenizer's file; None: a small one is fitted on the data's words.

    `prompt_format`, `max_prompt`: None: as long as the data need. `slots`: the model's cameras, in order, where it has
    names for them. `fields`: OF_MODEL. `fast`, `codec`: its FAST head. `checkpoint`: the weights; None: random ones.
    """

    config: Pi05Config
    tokenizer: bytes | None = None
    prompt_format: PromptFormat = "ki"
    max_prompt: int | None = None
    slots: tuple[str, ...] | None = None
    fields: Mapping[str, Any] | None = None
    fast: FastContract | None = None
    codec: FastCodec | None = None
    checkpoint: Checkpoint | None = None

    @classmethod
    def from_nothing(cls, config: Pi05Config, tokenizer: str | Path | None = None) -> Start:
        """Random weights of a geometry. `tokenizer`: of a model with PaliGemma's vocabulary (file, or its folder).

        ArgumentError without one where the geometry has that vocabulary, and for a file that is none.
        """
        given = None if tokenizer is None else find_tokenizer(Path(), Path(tokenizer), ())
        if given is None:
            if config.vocab_size == PALIGEMMA_IDS:
                raise ArgumentError(f"a vocabulary of {PALIGEMMA_IDS} ids needs --tokenizer; {GET_IT}")
            return cls(config)
        size = PromptTokenizer(given.content, "ki", PI05_PROMPT).vocab_size
        if config.vocab_size == PALIGEMMA_IDS and size > config.vocab_size:
            raise ArgumentError(f"--tokenizer {tokenizer}: {size} ids, the model has {config.vocab_size}")
        return cls(config, given.content, max_prompt=PI05_PROMPT)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        *,
        tokenizer: str | Path | None = None,
        contract: str | None = None,
        lerobot_version: str | None = None,
        base: str | None = None,
        say: Say = lambda line: None,
    ) -> Start:
        """A checkpoint that ki-export reads, a folder, a Hub id or an adapter: only headers, JSON and assets are read.

        `base`: checkpoint under an adapter, instead of the one that it names. `contract`: a preset's name or a file,
        where the checkpoint records no more than its weights; without one such a model is taken for what openpi trains:
        PI05_PROMPT tokens of "pi05", quantiles. CheckpointError, ContractError,
        ArgumentError: what is wrong, or that it has no tokenizer.
        """
        checkpoint = open_checkpoint(CheckpointRef(str(folder), base=base), say, default_horizon=1)
        if checkpoint.config.has_state:
            raise CheckpointError(f"--init {folder} holds a π0, whose state is a token of its own: give a π0.5")
        request = PolicyRequest(
            contract=contract,
            tokenizer=None if tokenizer is None else Path(tokenizer),
            lerobot_version=lerobot_version,
        )
        path, config = checkpoint.path, checkpoint.config
        found = describe_policy(path, checkpoint.format, checkpoint.settings, config, request)
        if found.tokenizer is None:
            raise CheckpointError(f"--init {folder} has no tokenizer: give --tokenizer; {GET_IT}")
        return _described(checkpoint, found)

    @property
    def small_vocabulary(self) -> bool:
        """Whether the vocabulary is fitted on the data."""
        return self.tokenizer is None

    @property
    def lerobot(self) -> bool:
        """Whether the weights are LeRobot's, which sees its pictures as numbers."""
        return self.config.pictures == "float32"


def _described(checkpoint: Checkpoint, found: PolicyDescription) -> Start:
    values = found.values if found.contract is None else found.contract.to_json()
    lerobot = checkpoint.format == "lerobot"
    fields: dict[str, Any] = {"resize": "torch_pad", "normalization_epsilon": "lerobot"} if lerobot else {}
    fields["time_convention"] = checkpoint.time_convention
    fields |= {name: values[name] for name in OF_MODEL if values.get(name) is not None}
    if fields.get("resize") == "torch_pad_04":  # its margin of -3 is none that a byte can be; new data need no such
        fields["resize"] = "torch_pad"
    cameras = values.get("cameras")
    slots = OPENPI_SLOTS if not lerobot else None
    if cameras:
        slots = tuple(camera["slot"] if isinstance(camera, dict) else camera.slot for camera in cameras)
    assert found.tokenizer is not None
    contract = found.contract
    return Start(
        replace(checkpoint.config, rtc="none"),
        found.tokenizer.content,
        values.get("prompt_format", "pi05"),
        values.get("max_token_len", PI05_PROMPT),
        slots,
        fields,
        None if contract is None else contract.fast,
        None if found.codec is None else FastCodec.load(found.codec),
        checkpoint,
    )
