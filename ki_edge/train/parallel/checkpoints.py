from __future__ import annotations
import shutil
from pathlib import Path
from ki_edge.errors import ArgumentError
class RunFolder:
    def __init__(self, out, processes, keep="last:3,best:1"):
        self.out=Path(out)
        if self.out.exists() and not self.out.is_dir(): raise ArgumentError(f"{self.out} is a file: name a folder")
    @property
    def last(self):
        f=sorted(self.out.glob("step_*")); return f[-1] if f else None
    best=None
    def has(self, step): return (self.out/f"step_{step:06d}").is_dir()
    def save(self, engine, save_assets):
        f=self.out/f"step_{engine.step:06d}"; shutil.rmtree(f,ignore_errors=True); f.mkdir(parents=True)
        engine.save_checkpoint(f); save_assets(f); engine.save_state(f/"training")
        l=self.out/"last"; l.unlink(missing_ok=True); l.symlink_to(f.name)
        return f
    def load(self, engine): engine.load_state(self.last/"training")
    def judged(self, step, score): pass
    def clear(self):
        for f in self.out.glob("step_*"): shutil.rmtree(f)
    def close(self): pass
