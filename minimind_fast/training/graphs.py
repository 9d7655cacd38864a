"""Forward and backward of a micro-batch as CUDA graphs: two launches in the place of some thousand.

Purpose: `install(model)`, which is what --cuda_graphs does. A micro-batch of some thousand tokens (SFT, DPO, GRPO) keeps a
    large GPU busy for a shorter time than Python needs to say what it is to do.
Principle: a graph replays the same kernels on the same addresses. So a pack is copied into buffers of one of few sizes,
    filled up by ignored documents, and its bounds to a power of two by empty ones. The forward pass (body and head, up to
    the log-probabilities) is one graph, its backward another; between and after them runs what always runs: the stage's
    loss, and autograd's hand-over of the gradients to DeepSpeed, for which the pair is one ordinary function.
Properties: a shape is captured when it comes a second time, for at most MAX_GRAPHS shapes; others, and passes without
    gradients, run as without graphs. All graphs share one memory pool, as only one micro-batch is under way at a time: a
    second forward pass before the first one's backward is an error, never a wrong gradient. Beside the pool each graph keeps
    its gradients, in the weights' dtype. Filler changes no result; other sizes may choose other matmul kernels, so that
    results agree with those of a plain run to rounding.

Source: torch.cuda.make_graphed_callables (PyTorch) for capturing forward and backward apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.infer.decode import can_capture
from minimind_fast.model import MiniMind, ModelOutput, MoE, Teacher
from minimind_fast.ops.documents import Documents, round_up
from minimind_fast.training.config import TrainConfig

MAX_GRAPHS = 16
LEAST_DOCUMENTS = 32  # bounds of fewer documents have this length too
LEAST_LONGEST = 256  # attention is told a longest document of at least this


def capture(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record what a function does on the GPU.

    Args:
        work: has run before, on this device; reads and writes tensors that stay where they are.
        pool: memory for what it allocates.

    Returns:
        A function that does it again.
    """
    graph = torch.cuda.CUDAGraph()
    # thread_local: the loader's thread may pin memory meanwhile, which a capture forbids to all threads by default.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay


def _power_of_two(size: int, least: int) -> int:
    return max(1 << (size - 1).bit_length(), least)


class _Call:
    """One call of the model: its tensors without filler, and everything else that it depends on."""

    def __init__(self, model: MiniMind, args: dict[str, Any], documents: Documents) -> None:
        for name in ("cu_seqlens", "max_seqlen", "documents"):
            args.pop(name)
        teacher: Teacher | None = args.pop("teacher")
        self.tensors = {name: args.pop(name) for name in ("input_ids", "targets", "valid", "grad_weights")}
        self.tokens = tokens = documents.tokens
        self.size = round_up(tokens)
        if model.config.use_moe and self.tensors["valid"] is None:  # filler must not count in the experts' balance
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
        """What a graph is made for."""
        there = tuple(name for name, x in self.tensors.items() if x is not None)
        teacher = None if self.teacher is None else (self.teacher.weight.data_ptr(), *self.teacher[2:])
        backend = self.documents.backend
        return self.size, self.count, self.longest, backend, there, teacher, tuple(self.options.items())

    def filled(self) -> tuple[Documents, dict[str, Tensor]]:
        """The same at the size of its graphs."""
        documents = self.documents.padded(self.size, self.count + 1, self.longest)
        tensors = {n: x for n, x in self.tensors.items() if x is not None}
        values = {"targets": IGNORE_INDEX}
        filled = {name: documents.fill(x, values.get(name, 0)) for name, x in tensors.items()}
        return documents, {**filled, "input_ids": documents.fill_ids(tensors["input_ids"])}


class _Plain(nn.Module):
    """A model by its own forward, whatever stands for it now."""

    def __init__(self, model: MiniMind) -> None:
        super().__init__()
        self.model, self.own = model, model.forward

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.own(*args, **kwargs)


