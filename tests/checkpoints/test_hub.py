"""Hub ids, through the real huggingface_hub against a small server that answers as the Hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from ki_edge.errors import CheckpointError
from ki_edge.files.hub import Resolved, resolve

COMMIT, OTHER = "1" * 40, "2" * 40
FILES = {
    "config.json": b'{"type": "pi05"}',
    "model.safetensors": b"weights of the model" * 1000,
    "policy_preprocessor.json": b"{}",
    "assets/droid/norm_stats.json": b'{"norm_stats": {}}',
    "tokenizer.model": b"pieces",
}
REFUSED = {
    "pytorch_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "modeling_pi05.py": b"raise SystemExit",
    "params/setup.py": b"raise SystemExit",
    "training_state/optimizer_state.safetensors": b"moments",
    "README.md": b"# model",
}

RECORDED = {
    "meta/info.json": b"{}",
    "meta/episodes/chunk-000/file-000.parquet": b"episodes",
    "data/chunk-000/file-000.parquet": b"frames",
    "videos/observation.images.top/chunk-000/file-000.mp4": b"film",
}


@dataclass
class FakeHub:
    """Repositories by name: revision -> commit, commit -> files. `requests`: what was asked for."""

    repos: dict[str, tuple[dict[str, str], dict[str, dict[str, bytes]]]]
    gated: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)  # of files said to be larger than they are
    fails: set[str] = field(default_factory=set)  # files whose bytes stop half way
    requests: list[str] = field(default_factory=list)
    url: str = ""


def handler_of(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "datasets":
                parts = parts[1:]
            if parts[:1] == ["api"]:
                self.api("/".join(parts[2:4]), parts[4:])
            else:
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def api(self, name: str, rest: list[str]) -> None:
            files = self.files(name, rest[1] if len(rest) > 1 else "main")
            if files is None:
                return
            commit, content = files
            if rest[:1] == ["tree"]:
                tree = [{"type": "file", "path": p, "size": len(b), "oid": digest(b)} for p, b in content.items()]
                self.answer(200, json.dumps(tree).encode())
                return
            siblings = [
                {"rfilename": p, "size": hub.sizes.get(p, len(b)), "blobId": digest(b)} for p, b in content.items()
            ]
            info = {"_id": "0", "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, json.dumps(info).encode())

        def file(self, name: str, revision: str, path: str) -> None:
            files = self.files(name, revision)
            if files is None:
                return
            commit, content = files
            if name in hub.gated:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
                return
            body = content[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(body)}"'}
            self.answer(200, body, headers, stop=path in hub.fails)

        def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            if name not in hub.repos:
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
                return None
            revisions, commits = hub.repos[name]
            commit = revisions.get(revision, revision)
            if commit not in commits:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return None
            return commit, commits[commit]

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, stop: bool = False) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) // 2] if stop else body)

    return Handler


def digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    pi05 = ({"main": COMMIT, "v1": OTHER}, {COMMIT: FILES | REFUSED, OTHER: FILES | {"config.json": b'{"n": 1}'}})
    pickles = ({"main": COMMIT}, {COMMIT: {"config.json": b"{}", "pytorch_model.bin": b""}})
    recorded = ({"main": COMMIT}, {COMMIT: RECORDED | REFUSED})
    fake = FakeHub({"lerobot/pi05_base": pi05, "someone/pickles": pickles, "someone/recorded": recorded})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(fake))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import json, sys
from ki_edge.files.hub import CHECKPOINT, DATASET, resolve
from ki_edge.errors import CheckpointError, DatasetError
said = []
try:
    kind = DATASET if sys.argv[3:] else CHECKPOINT
    found = resolve(sys.argv[1], revision=sys.argv[2] or None, say=said.append, kind=kind)
    files = sorted(p.relative_to(found.folder).as_posix() for p in found.folder.rglob("*") if p.is_file())
    print(json.dumps([str(found.folder), dict(found.origin), files, said]))
except CheckpointError as error:
    print(json.dumps(str(error)))
except DatasetError as error:
    print(json.dumps("dataset: " + str(error)))
"""
Run = Callable[..., Any]


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Run:
    """resolve() in a process of its own, as huggingface_hub reads its environment when it is imported."""

    def call(name: str, revision: str = "", *kind: str, **environment: str) -> Any:
        given = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        given |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", SCRIPT, name, revision, *kind]
        result = subprocess.run(
            command, env=given | environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        answer = json.loads(result.stdout.splitlines()[-1])
        assert not isinstance(answer, str) or "\n" not in answer
        return answer

    return call


def test_a_repository_is_fetched_without_pickles_and_code(run: Run, hub: FakeHub) -> None:
    folder, origin, files, said = run("lerobot/pi05_base")
    assert origin == {"repo": "lerobot/pi05_base", "revision": COMMIT}
    assert files == sorted(FILES) and not said and "tokenizer.model" in files
    assert (Path(folder) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not [request for request in hub.requests if any(name in request for name in REFUSED)]


def test_a_revision_is_pinned_to_its_commit(run: Run) -> None:
    folder, origin, *_ = run("lerobot/pi05_base", "v1")
    assert origin["revision"] == OTHER
    assert (Path(folder) / "config.json").read_bytes() == b'{"n": 1}'
    assert run("lerobot/pi05_base", OTHER)[1]["revision"] == OTHER


def test_the_cache_is_used_without_a_network(run: Run, hub: FakeHub) -> None:
    first = run("lerobot/pi05_base")
    hub.requests.clear()
    folder, origin, files, said = run("lerobot/pi05_base", HF_HUB_OFFLINE="1")
    assert (folder, origin, files) == (first[0], first[1], first[2]) and not hub.requests
    assert said == [
        f"lerobot/pi05_base: HF_HUB_OFFLINE forbids to fetch it; using commit {COMMIT} from the cache",
    ]
    said = run("lerobot/pi05_base", HF_ENDPOINT="http://127.0.0.1:9")[3]
    assert "the Hub could not be read (ConnectError" in said[0]
    assert run("lerobot/pi05_base", COMMIT, HF_HUB_OFFLINE="1")[0] == first[0]


def test_a_second_time_no_weights_are_fetched(run: Run, hub: FakeHub) -> None:
    run("lerobot/pi05_base")
    hub.requests.clear()
    run("lerobot/pi05_base")
    assert hub.requests and not [request for request in hub.requests if "/resolve/" in request]


def test_not_in_the_cache_and_no_network(run: Run, tmp_path: Path) -> None:
    for environment, why in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids to fetch it"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub could not be read (ConnectError"),
    ):
        error = run("lerobot/pi05_base", "v1", **environment)
        assert error.startswith("lerobot/pi05_base at revision 'v1' is not a folder here, is not in the local cache (")
        assert str(tmp_path / "hf") in error and why in error
        assert error.endswith("download it elsewhere with `hf download lerobot/pi05_base` and give the folder")


