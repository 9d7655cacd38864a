"""Other MoE implementations with the signature of our `moe_mlp`.

Purpose:    the experts' MLP as a loop, on `torch._grouped_mm`, and by Liger, ScatterMoE, SonicMoE and MegaBlocks where
            installed and runnable, all with the same check and the same clock as ours.
Principle:  a peer gets our routing and our stacked weights and makes anything else inside the call. The matmuls are its
            own; the SwiGLU between them too where it has one, else PyTorch's.
Properties: nothing is installed or copied here. `find` returns a function or the reason why there is none.

Shapes: T tokens, D hidden, F ffn, E experts, S = T * top_k slots; gate_up (E, 2F, D), gate first; down (E, D, F).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import liger_ops
from minimind_fast.ops.routing import Routing

Experts = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
# In row order: built-in ones, then those to install; the slow compilation comes last.
NAMES = ("loop", "grouped_mm", "liger", "scattermoe", "sonicmoe", "megablocks", "grouped_mm compiled")


def loop(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """MiniMind's loop: a mask over the slots for each expert, with a host wait each; (T, D) -> (T, D).

    Source: the behaviour of MiniMind (jingyaogong/minimind, Apache-2.0), restated.
    """
    out = torch.zeros_like(x)
    for expert, (w1, w2) in enumerate(zip(gate_up, down, strict=True)):
        tokens, choices = (routing.experts == expert).nonzero(as_tuple=True)
        if tokens.numel():
            rows = x[tokens]
            gate, up = (F.linear(rows, half) for half in w1.chunk(2))
            y = F.linear(F.silu(gate) * up, w2) * routing.weights[tokens, choices].unsqueeze(-1)
            out = out.index_add(0, tokens, y.to(out.dtype))
    return out


def grouped_mm(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """PyTorch's grouped matmul over gathered rows, and PyTorch's operators around it, without host waits.

    Source: torch.nn.functional.grouped_mm's documentation: offsets are the ends of the groups, int32.
    """
    top_k = routing.experts.shape[1]
    ends = routing.counts.cumsum(0, dtype=torch.int32)
    rows = x.index_select(0, routing.order.long() // top_k)
    gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = out.index_select(0, routing.inverse.long()).view(-1, top_k, x.shape[1])
    return (back * routing.weights.unsqueeze(-1).to(back.dtype)).sum(1)


def _scattermoe() -> Experts:
    linear = importlib.import_module("scattermoe.parallel_experts").parallel_linear

    def experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        order = routing.order.long()
        plan = (routing.experts.flatten().long()[order], order, routing.counts.cumsum(0))
        top_k = routing.experts.shape[1]
        gate, up = linear(x, gate_up.transpose(1, 2), top_k, *plan, grouped_out=True).chunk(2, -1)
        gates = routing.weights.to(x.dtype).contiguous()  # ScatterMoE assumes it
        return linear(F.silu(gate) * up, down.transpose(1, 2), 1, *plan, gates=gates, grouped_in=True)

    return experts


def _sonicmoe() -> Experts:
    functional = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU

    def experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        count, wide, hidden = gate_up.shape
        # It wants gate and up rows interleaved and experts last: a copy of the weights, 1 to 2% of a layer's bytes.
        w1 = gate_up.view(count, 2, wide // 2, hidden).transpose(1, 2).reshape(count, wide, hidden).permute(1, 2, 0)
        top_k = routing.experts.shape[1]
        tokens = torch.arange(x.shape[0], device=x.device, dtype=torch.int32).repeat_interleave(top_k)
        stream = torch.cuda.current_stream().cuda_stream
        how = (w1, None, down.permute(1, 2, 0), None, count, stream, swiglu)
        slots = routing.weights.flatten().contiguous(), tokens, routing.experts.flatten().contiguous()
        return functional.moe_general_routing_inputs(x, *slots, *how)[0]

    return experts


def _megablocks() -> Experts:
    ops = importlib.import_module("megablocks.ops")
    gmm = importlib.import_module("grouped_gemm").ops.gmm

    def experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
        top_k = routing.experts.shape[1]
        bins, sizes = routing.counts.cumsum(0, dtype=torch.int32), routing.counts.cpu().long()
        sorted_experts = routing.experts.flatten()[routing.order.long()]
        rows = ops.gather(x, routing.order, sorted_experts, bins, top_k)
        gate, up = gmm(rows, gate_up, sizes, trans_b=True).chunk(2, -1)
        out = gmm(F.silu(gate) * up, down, sizes, trans_b=True)
        weights = routing.weights.flatten().to(x.dtype).contiguous()
        return ops.scatter(out, routing.order, sorted_experts, weights, bins, top_k)

    return experts


# name -> (loader, source, supported compute capabilities by major number; none: any)
_INSTALLED: dict[str, tuple[Callable[[], Experts], str, tuple[int, ...]]] = {
    "liger": (liger_ops.experts, "pip install liger-kernel", ()),
    "scattermoe": (_scattermoe, "github.com/shawntan/scattermoe", ()),
    "sonicmoe": (_sonicmoe, "github.com/Dao-AILab/sonic-moe", (9,)),
    "megablocks": (_megablocks, "pip install megablocks grouped_gemm", ()),
}


@cache
def find(name: str, device: str) -> Experts | str:
    """A peer (one of NAMES) as a function with `moe_mlp`'s signature, or the reason why it cannot run here."""
    if name == "loop":
        return loop
    if name.startswith("grouped_mm"):
        if not hasattr(torch, "_grouped_mm"):
            return f"torch {torch.__version__} has no _grouped_mm"
        if name == "grouped_mm":
            return grouped_mm
        return torch.compile(grouped_mm, dynamic=False) if device == "cuda" else "compiled on a GPU only"
    make, where, majors = _INSTALLED[name]
    if device != "cuda":
        return f"{name} runs on a GPU only"
    if majors and torch.cuda.get_device_capability()[0] not in majors:
        return f"{name} is for compute capability {', '.join(map(str, majors))} only"
    try:
        return make()
    except (ImportError, AttributeError, OSError) as error:
        return f"{name} is not installed, or is not as it was ({where}): {type(error).__name__}: {str(error)[:100]}"
