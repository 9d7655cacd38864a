"""What a model is and how a run is made: two dataclasses, and the one place that turns a dataclass into a command line.

Purpose: `ModelConfig` describes every MiniMind of both generations; `TrainConfig` every run; `parse` reads options.
Principle: a field is declared once, with its default and its help; the command line, the checks and the log follow.
Properties: imports nothing of ours and no torch; unknown keys and impossible values are errors that say what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

# Keys that Transformers and MiniMind write and that change nothing here.
_IGNORED_KEYS = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "flash_attn", "use_flash_attn"),
    *("is_decoder", "add_cross_attention", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    *("is_encoder_decoder", "pruned_heads", "minimind_fast", "attention_bias", "mlp_bias", "pretraining_tp"),
}
# MiniMind2's and Hugging Face's names -> ours.
_ALIASES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "aux_loss_alpha": "router_aux_loss_coef",
    "seq_aux": "aux_loss_per_sequence",
}
YARN = {
    "type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def _round_up(x: float, to: int) -> int:
    return to * math.ceil(x / to)


@dataclass
class ModelConfig:
    """Shape and habits of a MiniMind; the names are Hugging Face's.

    `generation` is 2 or 3. It sets the defaults that the generations do not share (q/k norm, the cast order of RMSNorm,
    ffn width, eps, the form of the aux loss); each can still be set by itself. A None is filled in on construction.

    Raises:
        ValueError: a combination that cannot be, with what to change.
    """

    generation: int = 2
    vocab_size: int = 6400
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float | None = None
    rope_theta: float = 1e6
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    qk_norm: bool | None = None
    norm_cast_first: bool | None = None
    hidden_act: str = "silu"
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 0
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int | None = None
    num_shared_experts: int | None = None
    moe_intermediate_size: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    router_aux_loss_coef: float | None = None
    aux_loss_per_sequence: bool | None = None

    def __post_init__(self) -> None:
        if self.generation not in (2, 3):
            raise ValueError(f"generation must be 2 (MiniMind2) or 3 (MiniMind3), not {self.generation!r}")
        new = self.generation == 3
        self._fill("head_dim", self.hidden_size // max(self.num_attention_heads, 1))
        self._fill("intermediate_size", _round_up(self.hidden_size * (math.pi if new else 8 / 3), 64))
        self._fill("moe_intermediate_size", self.intermediate_size)
        self._fill("rms_norm_eps", 1e-6 if new else 1e-5)
        self._fill("qk_norm", new)
        self._fill("norm_cast_first", not new)
        self._fill("num_experts_per_tok", 1 if new else 2)
        self._fill("num_shared_experts", 0 if new else 1)
        self._fill("router_aux_loss_coef", 5e-4 if new else 0.1)
        self._fill("aux_loss_per_sequence", not new)
        self._check()

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            setattr(self, name, value)

    def _check(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
            *("head_dim", "intermediate_size", "moe_intermediate_size", "max_position_embeddings"),
            *("num_experts", "num_experts_per_tok"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:  # type: ignore[operator]
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}; change hidden_size or head_dim")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be 'silu', not {self.hidden_act!r}: MiniMind has no other")
        if self.scoring_func != "softmax":
            raise ValueError(f"scoring_func must be 'softmax', not {self.scoring_func!r}: MiniMind has no other")
        if self.use_moe and self.num_experts_per_tok > self.num_experts:  # type: ignore[operator]
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})"
            )
        kind = (self.rope_scaling or {}).get("type", (self.rope_scaling or {}).get("rope_type", "yarn"))
        if kind != "yarn":
            raise ValueError(f"rope_scaling type {kind!r} is not known; MiniMind has 'yarn' only")

    @property
    def router_gets_lm_gradient(self) -> bool:
        """False for normalised top-1 routing, whose weight is the constant 1."""
        return not (self.use_moe and self.num_experts_per_tok == 1 and self.norm_topk_prob)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named model of MiniMind's, for new training.

        Args:
            name: one of PRESETS.
            changes: fields to set differently.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> ModelConfig:
        """Read MiniMind's `config.json` of either generation.

        The generation is told by its keys: MiniMind2 writes `n_routed_experts`, MiniMind3 `num_experts`.

        Args:
            raw: the parsed JSON.
            where: named in errors, usually the file.

        Raises:
            ValueError: a key that is not known, or a value that cannot be.
        """
        raw = dict(raw)
        yarn = raw.pop("inference_rope_scaling", None)
        known = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        if "generation" not in raw:
            values["generation"] = (
                2 if "n_routed_experts" in raw else 3 if {"num_experts", "head_dim"} & set(raw) else 2
            )
        for key, value in raw.items():
            name = _ALIASES.get(key, key)
            if name in known:
                values[name] = value
            elif key not in _IGNORED_KEYS:
                raise ValueError(f"{where}: unknown field {key!r}; known are {', '.join(sorted(known))}")
        if yarn and not values.get("rope_scaling"):
            values["rope_scaling"] = dict(YARN)
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """MiniMind's own `config.json` of this generation: `from_dict` reads it back, and so does MiniMind."""
        out = dataclasses.asdict(self)
        generation = out.pop("generation")
        if generation == 2:
            for theirs, ours in _ALIASES.items():
                out[theirs] = out.pop(ours)
        else:
            out["inference_rope_scaling"] = self.rope_scaling is not None
        out.update(model_type="minimind", architectures=["MiniMindForCausalLM"], flash_attn=True)
        return out


