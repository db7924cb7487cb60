"""What the pages say exists: commands and their flags, scripts, files, links, names of functions, import directions."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ki_edge.commands

from .documents import LINK, PAGES, ROOT, SPAN, Command, anchors, commands, prose
from .test_boundaries import DIRECTIONS

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r'^(ki-\w+) = "([\w.:]+)"$', PROJECT, re.M))  # command -> module:function
EXTRAS = set(
    re.findall(r"^(\w[\w-]*) = \[", PROJECT.split("[project.optional-dependencies]")[1].split("\n\n")[0], re.M)
)
VERSION = re.findall(r'^version = "([\d.]+)"$', PROJECT, re.M)[0]
COMMANDS = commands()
PLACES = (ROOT, ROOT / "export", ROOT / "runtime", ROOT / "tests", ROOT / "docs")
HOME = {"ki_edge": ROOT, "ki_export": ROOT / "export", "ki_runtime": ROOT / "runtime"}
# Names of files that pages speak of and that are no files of this repository.
ELSEWHERE = re.compile(
    r"(build|dist|my_bundle|report)/.*|utils\.py|.*(bench\.png|\.onnx|\.json|\.npz|\.model|\.html|\.jsonl|\.safetensors|\.sha256)$"
)
FILE = re.compile(r"[\w./-]+\.(py|sh|md|png|gif|toml|txt)")
FUNCTION = re.compile(r"`([\w/]+\.py)`: `([\w.]+)`")
DOTTED = re.compile(r"ki_(edge|export|runtime)(\.\w+)+")


class Captured(Exception):
    """Carries a parser out of a command's `main`."""


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser of an installed command."""

    def capture(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> None:
        raise Captured(self)

    module, _, function = SCRIPTS[program].partition(":")
    with pytest.raises(Captured) as caught, ExitStack() as patched:
        for name in ("parse_args", "parse_intermixed_args"):
            patched.enter_context(patch.object(ki_edge.commands.Parser, name, capture))
        getattr(importlib.import_module(module), function)([])
    parser: argparse.ArgumentParser = caught.value.args[0]
    return parser


LEROBOT = ("--policy.path", "--policy.type", "--inference.type", "--rename_map")  # its own, of which pages speak


def ours(whole: bool | None = None) -> Iterator[Command]:
    """The commands that this project installs."""
    return (c for c in COMMANDS if c.words[0].startswith("ki-") and whole in (None, c.whole))


def test_the_pages_were_read() -> None:
    assert len(list(ours(True))) > 30 and len(COMMANDS) > 90
    assert {c.words[0] for c in ours()} == set(SCRIPTS), "every command stands in the pages, and no other"


def test_every_flag_of_a_command_exists() -> None:
    for command in ours():
        known = parser_of(command.words[0])._option_string_actions
        unknown = [word for word in flags(command.words) if word not in known]
        assert not unknown, f"{command.page}: {command.text}: no {', '.join(unknown)}"


def test_flags_in_sentences_exist() -> None:
    """A flag alone in a sentence or a table is one of some command or script."""
    known = {"--help", *(flag for name in SCRIPTS for flag in parser_of(name)._option_string_actions)}
    known |= {flag for script in ROOT.glob("[be]*/**/*.py") for flag in flags_of_script(script)}
    known |= {"--version", "--system-site-packages", "--robot.type", *LEROBOT, *plugin_flags()}
    for page in PAGES:
        for span in SPAN.findall(prose(page)):
            if span.startswith("--"):
                assert flags(shlex.split(span.split(",")[0]))[0] in known, f"{page.name}: `{span}`"


@pytest.mark.parametrize("command", [c for c in ours(True) if "[" not in c.text and "..." not in c.text], ids=str)
def test_a_command_line_is_accepted_by_its_parser(command: Command) -> None:
    words = command.words
    words = words[: words.index(">")] if ">" in words else words
    parser_of(words[0]).parse_intermixed_args(words[1:])


def test_scripts_and_their_flags_exist() -> None:
    for command in COMMANDS:
        match = re.match(r"(?:\S*/)?python3? ([\w/]+\.py)", command.text)
        if match:
            known = flags_of_script(ROOT / match[1])
            assert [f for f in flags(command.words[2:]) if f not in known] == [], f"{command.page}: {command.text}"


def test_tests_that_pages_name_exist() -> None:
    for command in COMMANDS:
        if "pytest" not in command.words:
            continue
        paths = [ROOT / word for word in command.words if word.startswith("tests/")]
        assert all(path.exists() for path in paths), f"{command.page}: {command.text}"
        if "-k" in command.words:
            text = "\n".join(path.read_text(encoding="utf-8") for path in paths).lower()
            for word in command.words[command.words.index("-k") + 1].split(" or "):
                assert word in text, f"{command.page}: {command.text}: nothing is called {word}"


def test_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in COMMANDS:
        if command.words[0] == "make":
            assert set(command.words[1:]) <= targets, command.text
        for wheel in re.findall(r"ki_edge-([\d.]+)-py3-none-any", command.text):
            assert wheel == VERSION, command.text
    for page in PAGES:
        for extras in re.findall(r"(?:ki-edge|whl|'\.)\[([a-z,-]+)\]", page.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= EXTRAS, f"{page.name}: [{extras}]"


def test_tests_that_the_reliability_page_names_exist() -> None:
    """Its last column has files of tests/, and words of the names of their tests."""
    rows = re.findall(r"^\|.*\| ([^|]+) \|$", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.M)
    found = [(file, words) for row in rows for file, words in re.findall(r"`([\w/]+\.py)`(?:: ([^;`]*))?", row)]
    assert len(found) > 90
    for file, words in found:
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for phrase in words.strip().split(", "):
            name = re.sub(r"\W+", "_", phrase.split(":")[-1].strip())
            assert name in text, f"{file}: {phrase}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_links_and_anchors_exist(page: Path) -> None:
    text = prose(page)
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(file), f"{page.name}: {target}"
    for span in SPAN.findall(text):
        if FILE.fullmatch(span) and not ELSEWHERE.match(span):
            assert exists(span) or (page.parent / span).exists(), f"{page.name}: `{span}`"
        elif DOTTED.fullmatch(span) and not (ROOT / span).exists():
            resolve(span)


def test_functions_that_pages_name_are_in_their_files() -> None:
    found = [(page, *names) for page in PAGES for names in FUNCTION.findall(page.read_text(encoding="utf-8"))]
    assert len(found) >= 20
    for page, file, function in found:
        body: Any = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        for name in function.split("."):
            here = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
            assert here, f"{page.name}: {file}: {function}"
            body = here[0].body


def test_the_table_of_import_directions_is_the_one_that_is_held() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = {n: int(row) for row, names in re.findall(r"^\| (\d+) \| (.+) \|$", text, re.M) for n in SPAN.findall(names)}
    assert set(rows) == set(DIRECTIONS)
    for folder, others in DIRECTIONS.items():
        assert [o for o in others.split() if rows[o] >= rows[folder]] == [], folder


def test_packages_say_what_they_import() -> None:
    for folder in DIRECTIONS:
        doc = " ".join((importlib.import_module(folder).__doc__ or "").split())
        assert doc.endswith(imports_of(folder)), f"{folder}: its docstring must end with {imports_of(folder)!r}"


def imports_of(folder: str) -> str:
    """What a package's docstring says of its imports; of its own package's folders without that package's name."""
    if folder == "ki_edge":
        return "Every folder of the project may import the files of this one; they import no folder."
    groups: dict[str, list[str]] = {folder.split(".")[0]: []}
    for name in DIRECTIONS[folder].split():
        if name != "ki_edge":
            package, _, rest = name.partition(".")
            groups.setdefault(package, []).append(rest or "itself")
    own, *others = groups.items()
    parts = [", ".join(own[1]), *(f"of {package}: {', '.join(names)}" for package, names in others)]
    return f"Imports: {'; '.join(filter(None, parts)) or 'nothing'}."


