"""ki-run --policy: the shipped policy behind a websocket, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ki_runtime import Policy
from ki_runtime.control import cli

from .policy_server import PolicyServer


@pytest.fixture(scope="module")
def policy(fetch_bundle):
    return Policy.load(fetch_bundle)


@pytest.fixture
def server(policy):
    """The shipped policy, as a server of openpi's kind that does not know a contract."""
    found = PolicyServer(
        lambda number, seen: {"actions": policy.infer(seen, seed=number)["actions"].astype(np.float32)}
    )
    yield found
    found.stop()


@pytest.fixture
def contract(policy, tmp_path):
    policy.contract.save(tmp_path / "contract.json")
    return tmp_path / "contract.json"


@pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="needs ki-edge[sim]")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_arm_reaches_its_target_with_the_model_elsewhere(server, contract, capsys, mode):
    words = ["--policy", server.uri, "--contract", contract, "--robot", "gym:FetchReach-v4", "--mode", mode]
    assert cli.main([*map(str, words), "--episodes", "2", "--seed", "1000", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [episode["success"] for episode in report["episodes"]] == [True, True]
    assert report["bundle"] == server.uri
    assert {"network_ms", "total_ms"} <= set(report["latency_ms"])
    assert sorted(server.asked[-1]) == ["images", "prompt", "state"]


def test_a_servers_address_may_stand_in_the_bundles_place(server, contract, fetch_replay: Path, capsys):
    words = [server.uri, "--contract", str(contract), "--robot", f"replay:{fetch_replay}"]
    assert cli.main(words) == 0
    assert "episodes      1, mode sync" in capsys.readouterr().out


def test_limits_are_shown_without_a_question(server, contract, fetch_replay: Path, capsys):
    words = ["--policy", server.uri, "--contract", str(contract), "--robot", f"replay:{fetch_replay}", "--show-limits"]
    assert cli.main(words) == 0
    assert server.asked == [] and capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the policy is a BUNDLE or --policy ws://HOST:PORT; neither is given"),
        (["--rerun", "."], "--rerun took . for its file: write the bundle first, and --rerun last"),
        (["somewhere", "--policy", "URI"], "the policy is a BUNDLE or --policy ws://HOST:PORT; both are given"),
        (["somewhere", "--contract", "pi05_droid"], "--contract is for --policy: a bundle has its contract"),
        (["--policy", "URI", "--backend", "ort"], "--backend is for a bundle: not with --policy, whose server decides"),
        (["--policy", "URI", "--contract", "FILE", "--num-steps", "3"], "num_steps 3: the server at ws://"),
        (["--policy", "URI", "--self-check", "2"], "--self-check is for a bundle"),
        (
            ["--policy", "URI", "--contract", "FILE", "--mode", "rtc", "--delay", "2"],
            "openpi's protocol does not tell ws://",
        ),
        (["--policy", "URI"], "does not tell its policy's contract, as a server of openpi does not: give --contract"),
        (["--policy", "URI", "--contract", "nope"], "--contract nope: neither a file nor one of droid"),
        (["--policy", "URI", "--contract", "pi05_droid"], "needs the cameras observation/exterior_image_1_left"),
        (["--policy", "robot:80", "--contract", "pi05_droid"], "'robot:80' is no address of a policy server"),
    ],
)
def test_what_is_refused_before_anything_moves(server, contract, fetch_replay: Path, capsys, words, said):
    words = [{"URI": server.uri, "FILE": str(contract)}.get(word, word) for word in words]
    assert cli.main([*words, "--robot", f"replay:{fetch_replay}"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err.splitlines()[-1] and captured.out == ""
    assert server.asked == []


def test_the_extra_is_named_where_its_packages_are_missing(server, fetch_replay: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets", None)
    assert cli.main(["--policy", server.uri, "--robot", f"replay:{fetch_replay}"]) == 2
    assert "a policy on another machine needs websockets: pip install 'ki-edge[remote]'" in capsys.readouterr().err


def test_a_server_with_the_contract_needs_no_file(policy, fetch_replay: Path):
    told = {"ki_edge": {"contract": policy.contract.to_json()}}
    server = PolicyServer(lambda number, seen: {"actions": policy.infer(seen, seed=number)["actions"]}, told)
    assert cli.main(["--policy", server.uri, "--robot", f"replay:{fetch_replay}"]) == 0
    server.stop()
    assert server.asked
