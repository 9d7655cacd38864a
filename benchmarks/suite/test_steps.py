"""The optimizer step and the whole training step: MiniMind's eager loop, the same on Liger's ops, and our engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.peers import eager_minimind, liger_ops
from benchmarks.suite.harness import ALL_DOCUMENTS, Suite, document_lengths, offsets, others_may_fail
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.data.packing import Batch
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.registry import Work
from minimind_fast.proof.models import SameExperts
from minimind_fast.proof.roofline import OPTIMIZER_BYTES, shape_of, step_work
from minimind_fast.proof.rule import compare
from minimind_fast.training import graphs, ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

FLAVOURS = {"eager": {"foreach": False}, "foreach": {"foreach": True}, "ours": {"fused": True}}
CHECKED_TOKENS = 4096  # for the float32 truth, which stores full logits
SMALL_STEP = 6144  # tokens per fine-tuning step, where launch overhead matters
SMALL = {"num_hidden_layers": 2}  # on a CPU


def _optimizer_rows(suite: Suite) -> list[tuple[Any, ...]]:
    return [(p, name) for p in suite.presets(("minimind3",), ("minimind2-small",)) for name in FLAVOURS]


def _step_rows(suite: Suite) -> list[tuple[Any, ...]]:
    kinds = ALL_DOCUMENTS if suite.everything else ("512",) if suite.on_gpu else ("128",)
    names = ("eager", "ours", "liger", "compile") if suite.on_gpu else ("eager", "ours")
    rows = [
        (preset, tokens, kind, name)
        for preset in suite.presets(("minimind3", "minimind3-moe", "minimind2-small"), ("minimind2-small",))
        for tokens in suite.tokens(53191, 512)
        for kind in kinds
        for name in names
    ]
    if suite.on_gpu:
        small = [(rows[0][0], SMALL_STEP, kinds[0], name) for name in ("eager", "ours", "graphs")]
        rows += [row for row in small if row not in rows]
    return sorted(rows, key=lambda row: row[3] == "compile")  # stable sort; compilation is slowest


ROWS = {"test_optimizer_step": _optimizer_rows, "test_model_step": _step_rows}


def _config(suite: Suite, preset: str) -> ModelConfig:
    return ModelConfig.preset(preset, **({} if suite.on_gpu else SMALL))


def test_optimizer_step(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, name = case
    shapes = [p.shape for p in shape_of(_config(suite, preset)).parameters()]

    def make(flavour: str, dtype: torch.dtype = torch.float32) -> tuple[torch.optim.AdamW, list[torch.Tensor]]:
        own = torch.Generator(suite.device).manual_seed(0)
        parameters = []
        for shape in shapes:
            p = torch.randn(shape, generator=own, device=suite.device).mul_(0.02).to(dtype).requires_grad_()
            p.grad = torch.randn(shape, generator=own, device=suite.device).mul_(1e-3).to(dtype)
            parameters.append(p)
        return torch.optim.AdamW(
            parameters, lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01, **FLAVOURS[flavour]
        ), parameters

    results = {}
    for key, flavour, dtype in (
        ("mine", name, torch.float32),
        ("eager", "eager", torch.float32),
        ("truth", "eager", torch.float64),
    ):
        optimizer, parameters = make(flavour, dtype)
        optimizer.step()
        results[key] = torch.cat([p.detach().flatten() for p in parameters])
        del optimizer, parameters
    errors = suite.hold_to({"weights": compare(results["mine"], results["eager"], results["truth"])}, name == "ours")
    del results
    optimizer, parameters = make(name)
    suite.row(
        benchmark,
        f"optimizer step {preset}",
        name,
        [optimizer.step],
        Work(OPTIMIZER_BYTES * sum(p.numel() for p in parameters)),
        capture=False,  # AdamW counts its steps on the host
        kind="optimizer step",
        op="optimizer",
        preset=preset,
        dtype="float32",
        peak_bytes=suite.peak_bytes(optimizer.step),
        **errors,
    )


class _Eager:
    """MiniMind's loop: autocast, full logits, clipping, AdamW; for MoE, our model without kernels."""

    def __init__(self, model: MiniMind, suite: Suite, compiled: bool) -> None:
        self.moe = model.config.use_moe
        self.model: Any = model if self.moe else eager_minimind.EagerMiniMind.from_ours(model).to(suite.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, foreach=None if suite.on_gpu else False)
        self.call: Callable = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.suite = suite

    def _run(self, batch: Batch, rows: tuple[int, int]) -> tuple[torch.Tensor, Any]:
        """(log-probabilities, aux loss)."""
        with torch.autocast(self.suite.device, torch.bfloat16, enabled=self.suite.on_gpu), ops.use("none"):
            if self.moe:
                out = self.call(batch.input_ids, batch.targets, batch.cu_seqlens, batch.max_seqlen)
                return out.logprobs.float(), out.aux_loss
            logits = self.call(batch.input_ids.view(rows)).float()
        return logits.log_softmax(-1).gather(-1, batch.targets.view(*rows, 1)).flatten(), 0.0

    def logprobs(self, batch: Batch, rows: tuple[int, int]) -> torch.Tensor:
        return self._run(batch, rows)[0]

    def step(self, batch: Batch, rows: tuple[int, int]) -> None:
        logprobs, aux = self._run(batch, rows)
        (aux - logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Liger(_Eager):
    """The same loop on Liger's ops, whose head computes the mean loss without logits."""

    def __init__(self, model: MiniMind, suite: Suite) -> None:
        super().__init__(model, suite, compiled=False)
        self.model = self.call = liger_ops.LigerMiniMind.from_ours(model).to(suite.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)

    def step(self, batch: Batch, rows: tuple[int, int]) -> None:
        with torch.autocast(self.suite.device, torch.bfloat16):
            loss = self.model.loss(batch.input_ids.view(rows), batch.targets.view(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Ours:
    """The Trainer's step: DeepSpeed's engine, the stage's own loss."""

    def __init__(self, model: MiniMind, suite: Suite) -> None:
        self.config = TrainConfig(batch_size=1, accumulation_steps=1, dtype=suite.dtype_name)
        self.engine = Engine(model, self.config, deepspeed_config(self.config, 1))

    def logprobs(self, batch: Batch, rows: tuple[int, int]) -> torch.Tensor:
        return self.engine.module(batch.input_ids, batch.targets, batch.cu_seqlens, batch.max_seqlen).logprobs.float()

    def step(self, batch: Batch, rows: tuple[int, int]) -> None:
        out = setup.next_token_loss(self.engine, batch)
        loss = out.total / batch.num_targets
        self.engine.backward(loss if out.aux is None else loss + out.aux)
        self.engine.step(1e-5)


class _Replayed(_Ours):
    """The same with --cuda_graphs."""

    def __init__(self, model: MiniMind, suite: Suite) -> None:
        super().__init__(model, suite)
        graphs.install(model)

    def logprobs(self, batch: Batch, rows: tuple[int, int]) -> torch.Tensor:
        how = (batch.input_ids, batch.targets, batch.cu_seqlens, batch.max_seqlen)
        with torch.enable_grad():
            self.engine.module(*how)  # a shape is captured at its second use
            return self.engine.module(*how).logprobs.detach().float()


def _batch(suite: Suite, config: ModelConfig, kind: str, tokens: int, rows_only: bool, seed: int) -> Batch:
    """Random documents; with rows_only, as many of one length as fit."""
    lengths = document_lengths(kind, tokens if not rows_only else tokens // int(kind) * int(kind))
    own = torch.Generator().manual_seed(seed)
    ids, targets = (torch.randint(3, config.vocab_size, (sum(lengths),), generator=own) for _ in "it")
    return Batch(ids, targets, offsets(lengths, "cpu"), max(lengths), ids.numel(), len(lengths)).to(suite.device)


def test_model_step(case: tuple[Any, ...], suite: Suite, benchmark: Any) -> None:
    preset, tokens, kind, name = case
    config = _config(suite, preset)
    if name == "compile" and config.use_moe:
        pytest.skip("a mixture's reference reads counts on the host: there is nothing whole to compile")
    if kind == "mix" and name != "ours" and not config.use_moe:
        pytest.skip("MiniMind's loop takes rows of one length: it would pad, and padding is not its arithmetic's fault")
    if name == "liger":
        if config.use_moe:
            pytest.skip("Liger's ops are in the dense baseline; of a mixture see its layer")
        if isinstance(reason := liger_ops.or_reason(liger_ops.mean_loss), str):
            pytest.skip(reason)
    dense_rows = kind != "mix" and not config.use_moe
    torch.manual_seed(0)
    ranks.prepare(torch.get_num_threads())
    model = MiniMind(config).to(suite.device)
    batch = _batch(suite, config, kind, tokens, dense_rows, seed=0)
    length = int(kind) if dense_rows else batch.input_ids.numel()
    small = _batch(suite, config, kind, min(tokens, CHECKED_TOKENS), dense_rows, seed=1)
    rows, small_rows = ((b.input_ids.numel() // length, length) if dense_rows else (1, -1) for b in (batch, small))
    how = (small.input_ids, small.targets, small.cu_seqlens, small.max_seqlen)
    experts = SameExperts()  # rounding decides near ties
    with torch.no_grad(), precision.exact_matmuls(), experts:
        half = MiniMind(config).to(suite.device)
        half.load_state_dict(model.state_dict())
        with ops.use("none"):
            eager = half.to(suite.dtype)(*how).logprobs.float()
            del half
            experts.replay()
            wide = torch.float64 if suite.dtype == torch.float32 else torch.float32
            truth = model.to(wide)(*how).logprobs.double()
            model.float()
    kinds = {"ours": _Ours, "graphs": _Replayed, "liger": _Liger}
    loop = kinds[name](model, suite) if name in kinds else _Eager(model, suite, name == "compile")
    experts.replay()
    with others_may_fail(name != "liger"):
        with torch.no_grad(), experts:
            mine = loop.logprobs(small, small_rows)
        if name == "liger":
            loop.step(small, small_rows)
    factor = 1.25 + 3 * truth.numel() ** -0.5
    errors = suite.hold_to({"logprobs": compare(mine, eager, truth, factor)}, name in ("ours", "graphs"))
    del truth, eager, mine
    if name == "graphs":
        loop.step(batch, rows)
        loop.step(batch, rows)
    parts = step_work(config, batch.input_ids.numel(), batch.input_ids.numel() / batch.num_docs)
    parameters = shape_of(config).num_parameters()
    rates = suite.roofs["copy_bytes_per_s"], suite.roofs["matmul_flop_per_s"]
    floor_s = sum(w.seconds(*rates) for w in parts.values()) + OPTIMIZER_BYTES * parameters / rates[0]
    suite.row(
        benchmark,
        f"model step {preset} T={tokens} documents of {kind}",
        name,
        [lambda: loop.step(batch, rows)],
        Work(sum(w.bytes for w in parts.values()), sum(w.flops for w in parts.values())),
        capture=False,
        floor_s=floor_s,
        kind="model step",
        op="model step",
        preset=preset if suite.on_gpu else f"{preset}, {config.num_hidden_layers} layers",
        tokens=tokens,
        documents=kind,
        counted_tokens=batch.num_targets,
        dtype=suite.dtype_name if suite.on_gpu or name == "ours" else "float32",
        peak_bytes=suite.peak_bytes(lambda: loop.step(batch, rows)),
        **errors,
    )