def flags(words: list[str]) -> list[str]:
    """The flags among a command's words, without values and brackets."""
    stripped = [word.strip("[]").split("=")[0] for word in words]
    return [word for word in stripped if re.fullmatch(r"--[a-z][\w.-]*|-[a-z]", word)]


def plugin_flags() -> set[str]:
    """What the policy in LeRobot takes: the fields of its configuration."""
    source = ROOT / "integrations/lerobot_policy_ki_edge/lerobot_policy_ki_edge/configuration_ki_edge.py"
    fields = (node.target for node in ast.walk(ast.parse(source.read_text("utf-8"))) if isinstance(node, ast.AnnAssign))
    return {f"--policy.{field.id}" for field in fields if isinstance(field, ast.Name)}


@cache
def flags_of_script(script: Path) -> frozenset[str]:
    """Every string of a script that looks like a flag, and those of its parts beside it (gpu.py: gpu_*.py)."""
    found = set()
    for path in [script, *script.parent.glob(f"{script.stem}_*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("-"):
                found.add(node.value)
    return frozenset(found)


def exists(name: str) -> bool:
    """A file by its path from the root, from a package's folder or from tests/; or by its name alone."""
    return any((place / name).exists() for place in PLACES) or ("/" not in name and any(ROOT.glob(f"[!.b]*/**/{name}")))


def resolve(dotted: str) -> None:
    """Import what a dotted name names. AssertionError if there is no such thing."""
    parts = dotted.split(".")
    for at in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError:
            continue
        for name in parts[at:]:
            assert hasattr(found, name) or name in getattr(found, "__annotations__", {}), dotted
            found = getattr(found, name, None)
        return
    raise AssertionError(dotted)
