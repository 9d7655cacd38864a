"""From a stage's script to a running Trainer: all parts are built here, in order of dependency.

Purpose: `begin` resolves the options and makes the process a rank; `train` does the rest for stages that predict the next
    token; other stages call the parts themselves.
Principle: given weights determine the model and its tokenizer; otherwise a preset and the shipped tokenizer do. Weights
    carry their tokenizer's fingerprint, and a different tokenizer is rejected.
Properties: a script runs its own checkout's package. User errors end in one sentence on rank 0, without a traceback.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from minimind_fast import ops, plugins
from minimind_fast.config import IGNORE_INDEX, ends_at
from minimind_fast.data import samples
from minimind_fast.data.batches import Batch, Batches
from minimind_fast.data.cache import Encoder, build_cache
from minimind_fast.data.chats import PROMPTS
from minimind_fast.data.packing import PackedBatches, PaddedBatches, Prefetcher
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import chosen, leave_out_of_compilation
from minimind_fast.ops.attention import use as use_attention
from minimind_fast.ops.documents import run as run_packed
from minimind_fast.training import graphs, losses, ranks, resume, words
from minimind_fast.training.config import AnswerConfig, TrainConfig
from minimind_fast.training.losses import LossFunction, StepLoss
from minimind_fast.training.ranks import start  # noqa: F401  what a script ends with: setup.start(main)
from minimind_fast.training.run import Run, Stage, resolve
from minimind_fast.training.shape import check_shape_options, preset_config, pth_shape
from minimind_fast.training.trainer import Hooks, Trainer
from minimind_fast.training.zero.engine import Engine
from minimind_fast.weights.checkpoint import load_pretrained, resolve_folder
from minimind_fast.weights.files import check_free
from minimind_fast.weights.open import check_match, check_size, tokenizer_of

Options = TypeVar("Options", bound=TrainConfig)


def begin(options: Options, stage: Stage) -> Run[Options]:
    """Become a rank, resolve the options, choose kernels, seed every generator.

    Args:
        options: as given.
        stage: the script's.

    Raises:
        ValueError: options that cannot work together.
    """
    ranks.prepare(options.num_threads)
    run = resolve(options, stage, ranks.world()[1], ranks.least_memory())
    if run.config.deterministic:
        precision.repeat_sums()
    ops.use(run.config.kernels)
    use_attention(run.config.attention)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # noqa: NPY002
        seed(run.config.seed)
    ranks.first(lambda: check_free(run.folder))  # now, not after an hour of tokenising
    return run


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of --tokenizer_path, else that of the weights, else the shipped one.

    Args:
        config: read for tokenizer_path and from_weight.

    Raises:
        ValueError: the weights were trained with another tokenizer, or have none and none is given.
    """
    weights = resolve_folder(config.from_weight) if config.from_weight != "none" else None
    tokenizer = tokenizer_of(weights, config.tokenizer_path, "--tokenizer_path", samples.path("tokenizer"))
    if weights is not None:
        check_match(weights, tokenizer, "leave --tokenizer_path out, or give the folder that they were trained with")
    return tokenizer


def load_model(config: TrainConfig, tokenizer: Tokenizer) -> MiniMind:
    """The model of --from_weight, else a new one of --preset.

    Args:
        config: read for from_weight, preset, hidden_size, num_hidden_layers, use_moe, norm_topk_prob and dropout.
        tokenizer: its ids must fit the model.

    Raises:
        ValueError: the tokenizer has more ids than the model has rows.
    """
    if config.from_weight != "none":
        path = resolve_folder(config.from_weight)
        told: dict[str, Any] = {"dropout": config.dropout}
        if "straight_through_router" in config.given:  # these two matter in training only
            told["straight_through_router"] = config.straight_through_router
        shape: dict[str, Any] = pth_shape(config, tokenizer) if path.is_file() else {"told": told}
        model = load_pretrained(path, **shape, dtype=torch.float32)
        check_shape_options(config, model.config)
    else:
        model = MiniMind(preset_config(config, tokenizer))
    check_size(tokenizer, model.config.vocab_size)
    model.config = ends_at(model.config, tokenizer.eos_id)
    model.config.check_context(config.max_seq_len, "--max_seq_len")
    return model


