"""What a policy may answer in words: which ids are text, and the points that `<loc>` tokens mean.

PaliGemma's vocabulary holds more than text: the codes of FAST, `<loc0000>` to `<loc1023>` for places in a picture,
`<seg...>`, `<unused...>` and control tokens. A policy that was trained to act gives codes of actions a chance wherever
it writes, so that they are left out. A point is two `<loc>` tokens, y before x, each a share of the picture's side in
1024ths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ki_edge.errors import ArgumentError

from .contract import PolicyContract
from .prompt import PromptTokenizer

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
LOC_SIDE = 1024
_LOC = re.compile(r"<loc(\d{4})>")
_NO_TEXT = re.compile(r"<(pad|bos|eos|unk|mask|s|/s|image|2mass|seg\d+|unused\d+|start_of_turn|end_of_turn)>|\[@BOS@\]")


@dataclass(frozen=True, eq=False)
class Answers:
    """The ids of one policy.

    text   i64 [n], ids that may stand in a text, ascending; the end of text is not among them
    locs   i64 [m], those of the `<loc>` tokens, ascending
    places f64 [m], what each of them means: the middle of its share of a side, from 0 to 1
    """

    text: Int64
    locs: Int64
    places: Float64
    eos_id: int

    @classmethod
    def of(cls, contract: PolicyContract, tokenizer: PromptTokenizer) -> Answers:
        """From a policy's tokenizer, without the codes of its FAST head."""
        pieces = tokenizer.pieces()
        locs = {i: int(found[1]) for i, name in pieces.items() if (found := _LOC.fullmatch(name))}
        kept = [i for i, name in pieces.items() if i not in locs and not _NO_TEXT.fullmatch(name)]
        ids = np.array(sorted(kept), np.int64)
        if contract.fast is not None:
            offset, size = contract.fast.id_offset, contract.fast.size
            ids = ids[(ids > offset) | (ids <= offset - size)]
        never = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        known = np.array(sorted(locs), np.int64)
        width = LOC_SIDE / max(1, len(locs))  # a small vocabulary has every 16th of them
        places = np.array([(locs[int(i)] + width / 2) / LOC_SIDE for i in known], np.float64)
        return cls(ids[~np.isin(ids, never)], known, places, tokenizer.eos_id)

    def allowed(self, *, locs: bool) -> Int64:
        """The ids that may be sampled, the end of text among them; ArgumentError for `locs` where there are none."""
        if locs and not len(self.locs):
            raise ArgumentError("allow_loc: this policy's tokenizer has no <loc> tokens, so it cannot point")
        more = self.locs if locs else self.locs[:0]
        return np.asarray(np.unique(np.concatenate([self.text, more, [self.eos_id]])), np.int64)

    def ended(self, tokens: Sequence[int] | Int64) -> tuple[Int64, bool]:
        """The ids before the end of text, and whether it came."""
        ids = np.asarray(tokens, np.int64)
        ends = np.flatnonzero(ids == self.eos_id)
        return (ids[: ends[0]], True) if ends.size else (ids, False)

    def points(self, tokens: Sequence[int] | Int64) -> Float64:
        """Points f64 [k, 2], (x, y) as fractions of the model's picture, of the `<loc>` pairs among ids."""
        ids = np.asarray(tokens, np.int64)
        found = ids[np.isin(ids, self.locs)]
        values = self.places[np.searchsorted(self.locs, found[: found.size // 2 * 2])] if found.size else np.zeros(0)
        return values.reshape(-1, 2)[:, ::-1].copy()

    def words(self, tokens: Sequence[int] | Int64, tokenizer: PromptTokenizer) -> str:
        """The text of ids, without the `<loc>` tokens among them."""
        ids = np.asarray(tokens, np.int64)
        return tokenizer.decode(ids[~np.isin(ids, self.locs)]).strip()
