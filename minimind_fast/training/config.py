"""The options of a run: one frozen dataclass, from which the command line and the log are made.

Purpose: `TrainConfig` holds what every stage shares; a stage adds its own fields, and defaults with `with_defaults`.
Principle: a field is declared once, with its default and its help. A config remembers which options were given and why the
    others have their values, whether `parse` or Python made it: `why("preset")`.
Properties: imports no torch; nothing is assigned after construction: `settle` and `suggest` return a new config. Invalid
    values are errors that name the option.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, dataclass_transform

from minimind_fast.data.formats import NAMES as FORMATS
from minimind_fast.data.minimind.variety import Variety
from minimind_fast.errors import UserError
from minimind_fast.ops import NAMES
from minimind_fast.recipes import RECIPES


def option(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field with a help text for the command line.

    Args:
        default: default value (a list or dict is copied for each instance).
        text: help text, one sentence.
        extra: `choices=(...)`.
    """
    metadata = {"help": text, **extra}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options that every stage shares; those that mean the same as MiniMind's have MiniMind's names.

    Raises:
        ValueError: an invalid value; the message names the option.
    """

    recipe: str = option(
        "none", "a set of option values by name; options given beside it win", choices=("none", *RECIPES)
    )
    # model, data and output
    preset: str = option("auto", "model to train: a preset's name, or auto for one that suits the machine and the data")
    from_weight: str = option("none", "start from these weights: a folder or a MiniMind .pth; none starts from nothing")
    with_optimizer: bool = option(
        False, "with MiniMind's *_resume.pth as --from_weight: go on with its AdamW state and step"
    )
    data_path: list[str] = option([], "file(s), folders or globs to train on; the shipped sample if not given")
    val_data_path: list[str] = option([], "file(s), folders or globs to measure the validation loss on")
    tokenizer_path: str = option("", "folder with tokenizer.json; the weights' own or the shipped one if not given")
    save_dir: str = option("out", "where weights, checkpoints and logs go: SAVE_DIR/SAVE_WEIGHT/")
    save_weight: str = option("", "name of the run's folder; the stage's name if not given")
    hidden_size: int = option(0, "override the preset's width")
    num_hidden_layers: int = option(0, "override the preset's depth")
    use_moe: bool = option(False, "the preset's mixture-of-experts form")
    norm_topk_prob: bool | None = option(None, "normalise the routing weights (MiniMind3's top-1 form if set)")
    straight_through_router: bool = option(
        False, "with --norm_topk_prob and one expert a token: the router still learns from the language-model loss"
    )
    dropout: float = option(0.0, "dropout in attention and residual branches")
    # data
    batch_size: int = option(
        32, "rows in a micro-batch on each device; a packed batch holds batch_size * max_seq_len tokens"
    )
    max_seq_len: int = option(340, "longest document in tokens; longer ones are split")
    accumulation_steps: int = option(8, "micro-batches in an optimizer step")
    packing: bool = option(True, "pack documents without padding; --no_packing gives MiniMind's padded rows")
    truncate: bool = option(False, "truncate long documents instead of splitting them")
    data_format: str = option("auto", "format of the data's rows; auto recognises it", choices=("auto", *FORMATS))
    on_bad_line: str = option("error", "what to do with a line that cannot be used", choices=("error", "skip"))
    cache_dir: str = option("", "where the tokenised data is cached; beside the data if not given")
    # optimisation
    epochs: int = option(2, "passes over the data")
    max_steps: int = option(0, "stop after this many optimizer steps (0: by epochs)")
    max_minutes: float = option(
        0.0, "train for at most this many minutes; the learning rate falls with them (0: no limit)"
    )
    optimizer: str = option(
        "adamw",
        "adamw, or muon: equal steps in every direction of a hidden matrix, AdamW for the rest, at the same learning rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = option(5e-4, "peak learning rate")
    lr_schedule: str = option("minimind", "shape of the learning rate", choices=("minimind", "cosine", "constant"))
    warmup_steps: int = option(0, "optimizer steps of linear warmup")
    weight_decay: float = option(0.01, "weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.95, "AdamW beta2")
    grad_clip: float = option(1.0, "clip the gradient norm to this (0: no clipping)")
    loss: str = option("", "your own next-token loss: MODULE:FUNCTION or FILE.py:FUNCTION")
    seed: int = option(42, "seed of weights, data order and dropout")
    # execution
    dtype: str = option(
        "auto",
        "training precision; 16 bits have fp32 masters; auto: bfloat16, or without it float32 on a CPU, float16 on a GPU",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    kernels: str = option("auto", f"Triton kernels: auto, all, none, or some of {', '.join(NAMES)} joined by commas")
    attention: str = option("auto", "attention backend: auto, flash_attn, torch_varlen, sdpa or eager")
    zero_stage: int = option(
        -1, "DeepSpeed ZeRO stage 0-3 (-1: 1, or 0 in float32 on one rank)", choices=(-1, 0, 1, 2, 3)
    )
    offload: str = option("none", "keep optimizer state in host memory", choices=("none", "cpu"))
    deepspeed_config: str = option("", "your own DeepSpeed JSON; a clash with an option is an error")
    gradient_checkpointing: bool = option(False, "recompute each block in the backward pass to save memory")
    use_compile: bool = option(False, "torch.compile the model (first step takes longer)")
    cuda_graphs: bool = option(
        False, "replay forward and backward as CUDA graphs (GPU; for micro-batches below 20k tokens)"
    )
    deterministic: bool = option(
        False, "repeat a GPU run to the bit: sums in a fixed order, slower attention gradients (a CPU always repeats)"
    )
    num_threads: int = option(0, "CPU threads of this rank (0: cores shared among the ranks)")
    # logs and checkpoints
    log_interval: int = option(10, "optimizer steps between log lines")
    save_interval: int = option(0, "optimizer steps between checkpoints (0: about every ten minutes, and at the end)")
    keep_checkpoints: int = option(2, "checkpoints to keep")
    val_interval: int = option(0, "optimizer steps between validations (0: at each save and at the end)")
    from_resume: bool = option(False, "continue from the newest checkpoint of this run")
    max_nonfinite_steps: int = option(
        5, "stop after this many skipped steps in a row, whose loss or gradient was not finite"
    )
    use_wandb: bool = option(False, "also log to Weights & Biases; a resumed run continues its curve")
    use_swanlab: bool = option(False, "also log to SwanLab; a resumed run continues its curve")
    wandb_project: str = option("minimind_fast", "project in Weights & Biases")
    swanlab_project: str = option("minimind_fast", "project in SwanLab")
    wandb_run_name: str = option("", "the run's name there and in SwanLab; that of its folder if not given")
    sample_prompts: list[str] = option([], "prompts to continue at the end of the run")
    sample_tokens: int = option(60, "tokens to continue each of them by (0: no samples)")

    def __new__(cls, **values: Any) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(values))
        object.__setattr__(self, "_reasons", {})
        return self

    def __post_init__(self) -> None:
        self.check()

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that the user gave."""
        return self._given  # type: ignore[attr-defined]

    @property
    def reasons(self) -> Mapping[str, str]:
        """Option -> why its value is neither the default nor what was given."""
        return self._reasons  # type: ignore[attr-defined]

    def why(self, name: str) -> str:
        """Why an option has its value.

        Returns:
            "given", "default", or the reason passed to `settle` or `suggest`.
        """
        return self.reasons.get(name, "given" if name in self.given else "default")

    def settle(self, reason: str, **values: Any) -> Self:
        """A copy with these values.

        Args:
            reason: what `why` will answer.
            values: option=value.

        Raises:
            ValueError: an unknown option or an invalid value.
        """
        unknown = set(values) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise UserError(f"no such option: {', '.join(sorted(unknown))}")
        made = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(made, name, value)
        object.__setattr__(made, "_reasons", {**self.reasons, **dict.fromkeys(values, reason)})
        made.check()
        return made

    def suggest(self, reason: str, **values: Any) -> Self:
        """As `settle`, but only for options that were not given.

        Args:
            reason: what `why` will answer.
            values: option=value.
        """
        return self.settle(reason, **{name: value for name, value in values.items() if name not in self.given})

    def options(self) -> dict[str, Any]:
        """The options by name, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def check(self) -> None:
        """Reject invalid values, before anything is loaded.

        Raises:
            ValueError: names the option and its valid range.
        """
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            _check_value(f, hints[f.name], getattr(self, f.name))
        for name in ("batch_size", "max_seq_len", "accumulation_steps", "epochs", "log_interval", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in (
            "max_steps",
            "max_minutes",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "save_interval",
            "num_threads",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UserError(f"--learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise UserError(f"--beta1 and --beta2 must be in [0, 1), not {self.beta1} and {self.beta2}")


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(TrainConfig):
    """What stages that learn answers add: MiniMind's ways with a turn."""

    empty_think_ratio: float = option(1.0, "share of the training rows that keep the template's empty thoughts")
    whole_turn: bool = option(
        False, "also learn what MiniMind counts of a turn: its thought's opening, the newline after its end marker"
    )

    def check(self) -> None:
        """Reject invalid values."""
        super().check()
        for name in ("empty_think_ratio", "system_ratio"):
            if not 0 <= getattr(self, name, 0.0) <= 1:
                raise UserError(f"--{name} must be in [0, 1], not {getattr(self, name)}")

    @property
    def variety(self) -> Variety:
        """How the training rows differ from the file's; validation rows do not."""
        return Variety(getattr(self, "system_ratio", 0.0), self.empty_think_ratio, self.whole_turn, self.seed)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(AnswerConfig):
    """What stages that learn from whole chats add."""

    system_ratio: float = option(
        0.0, "share of the training chats without a system prompt that get one of MiniMind's ten"
    )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list of texts"}


