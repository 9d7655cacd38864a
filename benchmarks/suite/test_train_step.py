"""End-to-end training beside MiniMind's eager loop, a few rungs of train_step.py: real data path, loader and engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.studies import train_step
from benchmarks.suite.harness import Suite
from minimind_fast.data import samples

RUNGS = ("eager", "joined", "ours")
# Without batches of many documents a CPU takes a minute per step; the small model shows that everything works.
PRESET, TOKENS, WARM, STEPS = {True: ("minimind3", 53248, 10, 20), False: ("tiny", 2048, 1, 3)}[
    torch.cuda.is_available()
]
ROWS = {"test_training": lambda suite: [(name,) for name in RUNGS]}


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    data, tokenizer = (str(samples.path(name)) for name in ("pretrain.jsonl", "tokenizer"))
    found = argparse.Namespace(
        data_path=data, tokenizer_path=tokenizer, cache_dir=str(tmp_path_factory.mktemp("cache")), threads=0,
        pack_tokens=TOKENS, steps=WARM + STEPS, preset=PRESET,
    )  # fmt: skip
    found.weights = train_step.start_weights(found)
    return found


@pytest.fixture
def rung(case: tuple[str], args: argparse.Namespace) -> Iterator[train_step.Process]:
    process = train_step.Process(args, case[0])
    yield process
    process.close()


def test_training(case: tuple[str], suite: Suite, benchmark: Any, rung: train_step.Process) -> None:
    (name,) = case
    first = rung.take(1)["loss"]
    rung.take(WARM)
    taken: list[dict[str, float]] = []
    benchmark.group = f"training {PRESET} T={TOKENS}, loader and engine included"
    benchmark.pedantic(lambda: taken.append(rung.take(1)), rounds=STEPS)  # host clock: a step ends with its loss
    if not taken[-1]["loss"] < first:
        pytest.fail(f"no time without a right answer: the loss went from {first:.3f} to {taken[-1]['loss']:.3f}")
    # Scaled to equal useful tokens in every loop.
    seconds = [TOKENS / step["rate"] for step in taken] if benchmark.stats is not None else []
    suite.host_row(benchmark, name, seconds, TOKENS, kind="training", op="training", preset=PRESET, tokens=TOKENS)
