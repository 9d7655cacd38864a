"""What the scripts in `train/` share around the Trainer: where the model, the tokenizer and the data come from.

Purpose: each stage script says only what is its own.
Principle: weights that are given decide the model and its tokenizer; else a preset and the shipped tokenizer do. The
    tokenizer's fingerprint travels with the weights, and another tokenizer is refused by name.
Properties: user errors end in one sentence on rank 0, without a traceback.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from minimind_fast import IGNORE_INDEX, ops
from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.data.cache import Encoder, build_cache
from minimind_fast.data.chats import PROMPTS
from minimind_fast.data.packing import Batch, Batches, PackedBatches, PaddedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import use as use_attention
from minimind_fast.ops.documents import run
from minimind_fast.training import engine, losses
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.trainer import LossFunction, StepLoss, Trainer, TrainingStopped, finished
from minimind_fast.weights.checkpoint import load_pretrained, resolve_folder, tokenizer_fingerprint


def start(main: Callable[[], None]) -> None:
    """Run a stage's main function; a user's error becomes a sentence and exit code 1.

    Args:
        main: the script's function without arguments.
    """
    code = 0
    try:
        main()
    except (ValueError, TrainingStopped) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"\nError: {error}", file=sys.stderr, flush=True)
        code = 1
    except Exception:
        traceback.print_exc()
        code = 1
    engine.leave(code)
    if code:
        sys.exit(code)


def begin(config: TrainConfig) -> torch.device:
    """Become a rank, choose kernels and precision, seed every generator.

    Args:
        config: num_threads, kernels, attention, dtype (no longer "auto" afterwards), seed.

    Returns:
        This rank's device.
    """
    ops.use(config.kernels)
    use_attention(config.attention)
    config.dtype = precision.choose(config.dtype)
    device = engine.prepare(config.num_threads)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # noqa: NPY002
        seed(config.seed)
    return device


def use_sample(config: TrainConfig, name: str, suitable: dict[str, Any], val: str = "") -> None:
    """Without --data_path: train on a shipped sample, with the smallest model and what suits it where nothing was given.

    Args:
        config: changed in place.
        name: file of the samples.
        suitable: values of options.
        val: file of the samples for validation, if --val_data_path is not given either.
    """
    if config.data_path:
        return
    config.data_path = [str(samples.path(name))]
    if val and not config.val_data_path:
        config.val_data_path = [str(samples.path(val))]
    for option, value in {"preset": "tiny", **suitable}.items():
        if option not in config.given:
            setattr(config, option, value)


def find_weights(config: TrainConfig, before: str, option: str = "from_weight") -> None:
    """Make --from_weight (or an option like it) a path: it may also name a run in --save_dir, as MiniMind's does.

    Args:
        config: changed in place.
        before: the command that makes the weights which are the default.
        option: which one.

    Raises:
        ValueError: they are not there; the message says what to run first.
    """
    name = getattr(config, option)
    may_be_none = option == "from_weight"
    if name == "none" and may_be_none or Path(name).exists():
        return
    run = Path(config.save_dir) / name
    if not run.exists():
        hint = "" if option in config.given else f" This stage goes on from trained weights: run `{before}` first."
        advice = " or a MiniMind .pth; none starts from nothing." if may_be_none else "."
        raise ValueError(
            f"--{option} {name}: no such file or folder, and no run of that name in {config.save_dir}.{hint} "
            f"Give a folder with weights{advice}"
        )
    setattr(config, option, str(run))


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of --tokenizer_path, else that of the weights, else the shipped one.

    Args:
        config: tokenizer_path, from_weight.

    Raises:
        ValueError: it is not the one that the weights were trained with, or they have none with them and none is given.
    """
    weights = resolve_folder(config.from_weight) if config.from_weight != "none" else None
    has_own = weights is not None and (weights / "tokenizer.json").is_file()
    if weights is not None and weights.exists() and not has_own and not config.tokenizer_path:
        raise ValueError(
            f"{weights} has no tokenizer with it: give --tokenizer_path, the folder that it was trained with"
        )
    path = config.tokenizer_path or (str(weights) if has_own else str(samples.path("tokenizer")))
    tokenizer = Tokenizer.load(path)
    if weights is not None and weights.is_dir():
        trained_with = tokenizer_fingerprint(weights)
        if trained_with not in (None, tokenizer.fingerprint):
            raise ValueError(
                f"{weights} was trained with tokenizer {trained_with}, but {path} is {tokenizer.fingerprint}: the ids would "
                "mean other words. Leave --tokenizer_path out, or give the folder that it was trained with."
            )
    return tokenizer


