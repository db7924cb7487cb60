"""How much a msgpack frame would make of itself, read from its headers alone, before anything is made of it.

A byte of a frame can become a Python object of fifty, a list in a list in a list a stack that overflows: a frame that
fits the largest one can still fill the memory. The bytes of texts and arrays are passed over.
"""

from __future__ import annotations

import struct

MOST_ITEMS = 1 << 15  # values of all lists and maps of a frame together
MOST_DEPTH = 16  # of lists and maps in each other
MOST_TEXT = 1 << 20  # bytes of one text

# First byte -> (format of what tells the length, or None; bytes that follow besides)
_SIZED = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}  # of bytes and texts
_HOLDING = {0xDC: (">H", 1), 0xDD: (">I", 1), 0xDE: (">H", 2), 0xDF: (">I", 2)}  # lists and maps
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip


def check_size(frame: bytes) -> None:
    """ValueError for a frame of too many or too deeply nested values, or one that is cut off or goes on after its end.

    What it says of itself is all that is looked at: msgpack checks the rest.
    """
    place, items = 0, 1
    open_: list[int] = [1]  # values that are still to come, of each list or map that is open
    while open_:
        if open_[-1] == 0:
            open_.pop()
            continue
        open_[-1] -= 1
        place, held = _value(frame, place)
        if held is not None:
            items += held
            if items > MOST_ITEMS:
                raise ValueError(f"more than {MOST_ITEMS} values")
            open_.append(held)
            if len(open_) > MOST_DEPTH + 1:
                raise ValueError(f"more than {MOST_DEPTH} lists and maps in each other")
    if place != len(frame):
        raise ValueError(f"{len(frame) - place} bytes after its end")


def _value(frame: bytes, place: int) -> tuple[int, int | None]:
    """(where the value at `place` ends, how many values a list or a map holds, which follow it; None for others)."""
    if place >= len(frame):
        raise ValueError("it is cut off")
    kind = frame[place]
    place += 1
    held: int | None = None
    if kind < 0x80 or kind >= 0xE0 or kind in _FIXED:
        place += _FIXED.get(kind, 0)
    elif kind < 0xA0:
        held = (kind & 0x0F) * (2 if kind < 0x90 else 1)
    elif kind < 0xC0:
        place += kind & 0x1F
    elif kind in _SIZED:
        length, place = _number(frame, place, _SIZED[kind])
        if kind >= 0xD9 and length > MOST_TEXT:
            raise ValueError(f"a text of {length} bytes")
        place += length
    elif kind in _HOLDING:
        form, each = _HOLDING[kind]
        count, place = _number(frame, place, form)
        held = count * each
    else:
        raise ValueError(f"a value of kind 0x{kind:02x}")
    if place > len(frame):
        raise ValueError("it is cut off")
    return place, held


def _number(frame: bytes, place: int, form: str) -> tuple[int, int]:
    end = place + struct.calcsize(form)
    if end > len(frame):
        raise ValueError("it is cut off")
    found: int = struct.unpack_from(form, frame, place)[0]
    return found, end
