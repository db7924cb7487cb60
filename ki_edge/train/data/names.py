"""Names of datasets: what a user called a folder, fit for other folders and for logs."""

from __future__ import annotations

import unicodedata

MOST_BYTES = 80  # of a folder's name made of another's, in UTF-8
MOST_OF_A_FOLDER = 200  # bytes that any name may have; file systems end at 255
ENDS = ".-_"


def same(name: str) -> str:
    """The one spelling (NFC) of a text that can be spelt in several ways."""
    return unicodedata.normalize("NFC", name)


def plain(text: str) -> str:
    """Letters of any alphabet with their marks, digits and "._-"; everything else is "-". Never empty."""
    found = "".join(char if _kept(char) else "-" for char in same(text) if unicodedata.category(char) != "Cf")
    return found.strip(ENDS).encode()[:MOST_BYTES].decode(errors="ignore").rstrip(ENDS) or "dataset"


def is_plain(name: str) -> bool:
    """Whether a name is one that `plain` could have given, but for its length."""
    fits = bool(name) and name[0] not in ENDS and all(map(_kept, name)) and same(name) == name
    return fits and len(name.encode()) <= MOST_OF_A_FOLDER


def _kept(char: str) -> bool:
    return char in ENDS or unicodedata.category(char)[0] in "LMN"