def load_model(config: TrainConfig, tokenizer: Tokenizer) -> MiniMind:
    """The model of --from_weight, else a new one of --preset.

    Args:
        config: from_weight, preset, hidden_size, num_hidden_layers, use_moe, norm_topk_prob, dropout.
        tokenizer: its ids must fit the model.

    Raises:
        ValueError: the tokenizer has more ids than the model has rows.
    """
    if config.preset == "auto":
        config.preset = "minimind3" if torch.cuda.is_available() else "tiny"
    if config.from_weight != "none":
        path = Path(config.from_weight)
        if path.is_file() and "preset" not in config.given:
            raise ValueError(f"{path} does not say its model's shape: add --preset minimind2-small (or another)")
        shape = preset_config(config, tokenizer) if path.is_file() else None
        model = load_pretrained(path, config=shape, dtype=torch.float32)
        model.config.dropout = config.dropout
        if "preset" not in config.given:
            config.preset = path.name
    else:
        model = MiniMind(preset_config(config, tokenizer))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.config.vocab_size}: "
            "give the tokenizer that belongs to the weights"
        )
    return model


def preset_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The shape that --preset and its overrides describe.

    Args:
        config: preset, hidden_size, num_hidden_layers, use_moe, norm_topk_prob, dropout.
        tokenizer: gives the vocabulary's size and the special ids.
    """
    name = config.preset
    if config.use_moe and not name.endswith("-moe"):
        name = f"{name.removesuffix('-small')}-moe"
    changes: dict[str, Any] = {"vocab_size": max(tokenizer.vocab_size, 6400), "dropout": config.dropout}
    changes.update(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    changes["max_position_embeddings"] = max(32768, config.max_seq_len)
    for field in ("hidden_size", "num_hidden_layers"):
        if getattr(config, field):
            changes[field] = getattr(config, field)
    if config.norm_topk_prob is not None:
        changes["norm_topk_prob"] = config.norm_topk_prob
    return ModelConfig.preset(name, **changes)


def open_data(config: TrainConfig, paths: list[str], tokenizer: Tokenizer, encode: Encoder, training: bool) -> Batches:
    """Tokenised, cached and batched JSONL.

    Args:
        config: batch_size, max_seq_len, packing, truncate, seed, cache_dir, on_bad_line.
        paths: JSONL files.
        tokenizer: of the model.
        encode: rows to documents, the stage's own.
        training: shuffle.

    Raises:
        DataError: naming file and line.
    """
    rank, world_size = engine.world()
    log = print if rank == 0 else lambda _text: None
    cache = build_cache(
        paths, tokenizer, cache_dir=config.cache_dir or None, encode=encode, on_bad_line=config.on_bad_line, log=log
    )
    if not config.packing:
        return PaddedBatches(
            cache, batch_size=config.batch_size, max_seq_len=config.max_seq_len, rank=rank, world_size=world_size
        )
    batches = PackedBatches(
        cache,
        batch_tokens=config.batch_size * config.max_seq_len,
        max_seq_len=config.max_seq_len,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        truncate=config.truncate,
        shuffle=training,
    )
    if batches.num_without_targets:
        log(
            f"{batches.num_without_targets:,} of {batches.num_pieces + batches.num_without_targets:,} documents are left "
            f"out: no token to learn within --max_seq_len {config.max_seq_len}."
        )
    return batches


def one_pass(batches: Batches) -> Callable[[], Iterator[Batch]]:
    """A function that starts the same single pass each time, for validation.

    Args:
        batches: at its beginning.
    """
    begin_state = batches.state_dict()

    def again() -> Iterator[Batch]:
        batches.load_state_dict(begin_state)
        return iter(batches)

    return again


def next_token_loss(model: Any, batch: Batch) -> StepLoss:
    """Negative log-likelihood of the targets by their weights, and the experts' balancing loss.

    Args:
        model: the engine.
        batch: with weights where not every target counts the same.

    Returns:
        The sum; `nll` is the sum without weights, where there are any.
    """
    counted = batch.targets != IGNORE_INDEX
    # Padded rows: what follows the last target is padding, which must not count in the experts' balance.
    valid = counted.flip(-1).cumsum(-1).flip(-1) > 0 if batch.cu_seqlens is None else None
    out = run(
        model,
        batch,
        targets=batch.targets,
        valid=valid,
        # Known before the pass, which saves the head a matmul. What is left for backward to multiply by is then a power
        # of two, so that 16-bit gradients are not rounded a second time.
        grad_weights=(counted.float() if batch.weights is None else batch.weights) * math.frexp(batch.factor)[0],
    )
    metrics = {} if batch.weights is None else {"nll": losses.lm(out.logprobs.detach())}
    aux = out.aux_loss if model.module.config.use_moe else None
    return StepLoss(losses.lm(out.logprobs, batch.weights), aux, metrics)


def train(
    config: TrainConfig,
    name: str,
    make_encoder: Callable[[Tokenizer], Encoder],
    adapt: Callable[[MiniMind], Any] | None = None,
    save_weights: Callable[[MiniMind, Path], None] | None = None,
    make_loss: Callable[[MiniMind, Tokenizer, torch.device], LossFunction] | None = None,
) -> Trainer:
    """The whole of a stage that learns from the next token: tokenizer, model, data, training.

    Args:
        config: the options, from_weight found.
        name: of the stage.
        make_encoder: gives the stage's own way from rows to documents.
        adapt: changes the loaded model.
        save_weights: as for `Trainer`.
        make_loss: gives the stage's own loss; `next_token_loss` if None.

    Returns:
        The trainer, its run over.
    """
    device = begin(config)
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer)
    if adapt is not None:
        adapt(model)
    loss = next_token_loss if make_loss is None else make_loss(model, tokenizer, device)
    encode = make_encoder(tokenizer)
    data = open_data(config, config.data_path, tokenizer, encode, training=True)
    val_data = None
    if config.val_data_path:
        val_data = one_pass(open_data(config, config.val_data_path, tokenizer, encode, training=False))
    trainer = Trainer(config, name, model, tokenizer, data, loss, device, val_data, save_weights=save_weights)
    trainer.run()
    return trainer


def report(
    trainer: Trainer, seconds: float, prompts: list[str], then: str, chat: dict[str, Any] | None = PROMPTS[0]
) -> None:
    """The end of a stage, on rank 0: what the weights on disk say, where everything is, what to do now.

    Args:
        trainer: its run over.
        seconds: since the start.
        prompts: if --sample_prompts is not given.
        then: the last line.
        chat: as for `show_samples`.
    """
    config = trainer.config
    if trainer.rank == 0:
        show_samples(trainer.weights_folder, config.sample_prompts or prompts, config.sample_tokens, chat)
        print(finished(trainer, seconds))
        print(then)
        if shutil.which("minimind-fast") is None:
            print(f"(to have that command: source {os.path.relpath(sys.prefix)}/bin/activate)")


def show_samples(weights: Path, prompts: list[str], new_tokens: int, chat: dict[str, Any] | None = None) -> None:
    """Continue or answer prompts with the weights on disk, as anybody else would read them.

    Args:
        weights: a folder written by `save_pretrained`.
        prompts: texts to continue, or questions.
        new_tokens: at most, for each; 0 shows nothing.
        chat: variables of the chat template: the prompts are questions; None: they are continued.
    """
    if not new_tokens:
        return
    from minimind_fast.infer.generate import generate_batch  # only rank 0 at the end of a run needs it

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_pretrained(weights), Tokenizer.load(weights)
    model.to(device, precision.as_stored(model.lm_head.weight.dtype, device))
    if chat is None:
        ids = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
    else:
        asked = [[{"role": "user", "content": p}] for p in prompts]
        ids = [tokenizer.encode(tokenizer.render_chat(m, add_generation_prompt=True, **chat)) for m in asked]
    begin_s = time.perf_counter()
    outs = generate_batch(model, ids, max_new_tokens=new_tokens, temperature=0.7, top_p=0.9, seed=0)
    seconds = time.perf_counter() - begin_s
    print(
        f"\nThe model {'continues' if chat is None else 'answers'} ({sum(map(len, outs)):,} tokens in {seconds:.1f}s):"
    )
    for prompt, out in zip(prompts, outs, strict=True):
        text = tokenizer.decode(out, skip_special_tokens=True).strip().replace("\n", " ")
        print(f"  {prompt} → {text}")
