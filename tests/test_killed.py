"""kill -9 at every moment of writing a bundle, and readers at every moment of replacing one."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from ki_edge.bundle import Bundle, Manifest, write_bundle
from ki_edge.errors import BundleError

ROOT = Path(__file__).parents[1]
MOMENTS = 40  # of each run
FILES = ("weights.safetensors", "prefix.onnx", "assets/tokenizer.model")

# Writes a bundle once to count the lines of our modules that run, then over and over, killed at one line after another,
# in children that are forked at that point. After each kill: what is there, and what the next run makes of it.
KILLER = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from ki_edge.bundle import bundle
from ki_edge.files import publishing, staging
from ki_edge.errors import KiEdgeError
from tests_killed import look, write

target, way, moments = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
if way == "renames":
    publishing._rename = lambda *_: False
ours = {module.__file__ for module in (bundle, publishing, staging)}

def run(limit):
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in ours:
            return None
        if event == "line":
            lines += 1
            if lines == limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    write(target, "new")
    sys.settrace(None)
    return lines

write(target, "old")
total = run(-1)
found = []
for limit in range(1, total, max(1, total // moments)):
    write(target, "old")
    child = os.fork()
    if child == 0:
        run(limit)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, limit
    killed = look(target)
    staging.sweep(target.parent)
    found.append([limit, killed, look(target), sorted(os.listdir(target.parent))])
print(json.dumps(found))
"""


def write(target, content):
    """A bundle whose files all hold `content`, over whatever bundle is there."""
    with write_bundle(target, force=True) as writer:
        for name in FILES:
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_text(content)
        fields = {name: {} for name in ("model", "decode_vocabulary", "tools", "parity")}
        fields |= {
            "graphs": {"prefix": {"file": FILES[0]}},
            "contract": None,
            "sampling": {"num_steps": 10},
            "precision": "float32",
        }
        writer.seal(Manifest(**fields, weights={"file": FILES[0]}, provenance={"content": content}))


def look(target):
    """ "old" or "new" if a whole bundle is there, None if nothing is; an error for all else."""
    if not target.exists():
        return None
    bundle = Bundle.open(target, verify=True)
    contents = {(target / name).read_text() for name in FILES} | {bundle.manifest.provenance["content"]}
    bundle.check_unchanged()
    (content,) = contents
    return content


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_every_moment(tmp_path, way):
    (tmp_path / "tests_killed.py").write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "work").mkdir()
    arguments = [tmp_path, tmp_path / "work" / "bundle", way, str(MOMENTS)]
    command = [sys.executable, "-c", KILLER, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= MOMENTS
    killed = [content for _, content, _, _ in found]
    assert killed == sorted(killed, key=["old", None, "new"].index)  # once it is published it stays
    assert killed[0] == "old" and killed[-1] == "new"
    assert None not in killed or way == "renames"  # the kernel's exchange leaves no moment without a bundle
    for limit, content, after, left in found:
        assert after == (content or "old"), limit
        assert left == ["bundle"], (limit, left)


def _read(target, reads, stop, said):
    count, failed = 0, None
    while not stop.is_set() and failed is None:
        try:
            look(target)
            count += 1
            reads.set()
        except BundleError as error:
            # opening never fails; what is read after it may be of the next bundle, which is noticed
            failed = None if "was replaced or removed since it was opened" in str(error) else str(error)
        except (ValueError, OSError) as error:
            failed = repr(error)
    said.put((count, failed))


def test_a_reader_never_sees_anything_else_than_a_whole_bundle(tmp_path):
    context = multiprocessing.get_context("spawn")
    reads, stop, said = context.Event(), context.Event(), context.Queue()
    write(tmp_path / "bundle", "first")
    reader = context.Process(target=_read, args=(tmp_path / "bundle", reads, stop, said))
    reader.start()
    assert reads.wait(timeout=300)  # on a busy machine everything would be written before it has started
    for number in range(60):
        write(tmp_path / "bundle", f"{number}" * (number + 1))
    stop.set()
    count, failed = said.get(timeout=300)
    reader.join()
    assert failed is None and count > 0