def open_data(config: TrainConfig, paths: list[str], tokenizer: Tokenizer, encode: Encoder, training: bool) -> Batches:
    """Tokenise, cache and batch files of rows.

    Args:
        config: read for batch_size, max_seq_len, packing, truncate, seed, cache_dir, data_format and on_bad_line.
        paths: files, folders or globs.
        tokenizer: the model's.
        encode: the stage's function from rows to documents.
        training: whether to shuffle.

    Raises:
        DataError: names file and line.
    """
    rank, world_size = ranks.world()
    cache = build_cache(
        paths,
        tokenizer,
        cache_dir=config.cache_dir or None,
        encode=encode,
        on_bad_line=config.on_bad_line,
        data_format=config.data_format,
        log=ranks.say,
    )
    if not config.packing:
        rows = {"batch_size": config.batch_size, "max_seq_len": config.max_seq_len}
        return PaddedBatches(cache, **rows, rank=rank, world_size=world_size, seed=config.seed if training else None)
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
        ranks.say(
            f"{batches.num_without_targets:,} of {batches.num_pieces + batches.num_without_targets:,} documents are left "
            f"out: no token to learn within --max_seq_len {config.max_seq_len}."
        )
    return batches


def one_pass(batches: Batches) -> Callable[[], Iterator[Batch]]:
    """A function that starts the same single pass each time, for validation.

    Args:
        batches: not yet iterated.
    """
    begin_state = batches.state_dict()

    def again() -> Iterator[Batch]:
        batches.load_state_dict(begin_state)
        return iter(batches)

    return again


def next_token_loss(model: Any, batch: Batch) -> StepLoss:
    """Weighted negative log-likelihood of the targets, and the experts' balancing loss.

    Args:
        model: the engine.
        batch: has weights if targets count differently.

    Returns:
        The sum; with weights, `nll` is the unweighted sum.
    """
    counted = batch.targets != IGNORE_INDEX
    # Padded rows: everything after the last target is padding, which the balancing loss must ignore.
    valid = counted.flip(-1).cumsum(-1).flip(-1) > 0 if batch.cu_seqlens is None else None
    out = run_packed(
        model,
        batch,
        targets=batch.targets,
        valid=valid,
        # Passing the weights in advance saves the head a matmul. The factor left for backward is a power of two, so
        # 16-bit gradients are not rounded twice.
        grad_weights=(counted.float() if batch.weights is None else batch.weights) * math.frexp(batch.factor)[0],
    )
    metrics = {} if batch.weights is None else {"nll": losses.lm(out.logprobs.detach())}
    aux = out.aux_loss if model.config.use_moe else None
    return StepLoss(losses.lm(out.logprobs, batch.weights), aux, metrics)


def own_loss(config: TrainConfig) -> LossFunction:
    """The loss of --loss, or else `next_token_loss`.

    Raises:
        ValueError: --loss names no function.
    """
    if not config.loss:
        return next_token_loss
    function = plugins.load("--loss", config.loss)

    def loss(model: Any, batch: Batch) -> StepLoss:
        # No grad_weights: what the function does with the log-probabilities is unknown in advance.
        out = run_packed(model, batch, targets=batch.targets)
        total = plugins.call(f"--loss {config.loss}", function, out, batch)
        aux = out.aux_loss if model.config.use_moe else None
        return total if isinstance(total, StepLoss) else StepLoss(total, aux, {"nll": losses.lm(out.logprobs.detach())})

    return loss


def make_engine(run: Run, model: MiniMind, device: torch.device, universal: bool = False) -> Engine:
    """The model on its device under DeepSpeed, compiled or captured if requested.

    Args:
        run: the resolved run.
        model: on the CPU.
        device: this rank's.
        universal: as for `Engine`.

    Raises:
        ValueError: a kernel, an attention backend or CUDA graphs that cannot run here.
    """
    config = run.config
    model.model.gradient_checkpointing = config.gradient_checkpointing
    model.to(device).train()
    ops.describe(device.type)  # a requested kernel that cannot run fails here, before the first step
    backend, _ = chosen(device.type, run.dtype)
    if config.cuda_graphs:
        graphs.check(config, model, device, backend)
    if config.use_compile:
        leave_out_of_compilation(backend)
        model.model.compile(dynamic=True)
    engine = Engine(model, config, run.deepspeed, universal)
    if config.cuda_graphs:
        graphs.install(model)
    return engine


