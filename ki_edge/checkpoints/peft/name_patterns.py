r"""Regular expressions of module names, as PEFT's rank_pattern and alpha_pattern have them, matched in bounded time.

Python's `re` tries one way after the other: on a name of 40 letters (a+)+$ takes longer than a lifetime. Here all ways
are followed at once, so a name takes at most its length times the pattern's size. Understood is what such patterns use:

    letters   \.   .   [a-z0-9_]   [^x]   \d \w \s   ( ) (?: )   |   * + ? {2,5} and their lazy forms   ^ $
"""

from __future__ import annotations

import string
from collections.abc import Callable

MAX_LENGTH = 1000  # characters of a pattern
MAX_STATES = 2000  # of one pattern, its counted repetitions written out
MAX_NESTING = 40  # of parentheses
MAX_REPEAT = 100
CLASSES = {
    "d": frozenset(string.digits),
    "w": frozenset(string.ascii_letters + string.digits + "_"),
    "s": frozenset(string.whitespace),
}
States = frozenset[int]
Emit = Callable[[int], int]  # adds a part of the pattern after a state, and gives the state behind it


class PatternError(ValueError):
    """What is wrong with a pattern, or not understood."""


class NamePattern:
    """One pattern. PatternError for what is no regular expression, too large, or beyond the table above."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise PatternError(f"longer than {MAX_LENGTH} characters")
        self._tests: list[tuple[str, frozenset[str], bool]] = []  # kind, characters, all but them
        self._next: list[list[int]] = []
        self._text, self._at = text, 0
        first = self._state()
        last = self._alternatives(0)(first)
        if self._at < len(text):
            raise PatternError(f"an unmatched ')' at character {self._at + 1}")
        self._first, self._last = first, last
        self._known: dict[tuple[States, str], States] = {}

    @property
    def states(self) -> int:
        """How large it is."""
        return len(self._tests)

    def ends(self, name: str) -> bool:
        """Whether it matches the whole name, or the end of it after a dot: `(.*\\.)?(pattern)$` of `re.match`."""
        active: States = frozenset()
        for at, char in enumerate(name):
            if at == 0 or name[at - 1] == ".":
                active |= self._closure({self._first}, start=at == 0, end=False)
            active = self._step(active, char)
        if name == "" or name[-1] == ".":
            active |= self._closure({self._first}, start=name == "", end=True)
        return self._last in self._closure(set(active), start=name == "", end=True)

    def _step(self, active: States, char: str) -> States:
        """The states after one more character; kept, since names have most of their beginnings in common."""
        found = self._known.get((active, char))
        if found is None:
            taken = {
                after
                for state in active
                if self._tests[state][0] == "char" and (char in self._tests[state][1]) is not self._tests[state][2]
                for after in self._next[state]
            }
            found = self._known[active, char] = self._closure(taken, start=False, end=False)
        return found

    def _closure(self, states: set[int], *, start: bool, end: bool) -> States:
        """Everything that is reached from these states without a character."""
        passed = {"pass": True, "start": start, "end": end, "char": False}
        found, pending = set(states), list(states)
        while pending:
            state = pending.pop()
            if passed[self._tests[state][0]]:
                fresh = [after for after in self._next[state] if after not in found]
                found.update(fresh)
                pending.extend(fresh)
        return frozenset(found)

    # ---------------------------------------------------------------------- reading the pattern

    def _state(self, kind: str = "pass", chars: frozenset[str] = frozenset(), other: bool = False) -> int:
        if len(self._tests) >= MAX_STATES:
            raise PatternError(f"larger than {MAX_STATES} states")
        self._tests.append((kind, chars, other))
        self._next.append([])
        return len(self._tests) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def _alternatives(self, nesting: int) -> Emit:
        if nesting > MAX_NESTING:
            raise PatternError(f"more than {MAX_NESTING} parentheses in each other")
        branches = [self._sequence(nesting)]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence(nesting))
        return branches[0] if len(branches) == 1 else lambda entry: self._join(entry, branches)

    def _join(self, entry: int, branches: list[Emit]) -> int:
        exits = []
        for branch in branches:
            begin = self._state()
            self._next[entry].append(begin)
            exits.append(branch(begin))
        last = self._state()
        for leave in exits:
            self._next[leave].append(last)
        return last

    def _sequence(self, nesting: int) -> Emit:
        parts: list[Emit] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom(nesting)))

        def emit(entry: int) -> int:
            for part in parts:
                entry = part(entry)
            return entry

        return emit

    def _repeated(self, atom: Emit) -> Emit:
        least, most = self._counts()
        if (least, most) == (1, 1):
            return atom
        if self._counts() != (1, 1):
            raise PatternError(f"a repetition of a repetition at character {self._at}")

        def emit(entry: int) -> int:
            for _ in range(least):
                entry = atom(entry)
            if most is None:
                loop, last = self._state(), self._state()
                self._next[entry].append(loop)
                self._next[atom(loop)].append(loop)
                self._next[loop].append(last)
                return last
            last = self._state()
            for _ in range(most - least):
                begin = self._state()
                self._next[entry] += [begin, last]
                entry = atom(begin)
            self._next[entry].append(last)
            return last

        return emit

    def _counts(self) -> tuple[int, int | None]:
        """(least, most) of a quantifier at this place, None for any number; (1, 1) if there is none."""
        char = self._peek()
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if char in simple and char:
            self._at += 1
            found = simple[char]
        elif char == "{":
            found = self._braces()
        else:
            return 1, 1
        if self._peek() == "?":  # lazy: whether there is a match does not depend on it
            self._at += 1
        return found

    def _braces(self) -> tuple[int, int | None]:
        end = self._text.find("}", self._at)
        least, comma, most = self._text[self._at + 1 : max(end, 0)].partition(",")
        numbers = [number for number in (least, most) if number]
        if end < 0 or not numbers or not all(number.isdecimal() and len(number) < 4 for number in numbers):
            raise PatternError(f"braces that are not a repetition at character {self._at + 1}")
        self._at = end + 1
        low = int(least or 0)
        high = (int(most) if most else None) if comma else low
        if low > MAX_REPEAT or (high is not None and not low <= high <= MAX_REPEAT):
            raise PatternError(f"a repetition of more than {MAX_REPEAT}")
        return low, high

    def _atom(self, nesting: int) -> Emit:
        char = self._take()
        if char == "(":
            if self._peek() == "?":
                if self._text[self._at : self._at + 2] != "?:":
                    raise PatternError(f"'({self._text[self._at : self._at + 2]}' is not understood here")
                self._at += 2
            inside = self._alternatives(nesting + 1)
            if self._take() != ")":
                raise PatternError("a '(' without its ')'")
            return inside
        if char in "*+?{":
            raise PatternError(f"nothing to repeat at character {self._at}")
        if char in "^$":
            return self._one("start" if char == "^" else "end")
        if char == ".":
            return self._one("char", frozenset("\n"), other=True)
        if char == "[":
            return self._class()
        return self._one("char", self._escaped() if char == "\\" else frozenset(char))

    def _one(self, kind: str, chars: frozenset[str] = frozenset(), *, other: bool = False) -> Emit:
        def emit(entry: int) -> int:
            state, last = self._state(kind, chars, other), self._state()
            self._next[entry].append(state)
            self._next[state].append(last)
            return last

        return emit

    def _escaped(self) -> frozenset[str]:
        char = self._take()
        if char in CLASSES:
            return CLASSES[char]
        if not char or char.isalnum():
            raise PatternError(f"'\\{char}' is not understood here")
        return frozenset(char)

    def _class(self) -> Emit:
        other = self._peek() == "^"
        self._at += other
        chars: set[str] = set()
        start = self._at
        while self._peek() != "]" or self._at == start:
            char = self._take()
            if not char:
                raise PatternError("a '[' without its ']'")
            members = self._escaped() if char == "\\" else frozenset(char)
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", "") and len(members) == 1:
                self._at += 1
                members = self._span(next(iter(members)), self._take())
            chars |= members
        self._at += 1
        return self._one("char", frozenset(chars), other=other)

    @staticmethod
    def _span(first: str, last: str) -> frozenset[str]:
        if not ord(first) <= ord(last) < 0x250 or last == "\\":
            raise PatternError(f"'{first}-{last}' is not a range of letters")
        return frozenset(map(chr, range(ord(first), ord(last) + 1)))
