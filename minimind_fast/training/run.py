"""A run with nothing left open: what the options, the stage, the machine and a DeepSpeed file make together.

Purpose: `resolve(options, stage, ranks)` gives a frozen `Run`; everything after it reads, and nothing assigns.
Principle: what was given stays. What was not given is settled in one place, in this order: the shipped sample and what suits
    it, the weights to begin with, the precision, the DeepSpeed file. Each step leaves its reason.
Properties: the same from Python as from the command line; `run.explain()` says what was given and what was chosen, and why;
    the same is written beside the run, as run.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from minimind_fast.data import samples
from minimind_fast.ops import precision
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero import decided, deepspeed_config

Options = TypeVar("Options", bound=TrainConfig)


@dataclass(frozen=True)
class Stage:
    """What a stage is before anybody has chosen anything.

    Attributes:
        name: of the script; the run's folder is --save_dir/NAME unless --save_weight says otherwise.
        sample: shipped file to train on without --data_path, or "".
        sample_val: shipped file to validate on with it, or "".
        suits: options that suit the sample, where they are not given.
        needs: option that names weights -> the stage that makes its default.
        also: what the stage settles by itself, last.
    """

    name: str
    sample: str = ""
    sample_val: str = ""
    suits: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    also: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Run(Generic[Options]):
    """A run, ready to start.

    Attributes:
        stage: its name.
        config: the options, each with its final value.
        deepspeed: the whole DeepSpeed config.
        ranks: number of processes.
        began: `time.perf_counter` when it was settled.
    """

    stage: str
    config: Options
    deepspeed: Mapping[str, Any]
    ranks: int
    began: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def folder(self) -> Path:
        """Where the run leaves everything."""
        return Path(self.config.save_dir) / (self.config.save_weight or self.stage)

    @property
    def checkpoints(self) -> Path:
        """What --from_resume goes on from."""
        return self.folder / "checkpoints"

    @property
    def weights(self) -> Path:
        """What the run is for."""
        return self.folder / "weights"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights under training; their masters are float32."""
        return getattr(torch, self.config.dtype)

    @property
    def title(self) -> str:
        """The model in a few words."""
        c = self.config
        return c.preset if c.from_weight == "none" else f"From {c.from_weight}"

    def explain(self) -> dict[str, dict[str, Any]]:
        """option -> {"value", "why"}: "given", "default", or the reason for which it was chosen."""
        return {name: {"value": value, "why": self.config.why(name)} for name, value in self.config.options().items()}

    def write(self) -> None:
        """Write run.json into the run's folder, which exists."""
        content = {"stage": self.stage, "ranks": self.ranks, "options": self.explain(), "deepspeed": self.deepspeed}
        (self.folder / "run.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def command(stage: str) -> str:
    """How a stage is started here: from a clone by its script, from an installed package by its name.

    Args:
        stage: its name.
    """
    clone = (Path(__file__).parents[2] / "train" / f"{stage}.py").is_file()
    return f"deepspeed train/{stage}.py" if clone else f"minimind-fast train {stage}"


def resolve(config: Options, stage: Stage, ranks: int = 1) -> Run[Options]:
    """Settle every option.

    Args:
        config: as given.
        stage: of the script.
        ranks: number of processes.

    Raises:
        ValueError: weights that are not there, a clash with the DeepSpeed file, a combination that cannot be.
    """
    if stage.sample and not config.data_path:
        config = config.settle("the shipped sample: no --data_path", data_path=[str(samples.path(stage.sample))])
        if stage.sample_val:
            config = config.suggest("the shipped sample", val_data_path=[str(samples.path(stage.sample_val))])
        config = config.suggest("suits the shipped sample", **{"preset": "tiny", **stage.suits})
    for option, before in stage.needs.items():
        config = _find_weights(config, option, before)
    if config.preset == "auto":
        gpu = torch.cuda.is_available()
        config = config.settle(
            "suits a GPU" if gpu else "suits a machine without a GPU", preset="minimind3" if gpu else "tiny"
        )
    if stage.also is not None:
        config = stage.also(config)
    ds = deepspeed_config(config, ranks)
    by = f"in {config.deepspeed_config}" if config.deepspeed_config else ""
    for name, value in decided(ds).items():
        if value != getattr(config, name):
            config = config.settle(by or f"suits {_machine(ranks)}", **{name: value})
    return Run(stage.name, config, ds, ranks)


def _machine(ranks: int) -> str:
    kind = "GPU" if torch.cuda.is_available() else "CPU"
    slow = kind == "CPU" and not precision.multiplies(torch.bfloat16)
    return f"{ranks} x {kind}" + (" without instructions for bfloat16" if slow else "")


def _find_weights(config: Options, option: str, before: str) -> Options:
    """Make --from_weight, or an option like it, a path; it may also name a run in --save_dir, as MiniMind's does."""
    name = getattr(config, option)
    may_be_none = option == "from_weight"
    if name == "none" and may_be_none or Path(name).exists():
        return config
    run = Path(config.save_dir) / name
    if not run.exists():
        hint = (
            ""
            if option in config.given
            else f" This stage goes on from trained weights: run `{command(before)}` first."
        )
        advice = " or a MiniMind .pth; none starts from nothing." if may_be_none else "."
        raise ValueError(
            f"--{option} {name}: no such file or folder, and no run of that name in {config.save_dir}.{hint} "
            f"Give a folder with weights{advice}"
        )
    return config.settle(f"the run {name} in {config.save_dir}", **{option: str(run)})
