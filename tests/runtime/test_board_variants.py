"""Which way of putting a policy on a board fits it best, and how that adds up."""

from dataclasses import replace

import pytest

from ki_edge.checkpoints.layout.counts import count_weights
from ki_edge.config import PI05
from ki_runtime.doctor.boards import Board, find_board
from ki_runtime.doctor.bundle import check_room
from ki_runtime.doctor.memory import needs
from ki_runtime.doctor.plan import plan, tensorrt
from ki_runtime.doctor.system import Memory
from ki_runtime.doctor.variants import COMFORT, elsewhere, mark, recommend, variants

TABLE = 257_152 * 2048  # numbers
SMALL = find_board("orin-8gb")


def ways(board, config=PI05, columns=2050):
    return variants(config, columns, board, tensorrt(board.software[1]))


def way(board, precision, table):
    return next(found for found in ways(board) if (found.precision, found.table) == (precision, table))


def test_the_table_is_a_gigabyte_less_in_each_graph_that_takes_tokens():
    for precision, each in (("float32", 4), ("float16", 2), ("int8_static", 2), ("nvfp4", 2), ("int8", 4)):
        graph, host = (needs(replace(PI05, embeddings=where), 2050, precision).graphs for where in ("graph", "host"))
        saved = {name: graph[name].weights - host[name].weights for name in graph}
        assert saved == {"prefix": each * TABLE, "denoise": 0, "fast_decode": each * TABLE}
    whole = [needs(replace(PI05, embeddings=where), PI05.vocab_size, "float16") for where in ("graph", "host")]
    sizes = [need.graphs["fast_decode"].weights for need in whole]
    assert sizes[0] == sizes[1]  # every token's logits need the whole table


def test_bytes_of_low_precisions():
    """A weight of nvfp4 takes half a byte and a sixteenth for its scale; FAST and the table stay in 16 bits."""
    count = count_weights(PI05)
    low = (count.vision + count.backbone).matrices
    vectors = 4 * (count.vision + count.backbone).vectors
    for precision, each in (("int8_static", 1.0), ("float8", 1.0), ("nvfp4", 0.5625)):
        need = needs(PI05, 2050, precision)
        assert need.graphs["prefix"].weights == pytest.approx(each * low + vectors + 2 * TABLE, abs=1)
        assert need.graphs["fast_decode"] == needs(PI05, 2050, "float16").graphs["fast_decode"]


def test_in_turn_the_largest_graph_counts():
    need = needs(PI05, 2050, "float16")
    prefix, fast = need.graphs["prefix"], need.graphs["fast_decode"]
    assert need.sequential == prefix.weights + prefix.activations + prefix.kv < need.acting
    assert need.sequential_with_fast == need.sequential < need.with_fast  # FAST's is smaller than the prefix graph
    low = needs(PI05, 2050, "int8_static")
    assert low.sequential_with_fast == fast.weights + fast.activations + fast.kv + prefix.kv > low.sequential
    acting = needs(PI05, 0, "float16")
    assert acting.sequential_with_fast == acting.sequential and acting.with_fast == acting.acting


def test_every_sum_is_what_its_parts_add_up_to():
    for found in ways(find_board("rtx-5090")):
        assert sum(found.adds_up().values()) == found.need.acting
        told = found.to_json()
        assert told["acting"] == found.takes(fast=False, sequential=False) == sum(told["adds_up"].values())


@pytest.mark.parametrize(
    ("board", "fast", "expected"),
    [
        ("orin-8gb", False, ("int8_static", "graph", False)),
        ("orin-8gb", True, ("int8_static", "host", True)),
        ("orin-16gb", False, ("float16", "graph", False)),
        ("orin-16gb", True, ("float16", "graph", False)),
        ("rtx-5090", True, ("float16", "graph", False)),
    ],
)
def test_what_fits_a_board_best(board, fast, expected):
    found = recommend(find_board(board), ways(find_board(board)), fast=fast)
    assert (found.variant.precision, found.variant.table, found.sequential) == expected
    assert found.takes <= COMFORT * find_board(board).free


