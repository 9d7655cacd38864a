"""The shape of a model: one dataclass for every MiniMind of both generations, and the presets.

Purpose: `ModelConfig.preset("minimind3")` for new training, `ModelConfig.from_dict` for a `config.json`.
Principle: names are Hugging Face's; where the generations differ, the default depends on the generation.
Properties: imports no torch; unknown keys and invalid values are errors that say what to do.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from minimind_fast.errors import UserError

NO_TOKEN = -1  # a special id that the model does not have, null in files
IGNORE_INDEX = -100  # a target that does not count, as in PyTorch and Transformers

# Keys that Transformers and MiniMind write but that have no effect here.
_IGNORED_KEYS = {
    *("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "flash_attn", "use_flash_attn"),
    *("is_decoder", "add_cross_attention", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    "max_seq_len",  # MiniMind's converter writes it; the model has max_position_embeddings
    *("is_encoder_decoder", "pruned_heads", "minimind_fast", "attention_bias", "mlp_bias", "pretraining_tp"),
}
# MiniMind2's and Hugging Face's names -> ours.
_ALIASES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "aux_loss_alpha": "router_aux_loss_coef",
    "seq_aux": "aux_loss_per_sequence",
}
MOST_LAYERS = 10_000  # more is a typing error; building them would take hours before anything is said
YARN = {
    "type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def token_ids(raw: dict[str, Any]) -> dict[str, Any]:
    """The special ids in a JSON config, null or several as they may be, as fields of a ModelConfig.

    Args:
        raw: the parsed JSON; ids that it does not name are left out.
    """
    out: dict[str, Any] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in raw:
            value = raw[name]
            several = [i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int)]
            out[name] = several[0] if several else NO_TOKEN
            if name == "eos_token_id":
                out["more_eos_token_ids"] = tuple(several[1:])
    if out.get("pad_token_id") == NO_TOKEN:  # shorter rows need some padding id
        out["pad_token_id"] = max(out.get("eos_token_id", 0), 0)
    return out


def ids_on_disk(config: ModelConfig) -> dict[str, Any]:
    """The special ids as JSON holds them: null for none, a list for several ends."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    out: dict[str, Any] = {name: i if (i := getattr(config, name)) >= 0 else None for name in names}
    if config.more_eos_token_ids:
        out["eos_token_id"] = [config.eos_token_id, *config.more_eos_token_ids]
    return out


def ends_at(config: ModelConfig, token: int) -> ModelConfig:
    """The config with one more id that ends an answer: a tokenizer's end may be another than the model's."""
    if token in config.stop_ids or token < 0:
        return config
    if config.eos_token_id < 0:
        return dataclasses.replace(config, eos_token_id=token)
    return dataclasses.replace(config, more_eos_token_ids=(*config.more_eos_token_ids, token))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _round_up(x: float, to: int) -> int:
    return to * math.ceil(x / to)


