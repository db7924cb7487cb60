"""The project's pages taken apart: their commands, Python blocks, code spans, links and headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), ROOT / "examples" / "fetch" / "README.md"]
)
PROGRAM = re.compile(
    r"(\$ )?(?P<command>(ki-[a-z]+|python3?|make|pip|pytest|\S*/python|\.ci/run|sudo|docker|rsync|scp|hf|git) .*)"
)
COMMENT = re.compile(r"\s{2,}#.*|\s{3,}[^-\s].*")
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Command:
    """`whole`: it stands in a block, so it can be run; else it is a part of a sentence."""

    page: str
    text: str
    whole: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


@dataclass(frozen=True)
class Block:
    """Lines of a fenced or indented block; `language` of a fenced one, else ""."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, in order. An indented block is one of four spaces after an empty line."""
    name, language, found = page.relative_to(ROOT).as_posix(), None, []
    before = ""
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], start=1):
        if line.startswith("```"):
            if language is None:
                language, found = line[3:].strip(), []
            else:
                yield Block(name, number - len(found), language, tuple(found))
                language, found = None, []
        elif language is not None:
            found.append(line)
        elif line.startswith("    ") and (found or not before.strip()):
            found.append(line[4:])
        elif found and line.strip():
            yield Block(name, number - len(found), "", tuple(found))
            found = []
        before = line
    if found:
        yield Block(name, number - len(found), "", tuple(found))


def commands() -> list[Command]:
    """Every command of the pages. A line of a block that begins with a flag goes on with the command above it."""
    found: list[Command] = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page):
            if block.language in ("", "console", "sh"):
                found += [Command(name, text, True) for text in _commands_of(block)]
        for text in SPAN.findall(prose(page)):
            if PROGRAM.fullmatch(text):
                found.append(Command(name, text, False))
    return found


def _commands_of(block: Block) -> list[str]:
    found: list[str] = []
    for line in block.lines:
        text = COMMENT.sub("", line.strip())
        if block.language == "console" and not line.startswith("$ "):
            continue
        match = PROGRAM.fullmatch(text)
        if match is not None:
            found += [part.strip() for part in match["command"].split("&&")]
        elif found and text.startswith("-"):
            found[-1] += f" {text}"
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    text, drop = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            drop = not drop
        elif not drop and not line.startswith("    "):
            text.append(line)
    return "\n".join(text)


def anchors(page: Path) -> set[str]:
    """What links to headings of this page may name, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-") for title in titles}
