"""Forward and backward of a micro-batch as CUDA graphs: two launches instead of a few thousand.

Purpose: `install(model)`, for --cuda_graphs. With a few thousand tokens a micro-batch (SFT, DPO, GRPO), a large GPU works
    faster than Python can launch kernels.
Principle: a graph replays the same kernels at the same addresses. So a pack is copied into buffers of one of a few sizes,
    padded with ignored documents, and its bounds with empty ones to a power of two. The forward pass (body and head, up to
    the log-probabilities) is one graph, its backward another. The stage's loss and autograd's hand-over of gradients to
    DeepSpeed run as usual: to autograd the pair is one ordinary function.
Properties: a shape is captured when it occurs a second time, for at most MAX_GRAPHS shapes; other shapes, and passes
    without gradients, run eagerly. All graphs share one memory pool, because only one micro-batch is in flight at a time: a
    second forward before the first one's backward is an error, never a wrong gradient. Outside the pool each graph keeps
    its gradients, in the weights' dtype. Filler changes no result; other sizes may select other matmul kernels, so results
    agree with an eager run's up to rounding.

Source: torch.cuda.make_graphed_callables (PyTorch) for capturing forward and backward separately.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.errors import UserError
from minimind_fast.infer.decode import can_capture
from minimind_fast.model import MiniMind, ModelOutput, MoE, Teacher
from minimind_fast.ops.documents import Documents, round_up
from minimind_fast.training.config import TrainConfig

MAX_GRAPHS = 16
LEAST_DOCUMENTS = 32  # bounds of fewer documents are padded to this length
LEAST_LONGEST = 256  # smallest max_seqlen passed to attention, in tokens


def capture(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record a function's work on the GPU.

    Args:
        work: has run before on this device; the tensors that it reads and writes keep their addresses.
        pool: memory pool for its allocations.

    Returns:
        A function that replays it.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: by default a capture forbids all threads to pin memory, also the loader's.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _power_of_two(size: int, least: int) -> int:
    return max(1 << (size - 1).bit_length(), least)


class _Call:
    """One call of the model: its tensors without filler, and everything else that the call depends on."""

    def __init__(self, model: MiniMind, args: dict[str, Any], documents: Documents) -> None:
        for name in ("cu_seqlens", "max_seqlen", "documents"):
            args.pop(name)
        teacher: Teacher | None = args.pop("teacher")
        self.tensors = {name: args.pop(name) for name in ("input_ids", "targets", "valid", "grad_weights")}
        self.tokens = tokens = documents.tokens
        self.size = round_up(tokens)
        if model.config.use_moe and self.tensors["valid"] is None:  # the balancing loss must ignore filler
            self.tensors["valid"] = torch.ones(tokens, dtype=torch.bool, device=documents.positions.device)
        self.tensors["teacher"] = None if teacher is None else teacher.hidden
        self.teacher = teacher
        limit = model.config.max_position_embeddings
        self.longest = min(_power_of_two(documents.max_seqlen, LEAST_LONGEST), limit)
        count = documents.cu_seqlens.numel() - 1 + -(-(self.size - tokens) // self.longest)
        self.count = _power_of_two(count, LEAST_DOCUMENTS)
        self.documents = documents
        self.options = args  # numbers and flags

    def key(self) -> Hashable:
        """Calls with equal keys share a graph."""
        there = tuple(name for name, x in self.tensors.items() if x is not None)
        teacher = None if self.teacher is None else (self.teacher.weight.data_ptr(), *self.teacher[2:])
        backend = self.documents.backend
        return self.size, self.count, self.longest, backend, there, teacher, tuple(self.options.items())

    def filled(self) -> tuple[Documents, dict[str, Tensor]]:
        """The documents and tensors, padded to the graph's size."""
        documents = self.documents.padded(self.size, self.count + 1, self.longest)
        tensors = {n: x for n, x in self.tensors.items() if x is not None}
        values = {"targets": IGNORE_INDEX}
        filled = {name: documents.fill(x, values.get(name, 0)) for name, x in tensors.items()}
        return documents, {**filled, "input_ids": documents.fill_ids(tensors["input_ids"])}


