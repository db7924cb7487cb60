"""Which tokens the FAST head's graph has logits for."""

from __future__ import annotations

from ki_edge.bundle import DecodeVocabulary
from ki_edge.config import Pi05Config

from .files import PolicyFiles


def decode_vocabulary(config: Pi05Config, files: PolicyFiles | None, *, full: bool) -> DecodeVocabulary:
    """Columns of the FAST logits: the FAST ids, "|" and eos; all tokens if `full` or if no contract tells them."""
    fast = files.contract.fast if files is not None else None
    if full or files is None or fast is None:
        return DecodeVocabulary(0, config.vocab_size)
    first = fast.id_offset - fast.size + 1
    extra = dict.fromkeys((*files.tokenizer.end_ids, files.tokenizer.eos_id))
    outside = tuple(token for token in extra if not first <= token <= fast.id_offset)
    return DecodeVocabulary(first, fast.size, outside)