def test_less_and_less_memory_changes_more_and_more():
    """A card of Blackwell: the table leaves it before 16 bits do, and graphs take turns at last."""
    seen = []
    for memory in (8.0, 6.6, 5.0, 3.9, 2.5, 2.2, 1.0):
        board = Board("b", "B", memory, (12, 0), ("", "10.13"), "")
        found = recommend(board, ways(board), fast=False)
        seen.append(None if found is None else (found.variant.precision, found.variant.table, found.sequential))
    assert seen == [
        ("float16", "graph", False),
        ("float16", "host", False),
        ("float8", "graph", False),
        ("float8", "host", False),
        ("nvfp4", "host", False),
        ("nvfp4", "host", True),
        None,
    ]


def test_commands_do_what_is_recommended():
    """Flags that exist: tests of the documentation run them where they stand in docs/jetson.md."""
    acting, both = (recommend(SMALL, ways(SMALL), fast=fast).commands() for fast in (False, True))
    export = "ki-export CHECKPOINT -o BUNDLE --target trt --precision int8 --calibrate RECORDINGS"
    assert acting == (f"{export} --no-fast-head", "ki-build BUNDLE", "ki-run BUNDLE --robot NAME")
    assert both == (
        f"{export} --embeddings host --fast-head",
        "ki-build BUNDLE --graphs prefix,denoise,fast_decode",
        "ki-run BUNDLE --robot NAME --sequential",
    )
    for board in ("orin-8gb", "thor", "rtx-4090"):
        parse_all(recommend(find_board(board), ways(find_board(board)), fast=True).commands())


def parse_all(commands):
    from ki_export import cli as export
    from ki_runtime.control.flags import build_parser
    from ki_runtime.trt import cli as build

    parsers = {"ki-export": export._parser(), "ki-build": build._parser(), "ki-run": build_parser()}
    for command in commands:
        name, *words = command.split()
        parsers[name].parse_args(words)


def test_marks_and_where_engines_are_compiled():
    board = Board("b", "B", 10.5, (8, 9), ("", "10.13"), "")
    assert [mark(board, int(size)) for size in (9e9, 9.5e9, 10.1e9)] == ["fits", "tight", "no"]
    assert "on any x86 PC, which needs no GPU" in elsewhere(board, 4_000_000_000)
    assert "--compute-capability 8.9" in elsewhere(board, 4_000_000_000)
    for key in ("h100", "h200"):  # which TensorRT-RTX does not compile for
        told = elsewhere(find_board(key), 4_000_000_000)
        assert "on another machine with such a card" in told and "trt-rtx" not in told
    told = elsewhere(SMALL, 10_000_000_000)
    assert "4.5 GB of swap" in told and "no PC compiles for a Jetson" in told


def test_a_bundle_whose_table_is_in_the_host(make_bundle):
    """It is told from the one whose graphs hold it."""
    there = plan(SMALL, make_bundle(precision="float16", model=PI05.to_dict()).path)
    host = make_bundle("host", precision="float16", model=replace(PI05, embeddings="host").to_dict())
    assert there["fits"] is False and plan(SMALL, host.path)["fits"] is True


def test_too_little_at_once_but_enough_in_turn():
    """ki-doctor BUNDLE: a warning that names the flag, where it would be a problem without."""
    need = needs(PI05, 0, "float16")  # 6.48 GB, in turn 5.86
    said = {free: check_room(need, None, Memory(10**10, free, 0, None)) for free in (7 * 10**9, 6 * 10**9, 5 * 10**9)}
    assert [finding.level for finding in said.values()] == ["ok", "warning", "problem"]
    assert "--sequential takes 5.9 GB" in said[6 * 10**9].text and "--sequential" in said[6 * 10**9].fix
    assert "--embeddings host" in said[5 * 10**9].fix