class _Plain(nn.Module):
    """A model called through its original forward, even after `install`."""

    def __init__(self, model: MiniMind) -> None:
        super().__init__()
        self.model, self.own = model, model.forward

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.own(*args, **kwargs)


class _Graphs:
    """The forward and backward graphs of one shape.

    Args:
        model: on a GPU.
        call: the call to capture.
        pool: memory pool shared by all graphs.
    """

    def __init__(self, model: _Plain, call: _Call, pool: Any) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.addresses = [p.data_ptr() for p in self.parameters.values()]
        self.documents, filled = call.filled()
        self.inputs = {name: x.clone() for name, x in filled.items()}  # clone: without filler they are the caller's
        tensors = dict(self.inputs)
        teacher = call.teacher and call.teacher._replace(hidden=tensors.pop("teacher"))
        # The graph treats filler as real tokens: how much to cut off differs from call to call.
        documents = self.documents._replace(tokens=call.size, filler=0)
        self.arguments = {**call.options, **tensors, "teacher": teacher, "documents": documents}
        self._make(pool)

    def _make(self, pool: Any) -> None:
        """Warm up outside the graphs (compiles kernels, lets libraries choose theirs), then capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
                self.grads_out = [torch.zeros_like(x) for x in self.outputs if x.requires_grad]
                self._backward()
        torch.cuda.current_stream().wait_stream(side)
        self.forward = capture(self._forward, pool)
        self.backward = capture(self._backward, pool)
        self.loads = [(m, m.last_counts, m.last_scores) for m in self.model.modules() if isinstance(m, MoE)]

    @torch.enable_grad()
    def _forward(self) -> None:
        # New leaves over the same memory: autograd ties a leaf to the stream on which it was first used.
        self.leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        self.result = functional_call(self.model, self.leaves, kwargs=self.arguments)
        self.outputs = [x for x in self.result if x is not None]

    def _backward(self) -> None:
        live = [x for x in self.outputs if x.requires_grad]
        self.grads = torch.autograd.grad(live, tuple(self.leaves.values()), self.grads_out, allow_unused=True)

    def in_place(self) -> bool:
        """Whether the weights are still at the captured addresses."""
        return self.addresses == [p.data_ptr() for p in self.parameters.values()]

    def load(self, call: _Call) -> None:
        """Copy a call's tensors, with filler, into the static buffers."""
        documents, tensors = call.filled()
        self.documents.cu_seqlens.copy_(documents.cu_seqlens)
        self.documents.positions.copy_(documents.positions)
        for name, x in self.inputs.items():
            x.copy_(tensors[name])


class _Replay(torch.autograd.Function):
    """A pair of graphs as a function of the weights; returns copies of the outputs, without filler."""

    @staticmethod
    def forward(ctx, graphs, tokens, replays, *parameters):
        graphs.forward()
        for layer, counts, scores in graphs.loads:
            layer.last_counts, layer.last_scores = counts, scores
        ctx.graphs, ctx.tokens, ctx.replays, ctx.turn = graphs, tokens, replays, replays.turn
        copies = tuple((x[:tokens] if x.dim() else x).detach().clone() for x in graphs.outputs)
        ctx.mark_non_differentiable(*(c for c, x in zip(copies, graphs.outputs, strict=True) if not x.requires_grad))
        return copies

    @staticmethod
    def backward(ctx, *grads):
        if ctx.turn != ctx.replays.turn:
            raise RuntimeError(
                "--cuda_graphs: another micro-batch ran forward before this one's backward; leave the option out"
            )
        graphs, tokens = ctx.graphs, ctx.tokens
        asked = [g for g, x in zip(grads, graphs.outputs, strict=True) if x.requires_grad]
        for static, grad in zip(graphs.grads_out, asked, strict=True):
            (static[:tokens] if static.dim() else static).copy_(grad)  # filler's gradients stay 0
        graphs.backward()
        there = [g for g in graphs.grads if g is not None]
        # Copies, because the next replay overwrites these; in one launch, where autograd would need one each.
        copies = iter(torch._foreach_mul(there, 1.0))
        return None, None, None, *(None if g is None else next(copies) for g in graphs.grads)


