"""A mixture of two small datasets and a text set, made of random numbers, and an engine of one process."""

import os
from contextlib import contextmanager

import numpy as np
import torch

from ki_edge.config import GemmaConfig, Pi05Config, VisionConfig
from ki_edge.model import Observation, Pi05
from ki_edge.policy.fast import FastIds
from ki_edge.policy.fast_fitting import fit_codec
from ki_edge.policy.prompt import PromptTokenizer, pad
from ki_edge.train.step.batch import ACTIONS, TEXT, Batch
from ki_edge.train.step.training_data import Share

HORIZON, WIDTH, LENGTH, POSTFIX, DRAWS = 4, 6, 48, 48, 2
CONFIG = Pi05Config(
    vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4, image_size=8),
    backbone=GemmaConfig(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8),
    expert=GemmaConfig(width=16, depth=2, mlp_dim=24, num_heads=2, num_kv_heads=1, head_dim=8),
    vocab_size=832,
    action_dim=WIDTH,
    action_horizon=HORIZON,
)
SCALES = {0: np.array([2.0, 3.0, 0.5]), 1: np.array([10.0, 1.0])}  # robot units of a normalised number


class ToyData:
    """`count` action samples of two datasets, the second of two numbers, and `texts` text samples. A chunk follows the
    brightness of its pictures and its task, so that it can be learnt; the last samples of a dataset are padded."""

    config = CONFIG
    names = ("one", "two", "questions")
    tasks = ("lift the cube", "fold the <b>towel</b>", "what is it?")

    def __init__(self, tokenizer_model, *, count=8, texts=2, batch=3, held_out=True, seed=0):
        random = np.random.default_rng(seed)
        self.tokenizer = PromptTokenizer(tokenizer_model, "ki", LENGTH)
        self.source = np.concatenate([np.arange(count) % 2, np.full(texts, 2)])
        self.kind = np.where(self.source == 2, TEXT, ACTIONS)
        light = random.integers(0, 256, count + texts)
        noise = random.integers(-20, 20, (count + texts, 1, 8, 8, 3))
        self.images = np.clip(light[:, None, None, None, None] + noise, 0, 255).astype(np.uint8)
        ramp = np.linspace(0.5, 1.0, HORIZON)[None, :, None]
        self.actions = ramp * ((light / 127.5 - 1.0)[:, None, None] * np.array([1.0, -0.5, 0.25, 0, 0, 0]))
        self.actions[self.source == 1, :, 2:] = 0.0
        self.dims = np.arange(WIDTH)[None] < np.array([3, 2, 0])[self.source][:, None]
        self.real = np.arange(HORIZON)[None] < np.where(np.arange(count + texts) % 4 == 3, 2, HORIZON)[:, None]
        self.real &= (self.kind == ACTIONS)[:, None]
        self.codec = fit_codec(random.uniform(-1, 1, (50, HORIZON, 3)), vocab_size=200, margin=8)
        self.ids = FastIds(CONFIG.vocab_size - 1, self.codec.vocab_size)
        self.batch, self._held_out, self.seed = batch, held_out, seed

    def rows(self, rows, seed):
        """A Batch of these samples."""
        random = np.random.default_rng(seed)
        prompts = [self.tokenizer.encode(self.tasks[s], np.zeros(2)) for s in self.source[rows]]
        postfixes = [self.postfix(row) for row in rows]
        packed = [
            [np.stack(parts) for parts in zip(*(pad(ids, length) for ids in group), strict=True)]
            for group, length in ((prompts, LENGTH), (postfixes, POSTFIX))
        ]
        tokens = [torch.from_numpy(np.asarray(part)) for group in packed for part in group]
        observation = Observation(
            torch.from_numpy(self.images[rows]), torch.ones(len(rows), 1, dtype=torch.bool), *tokens
        )
        shape = (DRAWS, len(self.images), HORIZON, WIDTH)
        noise = random.standard_normal(shape, np.float32)[:, rows].reshape(-1, HORIZON, WIDTH)
        time = (random.beta(1.5, 1.0, shape[:2]) * 0.999 + 0.001).astype(np.float32)[:, rows].reshape(-1)
        arrays = (self.actions[rows].astype(np.float32), self.real[rows], self.dims[rows], noise, time)
        numbers = (self.kind[rows], self.source[rows], self.source[rows], np.asarray(rows))
        return Batch(observation, *(torch.from_numpy(np.ascontiguousarray(a)) for a in (*arrays, *numbers)))

    def postfix(self, row):
        if self.kind[row] == TEXT:
            return np.array([40 + row % 5, 41, self.tokenizer.eos_id], np.int32)
        dims = int(self.dims[row].sum())
        return self.ids.postfix(self.codec.encode(self.actions[row][:, :dims], lossy=True), self.tokenizer)

    def held_out(self, share):
        rows = np.arange(len(self.images))[share.rank :: share.world] if self._held_out else np.arange(0)
        for at in range(0, len(rows), self.batch):
            yield self.rows(rows[at : at + self.batch], self.seed + 1)

    def steps(self, first, share):
        for step in range(first, 10_000):
            rows = np.random.default_rng([self.seed, step]).choice(len(self.images), self.batch, replace=False)
            yield [self.rows(rows, step)]

    def where(self, source, row):
        return f"{self.names[source]} episode {row}"

    def label(self, source, row):
        return f"{self.names[source]}, episode {row}"

    def decode_actions(self, source, ids):
        parsed = self.ids.parse(np.asarray(ids), self.tokenizer)
        return self.codec.decode(parsed.fast_ids, HORIZON, len(SCALES[source])).actions if parsed.terminated else None

    def unnormalize_actions(self, source, actions):
        return np.asarray(actions, np.float64) * SCALES[source]

    def action_names(self, source):
        return tuple(f"joint {i}" for i in range(len(SCALES[source])))


class ToyEngine:
    """One model, which is its own average; of a process of `torch.distributed` where there is one."""

    device = torch.device("cpu")

    def __init__(self, model):
        self.model = model
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0

    def share(self):
        return Share(self.rank, self.world)

    @contextmanager
    def averaged(self):
        yield self.model.eval()


def toy_model(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    return Pi05(config)