@dataclass
class ModelConfig:
    """Shape and options of a MiniMind; the names are Hugging Face's.

    `generation` (2 or 3) sets the defaults in which they differ: q/k norm, RMSNorm's cast order, ffn width, eps, the form
    of the aux loss. Each can still be set separately. A None is filled in on construction.

    A special id of NO_TOKEN (null in files) is one that the model does not have. `stop_ids` are all that end an answer:
    `eos_token_id` and `more_eos_token_ids`; files hold them as one list.

    `straight_through_router` matters in training only, and only where one normalised expert is chosen: the weight stays 1,
    its gradient is that of the score's logarithm, so the router learns from the language-model loss.

    Raises:
        ValueError: an invalid combination, with what to change.
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
    more_eos_token_ids: tuple[int, ...] = ()
    use_moe: bool = False
    num_experts: int = 4
    num_experts_per_tok: int | None = None
    num_shared_experts: int | None = None
    moe_intermediate_size: int | None = None
    scoring_func: str = "softmax"
    norm_topk_prob: bool = True
    straight_through_router: bool = False
    router_aux_loss_coef: float | None = None
    aux_loss_per_sequence: bool | None = None

    def __post_init__(self) -> None:
        if self.generation not in (2, 3):
            raise UserError(f"generation must be 2 (MiniMind2) or 3 (MiniMind3), not {self.generation!r}")
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
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.num_hidden_layers > MOST_LAYERS:
            raise UserError(f"num_hidden_layers must be at most {MOST_LAYERS:,}, not {self.num_hidden_layers:,}")
        for name, least in (("rms_norm_eps", 0.0), ("rope_theta", 0.0), ("router_aux_loss_coef", -1e-300)):
            value = getattr(self, name)
            if not _is_finite(value) or value <= least:
                wanted = "not negative" if least else "above 0"
                raise UserError(f"{name} must be a finite number {wanted}, not {value!r}")
        for name, value in (self.rope_scaling or {}).items():
            if isinstance(value, (int, float)) and not (_is_finite(value) and value > 0) and value is not False:
                raise UserError(f"rope_scaling: {name} must be a finite number above 0, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:  # type: ignore[operator]
            raise UserError(f"head_dim must be even for RoPE, not {self.head_dim}; change hidden_size or head_dim")
        if not _is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.hidden_act != "silu":
            raise UserError(f"hidden_act must be 'silu', not {self.hidden_act!r}: MiniMind has no other")
        if self.scoring_func != "softmax":
            raise UserError(f"scoring_func must be 'softmax', not {self.scoring_func!r}: MiniMind has no other")
        if self.use_moe and self.num_experts_per_tok > self.num_experts:  # type: ignore[operator]
            raise UserError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds num_experts ({self.num_experts})"
            )
        kind = (self.rope_scaling or {}).get("type", (self.rope_scaling or {}).get("rope_type", "yarn"))
        if kind not in ("yarn", "llama3"):
            raise UserError(f"rope_scaling type {kind!r} is not known; known are 'yarn', MiniMind's, and 'llama3'")

    def check_context(self, length: int, option: str) -> None:
        """Refuse texts that are longer than the context, before the first of them comes.

        Args:
            length: positions of the longest text.
            option: what it was given by.

        Raises:
            UserError: the context is shorter.
        """
        if length > self.max_position_embeddings:
            raise UserError(
                f"{option} {length} is longer than the model's context of {self.max_position_embeddings} tokens "
                "(max_position_embeddings): lower it"
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        return frozenset(i for i in (self.eos_token_id, *self.more_eos_token_ids) if i >= 0)

    @property
    def normalizes_weights(self) -> bool:
        """Whether the chosen scores are divided by their sum. MiniMind2 does so only where several are chosen."""
        return self.norm_topk_prob and (self.generation == 3 or self.num_experts_per_tok != 1)

    @property
    def router_gets_lm_gradient(self) -> bool:
        """False for normalised top-1 routing, whose weight is the constant 1, unless its gradient is passed through."""
        constant = self.use_moe and self.num_experts_per_tok == 1 and self.normalizes_weights
        return not constant or self.straight_through_router

    @property
    def balance_factor(self) -> float:
        """What the balancing loss is multiplied by: MiniMind3 and Qwen3-MoE count a token once per chosen expert."""
        assert self.router_aux_loss_coef is not None and self.num_experts_per_tok is not None
        return self.router_aux_loss_coef * (self.num_experts_per_tok if self.generation == 3 else 1)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named model, for new training.

        Args:
            name: one of PRESETS.
            changes: fields to override.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config") -> ModelConfig:
        """Read MiniMind's `config.json` of either generation.

        The keys tell the generation: MiniMind2 writes `n_routed_experts`, MiniMind3 `num_experts`.

        Args:
            raw: the parsed JSON.
            where: the source to name in errors, usually the file.

        Raises:
            ValueError: an unknown key or an invalid value.
        """
        raw = {**raw, **token_ids(raw)}
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
                raise UserError(f"{where}: unknown field {key!r}; known are {', '.join(sorted(known))}")
        if yarn and not values.get("rope_scaling"):
            values["rope_scaling"] = dict(YARN)
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """This generation's `config.json`, which MiniMind and `from_dict` can read."""
        out = dataclasses.asdict(self)
        generation = out.pop("generation")
        out.update(ids_on_disk(self))
        del out["more_eos_token_ids"]
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
    # norm_topk_prob False: with one expert a token, a normalised weight is always 1 and the router would not learn.
    "minimind3-moe": dict(
        generation=3, hidden_size=768, num_hidden_layers=8, num_key_value_heads=4, use_moe=True, norm_topk_prob=False
    ),
    # Not one of MiniMind's: small enough to learn the sample corpus on a laptop while you watch.
    "tiny": dict(generation=3, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
}