def make_trainer(
    run: Run,
    model: MiniMind,
    tokenizer: Tokenizer,
    data: Batches | Callable[[Engine], Batches],
    loss: LossFunction,
    hooks: Hooks | None = None,
) -> Trainer:
    """A Trainer at the run's beginning, or where --from_resume continues.

    Args:
        run: the resolved run.
        model: on the CPU; every rank gets rank 0's weights.
        tokenizer: saved with the weights.
        data: this rank's training batches, or a function that makes them from the engine.
        loss: (engine, batch) -> StepLoss.
        hooks: where the stage differs.

    Raises:
        ValueError: the checkpoint does not match the run.
    """
    device, frozen = ranks.device(), resume.frozen_fingerprint(model)
    trained = resume.shapes(model)
    checkpoint = resume.find(run, frozen, trained)
    theirs = resume.minimind_s(run, model) if checkpoint is None else None
    engine = make_engine(run, model, device, checkpoint is not None and resume.needs_universal(checkpoint, run.ranks))
    if callable(data):
        data = data(engine)
    elif device.type == "cuda":  # on a CPU a loader thread would compete for the model's cores
        data = Prefetcher(data)
    torch.manual_seed(run.config.seed + ranks.world()[0])  # dropout differs between ranks
    begins = resume.Start() if checkpoint is None else resume.load(engine, checkpoint, data)
    if theirs is not None:
        engine.set_moments(theirs.moments, theirs.step)
        data.load_state_dict({**data.state_dict(), "epoch": theirs.epoch})
        begins = resume.Start(theirs.step)
    return Trainer(run, engine, tokenizer, data, loss, device, hooks, begins, frozen, trained)


def train(
    run: Run,
    make_encoder: Callable[..., Encoder],
    adapt: Callable[[MiniMind], Any] | None = None,
    save_weights: Callable[[MiniMind, Path], None] | None = None,
    make_loss: Callable[[MiniMind, Tokenizer], LossFunction] | None = None,
) -> Trainer:
    """Run a whole stage that predicts the next token: tokenizer, model, data, training.

    Args:
        run: the resolved run.
        make_encoder: makes the stage's function from rows to documents, from the tokenizer and, with an AnswerConfig,
            `variety=`.
        adapt: modifies the loaded model.
        save_weights: as for `Hooks`.
        make_loss: makes the stage's own loss; None: `own_loss`.

    Returns:
        The trainer, after its run.
    """
    config = run.config
    tokenizer = load_tokenizer(config)
    model = load_model(config, tokenizer)
    if adapt is not None:
        adapt(model)
    loss = own_loss(config) if make_loss is None else make_loss(model, tokenizer)
    varied = {"variety": config.variety} if isinstance(config, AnswerConfig) else {}
    data = open_data(config, config.data_path, tokenizer, make_encoder(tokenizer, **varied), training=True)
    val_data = None
    if config.val_data_path:
        val_data = one_pass(open_data(config, config.val_data_path, tokenizer, make_encoder(tokenizer), training=False))
    trainer = make_trainer(run, model, tokenizer, data, loss, Hooks(val_data, save_weights=save_weights))
    trainer.run()
    return trainer


def report(
    trainer: Trainer,
    prompts: list[str],
    then: str,
    chat: dict[str, Any] | None = PROMPTS[0],
    weights: Path | None = None,
) -> None:
    """End a stage on rank 0: show samples from the saved weights, where everything is, and what to do next.

    Args:
        trainer: after its run.
        prompts: used if --sample_prompts is not given.
        then: the last line to print.
        chat: as for `show_samples`.
        weights: folder of the whole model, if not the usual one.
    """
    run = trainer.plan
    if trainer.rank == 0:
        folder = weights or run.weights
        if (folder / "config.json").is_file():
            show_samples(folder, run.config.sample_prompts or prompts, run.config.sample_tokens, chat)
        seconds = time.perf_counter() - run.began
        print(words.finished(run, trainer.step, trainer.useful_tokens, seconds))
        print(then)
        if shutil.which("minimind-fast") is None:
            print(f"(to have that command: source {os.path.relpath(sys.prefix)}/bin/activate)")


def show_samples(weights: Path, prompts: list[str], new_tokens: int, chat: dict[str, Any] | None = None) -> None:
    """Continue or answer prompts with the weights on disk, loaded as a user would.

    Args:
        weights: a folder written by `save_pretrained`.
        prompts: texts to continue, or questions.
        new_tokens: at most this many for each; 0 shows nothing.
        chat: the chat template's variables, for questions; None: continue the prompts.
    """
    if not new_tokens:
        return
    from minimind_fast.infer.generate import generate_batch  # needed only by rank 0 at the end of a run

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
