"""Words and numbers of a sample as the model's tokens: the prompt, and the postfix that is learnt behind it."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError, DatasetError, PromptError
from ki_edge.policy.fast import FastCodec, FastIds
from ki_edge.policy.prompt import Int32, PromptFormat, PromptTokenizer

LOC = re.compile(r"<loc(\d{4})>")
MAX_ANSWER = 4096  # characters
NOTHING: Int32 = np.zeros(0, np.int32)
NOTHING.setflags(write=False)


@dataclass(frozen=True, eq=False)
class TokenEncoder:
    """One model's tokens. It goes to the workers of a DataLoader as it is: they open the tokenizer themselves.

    `max_prompt`, `max_postfix`: tokens of a prompt and of a postfix, FAST's or an answer's. `padded_state`: numbers to
    which a prompt's state is padded with zeros, where the policy's makers did so; 0: it is not.
    """

    tokenizer_model: bytes
    prompt_format: PromptFormat
    max_prompt: int
    codec: FastCodec
    ids: FastIds
    max_postfix: int
    padded_state: int = 0

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer, opened in this process."""
        return PromptTokenizer(self.tokenizer_model, self.prompt_format, self.max_prompt)

    @cached_property
    def locs(self) -> tuple[int, ...]:
        """The places, of PaliGemma's 0 to 1023, that the vocabulary has a `<loc>` token for, ascending."""
        names = self.tokenizer.pieces().values()
        return tuple(sorted(int(found[1]) for name in names if (found := LOC.fullmatch(name))))

    def encode_actions(self, task: str, state: npt.ArrayLike, chunk: npt.ArrayLike) -> tuple[Int32, Int32]:
        """The prompt i32 [T] and the FAST postfix i32 [F] of a frame, unpadded.

        `state` [s] and `chunk` [H,a] are normalised and have the robot's own numbers. An instruction that is too long
        loses its last words: what follows it, the state, stays. A chunk whose postfix is too long, or that the codec
        cannot spell, gives an empty postfix: there is no FAST loss of it. `measure` tells them.
        DatasetError if even one word is too long beside the state.
        """
        return self._prompt(task, state), self._postfix(self._spell(chunk))

    def encode_text(self, question: str, answer: str) -> tuple[Int32, Int32]:
        """The prompt i32 [T] of a question, in PaliGemma's form, and its answer i32 [F], which eos ends.

        DatasetError if either is empty or too long.
        """
        try:
            prompt = self.tokenizer.encode_question(question)
        except PromptError as error:
            raise DatasetError(f"question {question!r:.80}: {error}") from None
        if not answer.strip() or len(answer) > MAX_ANSWER:
            raise DatasetError(
                f"answer {answer!r:.80} of {len(answer)} characters: expected 1 to {MAX_ANSWER}, not all of them blanks"
            )
        ids = np.array([*self._words(self.spelled(answer)), self.tokenizer.eos_id], np.int32)
        if len(ids) > self.max_postfix:
            raise DatasetError(
                f"answer {answer!r:.80} has {len(ids)} tokens with its end, at most {self.max_postfix} are learnt: "
                "shorten it"
            )
        return prompt, ids

    def spelled(self, answer: str) -> str:
        """An answer with the places that the vocabulary has: each `<loc>` becomes the nearest one at or before it."""
        if not LOC.search(answer):
            return answer
        if not self.locs:
            raise DatasetError(f"answer {answer!r:.80}: the tokenizer has no <loc> tokens, so it cannot point")

        def nearest(found: re.Match[str]) -> str:
            place = int(found[1])
            if place > 1023:
                raise DatasetError(f"answer {answer!r:.80}: {found[0]} is none of <loc0000> to <loc1023>")
            return f"<loc{self.locs[max(0, bisect_right(self.locs, place) - 1)]:04d}>"

        return LOC.sub(nearest, answer)

    def measure(self, task: str, state: npt.ArrayLike, chunk: npt.ArrayLike) -> tuple[int, int]:
        """Tokens that a frame's prompt and postfix need, whatever is allowed; -1 for a chunk that cannot be spelled."""
        spelled = self._spell(chunk)
        prompt = 1 + len(self._words(self.tokenizer.text(task, self._state(state))))
        return prompt, -1 if spelled is None else len(self.ids.postfix(spelled, self.tokenizer))

    def spells(self, chunk: npt.ArrayLike) -> bool:
        """Whether a normalised chunk [H,a] has a postfix, which its FAST loss is of."""
        return len(self._postfix(self._spell(chunk))) > 0

    def reconstruct(self, chunk: npt.ArrayLike) -> npt.NDArray[np.float64] | None:
        """What a normalised chunk [H,a] becomes in FAST tokens and back, f64 [H,a]; None if it cannot be spelled."""
        spelled = self._spell(chunk)
        return None if spelled is None else self.codec.decode(spelled, *np.shape(chunk)).actions

    def decode_actions(self, postfix: npt.ArrayLike, horizon: int, action_dim: int) -> npt.NDArray[np.float64] | None:
        """Normalised actions f64 [H,a] of a postfix's ids, with or without "Action: "; None if they spell none."""
        parsed = self.ids.parse(np.asarray(postfix), self.tokenizer)
        return self.codec.decode(parsed.fast_ids, horizon, action_dim).actions if parsed.terminated else None

    def _prompt(self, task: str, state: npt.ArrayLike) -> Int32:
        padded = self._state(state)
        try:
            return self.tokenizer.encode(task, padded)
        except PromptError:
            words = task.split()
        for count in range(len(words) - 1, 0, -1):
            try:
                return self.tokenizer.encode(" ".join(words[:count]), padded)
            except PromptError:
                continue
        try:
            return self.tokenizer.encode(task, padded)
        except PromptError as error:
            raise DatasetError(f"task {task!r:.80}: {error}") from None

    def _postfix(self, spelled: list[int] | None) -> Int32:
        if spelled is None:
            return NOTHING
        ids = self.ids.postfix(spelled, self.tokenizer)
        return ids if len(ids) <= self.max_postfix else NOTHING

    def _spell(self, chunk: npt.ArrayLike) -> list[int] | None:
        """FAST ids; None if the codec has no symbols for these actions."""
        try:
            return self.codec.encode(chunk)
        except ArgumentError:
            if not np.isfinite(np.asarray(chunk, np.float64)).all():
                raise
            return None

    def _state(self, state: npt.ArrayLike) -> npt.NDArray[np.float64]:
        given = np.asarray(state, np.float64)
        return np.pad(given, (0, max(0, self.padded_state - len(given))))

    def _words(self, text: str) -> list[int]:
        return self.tokenizer.encode_alone(text)

    def __getstate__(self) -> dict[str, Any]:
        opened = ("tokenizer", "locs")
        return {name: value for name, value in vars(self).items() if name not in opened}
