"""A fully resolved run: the options, the stage, the machine and a DeepSpeed file combined.

Purpose: `resolve(options, stage, ranks, memory)` returns a frozen `Run`; everything after it only reads.
Principle: given options stay. The others are settled in one place, in this order: the shipped sample and its defaults, the
    recipe, the initial weights, the size of micro-batches, the precision, the DeepSpeed file. Each step records its reason.
Properties: works the same from Python and from the command line; `run.explain()` says what was given, what was chosen and
    why; run.json, in the run's folder, says the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.errors import UserError
from minimind_fast.ops import precision
from minimind_fast.recipes import RECIPES
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.shape import preset_name
from minimind_fast.training.zero.options import decided, deepspeed_config

Options = TypeVar("Options", bound=TrainConfig)


NO_DATA = "the shipped sample: no --data_path"


@dataclass(frozen=True)
class Stage:
    """What defines a stage, before any option is chosen.

    Attributes:
        name: the script's name; the run's folder is --save_dir/NAME unless --save_weight says otherwise.
        sample: shipped file to train on without --data_path, or "".
        sample_val: shipped file to validate on with it, or "".
        suits: defaults that suit the sample.
        needs: option that names weights -> the stage that writes its default.
        also: settles the stage's own options, last.
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
        stage: the stage's name.
        config: the options, each with its final value.
        deepspeed: the complete DeepSpeed config.
        ranks: number of processes.
        began: `time.perf_counter()` when the run was resolved.
    """

    stage: str
    config: Options
    deepspeed: Mapping[str, Any]
    ranks: int
    began: float = field(default_factory=time.perf_counter, compare=False)

    @property
    def folder(self) -> Path:
        """The folder for everything that the run writes."""
        return Path(self.config.save_dir) / (self.config.save_weight or self.stage)

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, for --from_resume."""
        return self.folder / "checkpoints"

    @property
    def weights(self) -> Path:
        """Folder of the trained model."""
        return self.folder / "weights"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights in training; their masters are float32."""
        return getattr(torch, self.config.dtype)

    @property
    def title(self) -> str:
        """The model in a few words."""
        c = self.config
        return c.preset if c.from_weight == "none" else f"From {c.from_weight}"

    def explain(self) -> dict[str, dict[str, Any]]:
        """option -> {"value", "why"}; why is "given", "default", or the reason for the choice."""
        return {name: {"value": value, "why": self.config.why(name)} for name, value in self.config.options().items()}

    def write(self) -> None:
        """Write run.json into the run's folder, which must exist."""
        content = {"stage": self.stage, "ranks": self.ranks, "options": self.explain(), "deepspeed": self.deepspeed}
        (self.folder / "run.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def command(stage: str) -> str:
    """The command that starts a stage: its script in a clone, its name in an installed package."""
    clone = (Path(__file__).parents[2] / "train" / f"{stage}.py").is_file()
    return f"deepspeed train/{stage}.py" if clone else f"minimind-fast train {stage}"


def resolve(config: Options, stage: Stage, ranks: int = 1, memory: int = 0) -> Run[Options]:
    """Settle every option.

    Args:
        config: the options as given.
        stage: the script's.
        ranks: number of processes.
        memory: bytes of the smallest GPU among them; 0: unknown, or CPUs.

    Raises:
        ValueError: missing weights, a clash with the DeepSpeed file, or an invalid combination.
    """
    if stage.sample and not config.data_path:
        config = config.settle(NO_DATA, data_path=[str(samples.path(stage.sample))])
        if stage.sample_val:
            config = config.suggest("the shipped sample", val_data_path=[str(samples.path(stage.sample_val))])
        config = config.suggest("suits the shipped sample", **{"preset": "tiny", **stage.suits})
    values = {name: value for name, value in RECIPES.get(config.recipe, {}).items() if name in config.options()}
    config = config.suggest(f"--recipe {config.recipe}", **values)
    for option, before in stage.needs.items():
        config = _find_weights(config, option, before)
    if config.preset == "auto":
        gpu = torch.cuda.is_available()
        config = config.settle(
            "suits a GPU" if gpu else "suits a machine without a GPU", preset="minimind3" if gpu else "tiny"
        )
    if stage.also is not None:
        config = stage.also(config)
    if "val_interval" in config.given and config.val_interval and not config.val_data_path:
        raise UserError("--val_interval validates nothing without --val_data_path: give a file that is not trained on")
    config = _join_micro_batches(config, memory)
    ds = deepspeed_config(config, ranks)
    by = f"in {config.deepspeed_config}" if config.deepspeed_config else ""
    for name, value in decided(ds).items():
        if value != getattr(config, name):
            config = config.settle(by or f"suits {_machine(ranks)}", **{name: value})
    return Run(stage.name, config, ds, ranks)


# Half of a GPU is for activations; beside them stand gradients, weights, masters and moments (20 bytes a parameter).
ACTIVATIONS_SHARE = 0.5
JOINED = "as many rows as fit, the step's accumulation shorter by as much"


def activation_bytes(c: ModelConfig, element_bytes: int) -> int:
    """Upper bound of a token's share of a micro-batch's peak memory on a GPU, beside weights and their gradients.

    Args:
        c: the model's shape; a test holds this above what `proof.memory` counts, for every preset.
        element_bytes: bytes per activation.
    """
    assert c.head_dim
    qkv = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    ffn = c.intermediate_size or 0
    if c.use_moe:
        ffn = (c.moe_intermediate_size or ffn) * ((c.num_experts_per_tok or 1) + (c.num_shared_experts or 0))
    return (c.num_hidden_layers + 1) * (4 * c.hidden_size + 3 * qkv + 3 * ffn) * element_bytes


def _join_micro_batches(config: Options, memory: int) -> Options:
    """On a GPU, run several micro-batches of a step as one, if neither their size nor their number was given.

    A step of few tokens is shorter than the time that Python takes to launch it. The optimizer's step stays the same.
    """
    rows, times = config.batch_size, config.accumulation_steps
    given = config.given & {"batch_size", "accumulation_steps", "deepspeed_config", "cuda_graphs"}
    if not memory or given or not config.packing or config.from_weight != "none":
        return config
    names = ("hidden_size", "num_hidden_layers")
    changes = {name: getattr(config, name) for name in names if getattr(config, name)}
    shape = ModelConfig.preset(preset_name(config), **changes)
    element_bytes = 4 if precision.choose(config.dtype) == "float32" else 2
    token_bytes = activation_bytes(shape, element_bytes)
    most = int(ACTIVATIONS_SHARE * memory / token_bytes / (rows * config.max_seq_len))
    joined = max((n for n in range(1, times + 1) if times % n == 0 and n <= most), default=1)
    return (
        config if joined == 1 else config.settle(JOINED, batch_size=rows * joined, accumulation_steps=times // joined)
    )


def _machine(ranks: int) -> str:
    kind = "GPU" if torch.cuda.is_available() else "CPU"
    slow = kind == "CPU" and not precision.multiplies(torch.bfloat16)
    return f"{ranks} x {kind}" + (" without instructions for bfloat16" if slow else "")


def _find_weights(config: Options, option: str, before: str) -> Options:
    """Turn --from_weight, or an option like it, into a path; as in MiniMind, it may also name a run in --save_dir."""
    name = getattr(config, option)
    may_be_none = option == "from_weight"
    if name == "none" and may_be_none or Path(name).exists():
        return config
    run = Path(config.save_dir) / name
    if not run.exists():
        hint = (
            ""
            if option in config.given
            else f" This stage continues from trained weights: run `{command(before)}` first."
        )
        advice = " or a MiniMind .pth; none starts from nothing." if may_be_none else "."
        raise UserError(
            f"--{option} {name}: no such file or folder, and no run of that name in {config.save_dir}.{hint} "
            f"Give a folder with weights{advice}"
        )
    return config.settle(f"the run {name} in {config.save_dir}", **{option: str(run)})