PRESETS: dict[str, dict[str, Any]] = {
    "minimind2-small": dict(generation=2, hidden_size=512, num_hidden_layers=8),
    "minimind2": dict(generation=2, hidden_size=768, num_hidden_layers=16),
    "minimind2-moe": dict(generation=2, hidden_size=640, num_hidden_layers=8, use_moe=True),
    "minimind3": dict(generation=3, hidden_size=768, num_hidden_layers=8, num_key_value_heads=4),
    # norm_topk_prob False: with one expert a token, a normalised weight is the constant 1 and the router is never taught.
    "minimind3-moe": dict(
        generation=3, hidden_size=768, num_hidden_layers=8, num_key_value_heads=4, use_moe=True, norm_topk_prob=False
    ),
    # Not a MiniMind: small enough to learn the sample corpus on a laptop while you watch.
    "tiny": dict(generation=3, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
}


def option(default: Any, text: str, **extra: Any) -> Any:
    """A dataclass field with a help text for the command line.

    Args:
        default: the default value (a list or dict is copied for each instance).
        text: help, one sentence.
        extra: `choices=(...)`.
    """
    metadata = {"help": text, **extra}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """The options that every stage shares; names are MiniMind's where they mean the same."""

    # what
    preset: str = option("auto", "model to train: a preset's name, or auto for one that suits the machine and the data")
    from_weight: str = option("none", "start from these weights: a folder or a MiniMind .pth; none starts from nothing")
    data_path: list[str] = option([], "JSONL file(s) to train on; the shipped sample if not given")
    val_data_path: list[str] = option([], "JSONL file(s) to measure the validation loss on")
    tokenizer_path: str = option("", "folder with tokenizer.json; the weights' own or the shipped one if not given")
    save_dir: str = option("out", "where weights, checkpoints and logs go: SAVE_DIR/SAVE_WEIGHT/")
    save_weight: str = option("", "name of the run's folder; the stage's name if not given")
    hidden_size: int = option(0, "override the preset's width")
    num_hidden_layers: int = option(0, "override the preset's depth")
    use_moe: bool = option(False, "the preset's mixture-of-experts form")
    norm_topk_prob: bool | None = option(None, "normalise the routing weights (MiniMind3's top-1 form if set)")
    dropout: float = option(0.0, "dropout in attention and residual branches")
    # data
    batch_size: int = option(
        32, "rows in a micro-batch on each device; a packed batch holds batch_size * max_seq_len tokens"
    )
    max_seq_len: int = option(340, "longest document in tokens; longer ones are cut into pieces")
    accumulation_steps: int = option(8, "micro-batches in an optimizer step")
    packing: bool = option(True, "pack documents without padding; --no_packing gives MiniMind's padded rows")
    truncate: bool = option(False, "cut long documents off instead of into pieces")
    on_bad_line: str = option("error", "what to do with a line that cannot be used", choices=("error", "skip"))
    cache_dir: str = option("", "where the tokenised data is cached; beside the data if not given")
    # optimisation
    epochs: int = option(2, "passes over the data")
    max_steps: int = option(0, "stop after this many optimizer steps (0: by epochs)")
    max_minutes: float = option(
        0.0, "train for at most this many minutes; the learning rate falls with them (0: no limit)"
    )
    learning_rate: float = option(5e-4, "peak learning rate")
    lr_schedule: str = option("minimind", "shape of the learning rate", choices=("minimind", "cosine", "constant"))
    warmup_steps: int = option(0, "optimizer steps of linear warmup")
    weight_decay: float = option(0.01, "AdamW weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW beta1")
    beta2: float = option(0.95, "AdamW beta2")
    grad_clip: float = option(1.0, "clip the gradient norm to this (0: no clipping)")
    seed: int = option(42, "seed of weights, data order and dropout")
    # how
    dtype: str = option(
        "auto",
        "training precision; 16 bits have fp32 masters; auto: bfloat16, or without it float32 on a CPU, float16 on a GPU",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    kernels: str = option("auto", "Triton kernels: auto, all, none or names such as rms_norm,swiglu")
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
    num_threads: int = option(0, "CPU threads of this rank (0: cores shared among the ranks)")
    # watching and saving
    log_interval: int = option(10, "optimizer steps between log lines")
    save_interval: int = option(0, "optimizer steps between checkpoints (0: about every ten minutes, and at the end)")
    keep_checkpoints: int = option(2, "checkpoints to keep")
    val_interval: int = option(0, "optimizer steps between validations (0: at each save and at the end)")
    from_resume: bool = option(False, "go on from the newest checkpoint of this run")
    max_nonfinite_steps: int = option(
        5, "stop after this many skipped steps in a row with a loss or gradient that is not finite"
    )
    use_wandb: bool = option(False, "also log to Weights & Biases")
    use_swanlab: bool = option(False, "also log to SwanLab")
    sample_prompts: list[str] = option([], "prompts to continue at the end of the run")
    sample_tokens: int = option(60, "tokens to continue each of them by (0: no samples)")
    # names of the options that were typed, filled in by `parse`
    given: set[str] = field(default_factory=set, repr=False)

    def options(self) -> dict[str, Any]:
        """The options by name, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "help" in f.metadata}

    def check(self) -> None:
        """Refuse values that cannot work, before anything is loaded.

        Raises:
            ValueError: naming the option and what it may be.
        """
        for name in ("batch_size", "max_seq_len", "accumulation_steps", "epochs", "log_interval", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
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
                raise ValueError(f"--{name} must not be negative, but is {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"--learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ValueError(f"--beta1 and --beta2 must be in [0, 1), not {self.beta1} and {self.beta2}")


Config = TypeVar("Config")


def with_defaults(**defaults: Any) -> Callable[[type[Config]], type[Config]]:
    """A class decorator: a dataclass of a stage's options whose inherited options have other defaults.

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
        return dataclass(cls)

    return make


def _as_option(f: dataclasses.Field) -> dict[str, Any]:
    extra = dict(f.metadata)
    return {"text": extra.pop("help"), **extra}


def _to_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected 1/0, true/false, yes/no or on/off, not {text!r}")


def parse(cls: type[Config], argv: list[str] | None = None, description: str = "") -> Config:
    """Build a config from the command line.

    A bool takes `--flag`, `--flag 1`, `--flag false` or `--no_flag`; a list takes one or more values. `--config FILE`
    reads defaults from JSON; options on the command line win. The launcher's `--local_rank` is accepted and unused.

    Args:
        cls: a dataclass whose fields are made with `option`.
        argv: arguments without the program's name; the process's own if None.
        description: shown by --help.

    Returns:
        An instance of cls.
    """
    parser = argparse.ArgumentParser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="JSON file with defaults for these options")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if "help" in f.metadata}  # type: ignore[arg-type]
    for name, f in fields.items():
        _add(parser, name, hints[name], f)
    typed = vars(parser.parse_args(argv))
    typed.pop("local_rank", None)
    file = typed.pop("config", None)
    values = {**_read_defaults(parser, file, set(fields)), **typed} if file else typed
    try:
        config = cls(**values)
        if isinstance(config, TrainConfig):
            config.given = set(values)
            config.check()
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return config


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, f: dataclasses.Field) -> None:
    default = f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
    shown = "none" if default in (None, "", []) else default
    text = f"{f.metadata['help']} (default: {shown})".replace("%", "%%")
    inner = [a for a in typing.get_args(hint) if a is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    kind = inner[0]
    if kind is bool:
        parser.add_argument(f"--{name}", nargs="?", const=True, type=_to_bool, help=text)
        parser.add_argument(f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is list:
        parser.add_argument(f"--{name}", nargs="+", type=typing.get_args(kind)[0], help=text)
    else:
        parser.add_argument(f"--{name}", type=kind, choices=f.metadata.get("choices"), help=text)


def _read_defaults(parser: argparse.ArgumentParser, file: str, known: set[str]) -> dict[str, Any]:
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"--config {file}: {error}")
    if not isinstance(raw, dict) or set(raw) - known:
        unknown = sorted(set(raw) - known) if isinstance(raw, dict) else raw
        parser.error(f"--config {file}: unknown options {unknown}")
    return raw