class Replays:
    """Replaces a model's forward: replays a graph if one fits, else calls the original."""

    def __init__(self, model: MiniMind) -> None:
        self.model, self.plain = model, _Plain(model)
        self.signature = inspect.signature(model.forward)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: set[Hashable] = set()
        self.graphs: dict[Hashable, _Graphs] = {}
        self.turn = 0

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if not self._fit(bound.arguments):
            return self.plain(*args, **kwargs)
        call = _Call(self.model, bound.arguments, self._documents(bound.arguments))
        graphs = self._find(call)
        if graphs is None:
            return self.plain(*args, **kwargs)
        graphs.load(call)
        self.turn += 1
        copies = iter(_Replay.apply(graphs, call.tokens, self, *graphs.parameters.values()))
        return ModelOutput(*(None if x is None else next(copies) for x in graphs.result))

    def _fit(self, a: dict[str, Any]) -> bool:
        """Whether this is a packed training micro-batch whose longest document the host knows."""
        if not self.model.training or not torch.is_grad_enabled():
            return False
        known: Documents | None = a["documents"]
        if known is None and (a["cu_seqlens"] is None or a["max_seqlen"] is None):
            return False
        if a["targets"] is None or a["input_ids"].dim() != 1 or a["input_ids"].numel() == 0:
            return False
        longest = a["max_seqlen"] if known is None else known.max_seqlen
        return longest <= self.model.config.max_position_embeddings

    def _documents(self, a: dict[str, Any]) -> Documents:
        known: Documents | None = a["documents"]
        if known is not None:  # any filler arrived with the tensors: treat it as real tokens
            return known._replace(tokens=known.tokens + known.filler, filler=0)
        dtype = self.model.model.embed_tokens.weight.dtype
        return Documents.of(a["cu_seqlens"], a["input_ids"].numel(), dtype, a["max_seqlen"])

    def _find(self, call: _Call) -> _Graphs | None:
        key = call.key()
        found = self.graphs.get(key)
        if found is not None and found.in_place():
            return found
        if found is None and (key not in self.seen or len(self.graphs) >= MAX_GRAPHS):
            self.seen.add(key)
            return None
        # Capture before dropping the stale graph of this key: the pool dies with its last graph.
        self.graphs[key] = _Graphs(self.plain, call, self.pool)
        return self.graphs[key]


def install(model: MiniMind) -> None:
    """Replay a model's training passes from CUDA graphs from now on.

    Args:
        model: on a GPU, with weights that no longer move.
    """
    model.forward = Replays(model)  # type: ignore[method-assign]


def check(config: TrainConfig, model: MiniMind, device: torch.device, attention: str) -> None:
    """Reject what cannot be captured.

    Args:
        config: the run's options, with zero_stage settled.
        model: the model to train.
        device: this rank's.
        attention: the resolved backend.

    Raises:
        ValueError: names the option in the way.
    """
    reasons = {
        "a GPU": device.type == "cuda",
        "--zero_stage 0, 1 or 2: stage 3 moves the weights": config.zero_stage < 3,
        "packed data: leave --no_packing out": config.packing,
        "a step without --use_compile": not config.use_compile,
        "a step without --gradient_checkpointing": not config.gradient_checkpointing,
        f"--attention flash_attn or torch_varlen: {attention} reads the documents on the host": attention != "sdpa",
        "the moe_route and moe_mlp kernels: their reference reads the experts' loads on the host": can_capture(model),
    }
    for need, met in reasons.items():
        if not met:
            raise UserError(f"--cuda_graphs needs {need}")