class _Graphs:
    """Forward and backward of one shape.

    Args:
        model: on a GPU.
        call: the first of its kind.
        pool: shared by all graphs.
    """

    def __init__(self, model: _Plain, call: _Call, pool: Any) -> None:
        self.model = model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.addresses = [p.data_ptr() for p in self.parameters.values()]
        self.documents, filled = call.filled()
        self.inputs = {name: x.clone() for name, x in filled.items()}  # without filler they are the caller's own
        tensors = dict(self.inputs)
        teacher = call.teacher and call.teacher._replace(hidden=tensors.pop("teacher"))
        # To the graph filler is as real as the rest: what is cut off differs from call to call.
        documents = self.documents._replace(tokens=call.size, filler=0)
        self.arguments = {**call.options, **tensors, "teacher": teacher, "documents": documents}
        self._make(pool)

    def _make(self, pool: Any) -> None:
        """Run outside the graphs first, which compiles kernels and lets libraries choose theirs; then capture."""
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
        # New leaves over the same memory, as autograd ties a leaf to the stream on which it was first used.
        self.leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        self.result = functional_call(self.model, self.leaves, kwargs=self.arguments)
        self.outputs = [x for x in self.result if x is not None]

    def _backward(self) -> None:
        live = [x for x in self.outputs if x.requires_grad]
        self.grads = torch.autograd.grad(live, tuple(self.leaves.values()), self.grads_out, allow_unused=True)

    def in_place(self) -> bool:
        """Whether the weights are where they were."""
        return self.addresses == [p.data_ptr() for p in self.parameters.values()]

    def load(self, call: _Call) -> None:
        """Copy a call's tensors in, filled up."""
        documents, tensors = call.filled()
        self.documents.cu_seqlens.copy_(documents.cu_seqlens)
        self.documents.positions.copy_(documents.positions)
        for name, x in self.inputs.items():
            x.copy_(tensors[name])


class _Replay(torch.autograd.Function):
    """A pair of graphs as a function of the weights; gives the outputs without filler, as copies."""

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
                "--cuda_graphs: another micro-batch went forward before this one went backward; do without the option"
            )
        graphs, tokens = ctx.graphs, ctx.tokens
        asked = [g for g, x in zip(grads, graphs.outputs, strict=True) if x.requires_grad]
        for static, grad in zip(graphs.grads_out, asked, strict=True):
            (static[:tokens] if static.dim() else static).copy_(grad)  # filler's stay 0
        graphs.backward()
        there = [g for g in graphs.grads if g is not None]
        # Copies, as the next replay writes where these lie; in one launch, where autograd would take one for each.
        copies = iter(torch._foreach_mul(there, 1.0))
        return None, None, None, *(None if g is None else next(copies) for g in graphs.grads)


class Replays:
    """Stands for a model's forward: replays where a graph fits, else runs the model's own.

    Args:
        model: whose forward it stands for.
    """

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
        """Whether it is a micro-batch of training, packed, its longest document known on the host."""
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
        if known is not None:  # its filler, if any, came in with the tensors: here it is as real as the rest
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
    """Let a model's training passes be replayed from CUDA graphs from now on.

    Args:
        model: on a GPU, its weights where they will stay.
    """
    model.forward = Replays(model)  # type: ignore[method-assign]


def check(config: TrainConfig, model: MiniMind, device: torch.device, attention: str) -> None:
    """Refuse what cannot be captured.

    Args:
        config: the run's options, zero_stage decided.
        model: that will be trained.
        device: of this rank.
        attention: the backend that will run.

    Raises:
        ValueError: naming the option that stands in the way.
    """
    reasons = {
        "a GPU": device.type == "cuda",
        "--zero_stage 0, 1 or 2: stage 3 moves the weights": config.zero_stage < 3,
        "packed data: leave --no_packing out": config.packing,
        "a step without --use_compile": not config.use_compile,
        "a step without --gradient_checkpointing": not config.gradient_checkpointing,
        f"--attention flash_attn or torch_varlen: {attention} asks the host for the documents": attention != "sdpa",
        "the moe_route and moe_mlp kernels: their reference asks the host for the experts' loads": can_capture(model),
    }
    for need, met in reasons.items():
        if not met:
            raise ValueError(f"--cuda_graphs needs {need}")