def _check_value(f: dataclasses.Field, hint: Any, value: Any) -> None:
    """Reject a value of another type, a number that is none, and what is not among the choices."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    kind = typing.get_origin(kinds[0]) or kinds[0]
    accepted: Any = {str: (str, os.PathLike), float: (float, int), list: (list, tuple)}.get(kind, kind)
    if kind in _WORDS and (not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(f"--{f.name} must be {_WORDS[kind]}, not {value!r}")
    if isinstance(value, (list, tuple)) and not all(isinstance(item, (str, os.PathLike)) for item in value):
        raise UserError(f"--{f.name} must be {_WORDS[kind]}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{f.name} must be a finite number, not {value}")
    choices: tuple[Any, ...] = f.metadata.get("choices", ())
    if choices and value not in choices:
        raise UserError(f"--{f.name} must be one of {', '.join(map(str, choices))}, not {value!r}")


Config = TypeVar("Config")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def with_defaults(**defaults: Any) -> Callable[[type[Config]], type[Config]]:
    """Class decorator: make a dataclass of a stage's options, overriding inherited defaults.

    Args:
        defaults: option=value, for options of the base class.
    """

    def make(cls: type[Config]) -> type[Config]:
        inherited = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        annotations = dict(cls.__dict__.get("__annotations__", {}))
        for name, value in defaults.items():
            setattr(cls, name, option(value, **_as_option(inherited[name])))
            annotations[name] = inherited[name].type
        cls.__annotations__ = annotations
        return dataclass(frozen=True, kw_only=True)(cls)

    return make


def _as_option(f: dataclasses.Field) -> dict[str, Any]:
    extra = dict(f.metadata)
    return {"text": extra.pop("help"), **extra}