def test_what_does_not_exist(run: Run) -> None:
    assert run("lerobot/nothing").startswith(
        "no folder lerobot/nothing here, and the Hub has no repository of that name or it is private: `hf auth login`"
    )
    assert run("lerobot/pi05_base", "v2") == (
        "lerobot/pi05_base has no revision 'v2': expected a branch, tag or commit"
    )
    assert run("someone/pickles") == (
        "someone/pickles holds no checkpoint: expected *.safetensors or params/ in it, "
        "found only pytorch_model.bin, a pickle, which is never opened"
    )


def test_a_gated_repository(run: Run, hub: FakeHub) -> None:
    hub.gated.add("lerobot/pi05_base")
    error = run("lerobot/pi05_base")
    assert error.startswith("lerobot/pi05_base is gated: accept its terms on its Hub page, then `hf auth login`")


def test_more_than_the_disk_has(run: Run, hub: FakeHub) -> None:
    hub.sizes["model.safetensors"] = 10**18
    error = run("lerobot/pi05_base")
    assert error.startswith("lerobot/pi05_base needs 1000000000.0 GB more in ") and "set HF_HOME" in error
    assert not [request for request in hub.requests if "/resolve/" in request]
    hub.sizes["model.safetensors"] = len(FILES["model.safetensors"])
    run("lerobot/pi05_base")
    hub.sizes["model.safetensors"] = 10**18  # in the cache already, so no room is needed for it
    assert run("lerobot/pi05_base")[2] == sorted(FILES)


def test_an_interrupted_download_is_not_used(run: Run, hub: FakeHub) -> None:
    hub.fails.add("model.safetensors")
    error = run("lerobot/pi05_base", HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert error.startswith("only a part of lerobot/pi05_base is in the local cache and")
    assert run("lerobot/pi05_base", HF_HUB_OFFLINE="1").startswith("only a part of lerobot/pi05_base")
    hub.fails.clear()
    folder, _, files, *_ = run("lerobot/pi05_base")
    assert files == sorted(FILES)
    assert (Path(folder) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_local_folders_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lerobot" / "pi05_base").mkdir(parents=True)
    assert resolve("lerobot/pi05_base") == Resolved(Path("lerobot/pi05_base"))
    assert resolve(tmp_path).origin == {}
    with pytest.raises(CheckpointError, match="is a local folder: --revision v1 is for Hub ids only"):
        resolve("lerobot/pi05_base", revision="v1")


@pytest.mark.parametrize(
    "name", ["nowhere", "./lerobot/pi05", "/a/b", "a/b/c", "a--b/c", "a/..", "https://x/y", "a/b\n", "a" * 5000]
)
def test_neither_a_path_nor_an_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: expected a folder, or a Hub id such as"):
        resolve(name)


@pytest.mark.parametrize("module", ["huggingface_hub", "huggingface_hub.errors"])
def test_without_the_library(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=r"huggingface_hub is missing: pip install -U 'ki-edge\[hub\]'"):
        resolve("lerobot/pi05_base")


def test_a_dataset(run: Run, hub: FakeHub) -> None:
    folder, origin, files, _ = run("someone/recorded", "", "dataset")
    assert files == sorted(RECORDED) and origin["revision"] == COMMIT and "datasets--someone--recorded" in folder
    assert not [request for request in hub.requests if any(name in request for name in REFUSED)]
    assert all("datasets/someone/recorded" in request for request in hub.requests)
    assert run("someone/recorded", "", "dataset", HF_HUB_OFFLINE="1")[0] == folder
    assert run("lerobot/pi05_base", "", "dataset").startswith(
        "dataset: lerobot/pi05_base holds no dataset: expected meta/"
    )
    assert run("someone/nothing", "", "dataset").startswith("dataset: no folder someone/nothing here, and the Hub has")
