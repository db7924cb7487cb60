"""A question about pictures in, words and points out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ObservationError
from ki_edge.policy.answers import Answers
from ki_edge.policy.contract import PolicyContract
from ki_edge.policy.keys import under_contract_keys
from ki_edge.policy.prompt import PromptTokenizer
from ki_edge.policy.transforms import read_images, read_prompt

from .sampler import Sampler


@dataclass(frozen=True, eq=False)
class Answering:
    """One policy's way to answer. `answers`: the ids that may come."""

    sampler: Sampler
    contract: PolicyContract
    tokenizer: PromptTokenizer
    answers: Answers

    def inputs(self, observation: Mapping[str, Any], prompt: str | None) -> tuple[npt.NDArray[Any], ...]:
        """The four prefix inputs of a question, None: the observation's prompt, as a batch of one."""
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation is a dict, got {type(observation).__name__}")
        given = under_contract_keys(self.contract, observation)
        question = read_prompt(self.contract, given) if prompt is None else prompt
        ids = self.tokenizer.encode_question(question)
        images, camera_mask = read_images(self.contract, given)
        return images[None], camera_mask[None], ids[None], np.ones((1, len(ids)), np.bool_)

    def ask(
        self,
        inputs: tuple[npt.NDArray[Any], ...],
        max_tokens: int,
        temperature: float,
        seed: int | None,
        *,
        locs: bool,
        stop: Callable[[], bool] | None,
    ) -> npt.NDArray[np.int64]:
        """The ids of an answer, i64 [n], the end of text and padding behind it among them."""
        images, camera_mask, question, mask = inputs
        allowed, eos_id = self.answers.allowed(locs=locs), self.answers.eos_id
        found: npt.NDArray[np.int64] = self.sampler.sample_text_tokens(
            images,
            camera_mask,
            question,
            mask,
            allowed=allowed,
            eos_id=eos_id,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            stop=stop,
        )[0]
        return found

    def read(self, tokens: npt.NDArray[np.int64]) -> dict[str, Any]:
        """What ids mean: "text", "tokens", "points", "finished"; see `Policy.infer_text`."""
        kept, finished = self.answers.ended(tokens)
        text, points = self.answers.words(kept, self.tokenizer), self.answers.points(kept)
        return {"text": text, "tokens": kept, "points": points, "finished": finished}
