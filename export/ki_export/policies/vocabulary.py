"""Which tokens the FAST head's graph has logits for."""

from __future__ import annotations

from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config

from .files import PolicyFiles


def has_fast_head(config: Pi05Config, files: PolicyFiles | None) -> bool:
    """Whether a checkpoint has a FAST head: as its contract says; of a model alone, every π0.5 may and no π0 does."""
    return not config.has_state if files is None else files.contract.fast is not None


def decode_vocabulary(
    config: Pi05Config, files: PolicyFiles | None, *, full: bool, fast_head: bool = True
) -> DecodeVocabulary:
    """Columns of the FAST logits: the FAST ids, "|" and eos; all tokens if `full` or if no contract tells them.

    Empty without `fast_head`: then fast_decode is not exported.
    """
    fast = files.contract.fast if files is not None else None
    if not fast_head:
        return DecodeVocabulary(0, 0)
    if full or files is None or fast is None:
        return DecodeVocabulary(0, config.vocab_size)
    first = fast.id_offset - fast.size + 1
    extra = dict.fromkeys((*files.tokenizer.end_ids, files.tokenizer.eos_id))
    outside = tuple(token for token in extra if not first <= token <= fast.id_offset)
    return DecodeVocabulary(first, fast.size, outside)
