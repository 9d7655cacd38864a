"""What only a GPU can show of whole steps: torch.compile, CUDA graphs, attention backends, decoding.

Each test runs where there is none as well, in Triton's interpreter or with what stands there in the GPU's place, so that
the test itself is known to work before it meets a card.
"""

import kernel_helpers as kh  # first: it chooses the interpreter before anything imports triton
import pytest
import torch

import minimind_fast as mm
from minimind_fast import ops
from minimind_fast.infer.decode import Decoder, PlainStep
from minimind_fast.ops.attention import attention, resolve
from minimind_fast.ops.attention import use as use_attention
from minimind_fast.proof.cases import evaluate
from minimind_fast.proof.rule import NORM_FACTOR, compare

# On a machine with a GPU Triton compiles, so that its CPU side cannot run there.
on_either = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.skipif(kh.HAS_GPU, reason="kernels run on the GPU here")),
    ],
)
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}  # the interpreter is wrong in bfloat16
BACKEND = {"cuda": "inductor", "cpu": "aot_eager"}  # on a CPU the generated code is not what is tested, and costs g++
TOKENS = {"cuda": 1000, "cpu": 5}


def as_trained(op, device):
    """The op as a model calls it; small where the interpreter runs."""
    preset = next(name for name in ("minimind3", "minimind3-moe") if ops.OPS[op].preset_case(name, 1))
    sizes = {} if device == "cuda" else dict(vocab_size=96, intermediate_size=48, moe_intermediate_size=48)
    case = ops.OPS[op].preset_case(preset, TOKENS[device], training=True, **sizes)
    assert case is not None
    return case


@on_either
@pytest.mark.parametrize("op", ops.NAMES)
def test_every_op_compiles_in_one_graph_and_changes_nothing(op, device):
    if device == "cpu" and op not in ("rope", "swiglu", "moe_route"):
        pytest.skip("each op's own file compiles it here as well; these show that this test works")
    case, kernel = as_trained(op, device), ops.kernel(op)

    def between(*args, **kwargs):
        outputs = kernel(*args, **kwargs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        return tuple(o * 3 if o.is_floating_point() else o for o in outputs)

    plain = evaluate(case, between, DTYPE[device], device)
    for dynamic in (False, True) if device == "cuda" else (False,):
        torch._dynamo.reset()
        compiled = torch.compile(between, fullgraph=True, dynamic=dynamic, backend=BACKEND[device])
        for name, got in evaluate(case, compiled, DTYPE[device], device).items():
            torch.testing.assert_close(got, plain[name], rtol=2 * torch.finfo(DTYPE[device]).eps, atol=0.0)


def step_of(model, batch):
    """A function that takes the model forward and backward; loss and gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        out = model(**batch)
        loss = -out.logprobs.mean() + out.aux_loss
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return out.logprobs, torch.cat([g.flatten() for g in grads if g is not None])

    return step


def cut_model(preset, device, wide=False):
    """Two layers and a packed batch; a narrow one where the interpreter runs."""
    narrow = dict(hidden_size=64, num_hidden_layers=1, vocab_size=96, intermediate_size=64, moe_intermediate_size=64)
    shape = dict(num_hidden_layers=2) if device == "cuda" else narrow
    config = mm.ModelConfig.preset(preset, max_position_embeddings=2048, **shape)
    torch.manual_seed(0)
    model = mm.MiniMind(config).to(device, DTYPE[device]).train()
    lengths = [700, 1, 1300, 47] if device == "cuda" else [7, 1, 6]
    ids = torch.randint(0, config.vocab_size, (sum(lengths) + 1,)).to(device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    batch = {"input_ids": ids[:-1].clone(), "targets": ids[1:].clone(), "cu_seqlens": cu, "max_seqlen": max(lengths)}
    return (model.double() if wide else model), batch


def assert_step(got, plain, truth):
    """A step's result is no further from float64 than the plain step's, by norm."""
    for a, b, c in zip(got, plain, truth, strict=True):
        result = compare(a.detach(), b.detach(), c.detach(), norm_factor=NORM_FACTOR + 3 * a.numel() ** -0.5)
        assert result.passed, result.reason


@on_either
@pytest.mark.parametrize("preset", ["minimind3"])
def test_a_compiled_step_with_kernels_is_as_exact_as_a_plain_one(preset, device):
    """What --use_compile does."""
    with ops.use("none"):
        truth = step_of(*cut_model(preset, device, wide=True))()
    model, batch = cut_model(preset, device)
    backend = "eager" if device == "cpu" else "torch_varlen"  # rectangles of documents are not for compilers
    with ops.use("all"), use_attention(backend):
        plain = step_of(model, batch)()
        torch._dynamo.reset()
        ops.describe(device)  # as the trainer does: what is imported while it is traced would break the graph
        model.model.compile(dynamic=True, backend=BACKEND[device], fullgraph=True)
        assert_step(step_of(model, batch)(), plain, truth)


def replayer(step, device):
    """The step recorded in a CUDA graph; without a GPU the step itself stands in for its replay."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return outputs

    return replay


@on_either
@pytest.mark.parametrize("preset", ["minimind3", "minimind3-moe", "minimind2-moe"])
def test_a_whole_step_runs_in_a_cuda_graph_and_reads_fresh_tokens(preset, device):
    model, batch = cut_model(preset, device)
    with ops.use("all"):
        replay = replayer(step_of(model, batch), device)
        before = [t.clone() for t in replay()]
        for key in ("input_ids", "targets"):
            batch[key].copy_(batch[key].flip(0))
        after = [t.clone() for t in replay()]
        plain = step_of(model, batch)()
    for a, b, old in zip(after, plain, before, strict=True):
        # Attention's backward may add in another order, so that equal is too much to ask.
        gap = (a.float() - b.float()).norm()
        assert gap <= 2 * torch.finfo(DTYPE[device]).eps * b.float().norm()
        assert (old.float() - b.float()).norm() > 10 * gap


HEADS = [(8, 2, 64), (8, 2, 80), (8, 2, 96), (8, 4, 96)]  # minimind2-small, -moe, minimind2, minimind3
LENGTHS = [209, 512, 1, 77]


def packed(heads, dtype, device, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h, k, hd = heads
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    qkv = [torch.randn(sum(LENGTHS), n, hd, generator=draw).to(device, dtype).requires_grad_() for n in (h, k, k)]
    return qkv, cu


def backends(device, dtype):
    """Those that can run here, beside eager."""
    found = []
    for name in ("flash_attn", "torch_varlen", "sdpa", "auto"):
        try:
            resolve(name, device, dtype)
            found.append(name)
        except ValueError:
            pass
    return found


@on_either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_backends_agree_with_each_other_and_with_float64(heads, dtype, device):
    if device == "cpu" and (dtype == torch.float16 or heads != HEADS[0]):
        pytest.skip("one shape shows that the test works; float16 is slow on a CPU")
    inputs, cu = packed(heads, dtype, device)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def run(xs, name):
        out = attention(*xs, cu, max(LENGTHS), name)
        return [out, *torch.autograd.grad((out * grad.to(out.dtype)).sum(), xs)]

    truth = run([x.detach().double().requires_grad_() for x in inputs], "eager")
    eager = run(inputs, "eager")
    found = {name: run(inputs, name) for name in backends(device, dtype)}
    assert "sdpa" in found and "auto" in found
    for name, results in found.items():
        for i, (got, own, true) in enumerate(zip(results, eager, truth, strict=True)):
            error, allowed = (got.double() - true).norm(), (own.double() - true).norm()
            assert error <= 1.25 * allowed + 1e-6 * true.norm(), (
                f"{name}, tensor {i}: {error:.3g} against {allowed:.3g}"
            )


@on_either
@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 4, 96)], ids=str)
def test_in_no_backend_does_a_document_see_another(heads, device):
    dtype = torch.bfloat16
    second = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    for name in [*backends(device, dtype), "eager"]:
        (q, k, v), cu = packed(heads, dtype, device)
        with torch.no_grad():
            before = attention(q, k, v, cu, max(LENGTHS), name).clone()
            for x in (q, k, v):
                x[second] += 1.0
            after = attention(q, k, v, cu, max(LENGTHS), name)
        changed = (before != after).flatten(1).any(1)
        assert changed[second].all(), name
        changed[second] = False
        assert not changed.any(), name


@on_either
def test_fast_decoding_is_as_exact_in_bfloat16_as_plain_steps(device):
    """CUDA graphs on a GPU, packed weights on a CPU: rows of other lengths, over the border between two graphs."""
    torch.manual_seed(0)
    config = mm.ModelConfig.preset("minimind3", num_hidden_layers=2, vocab_size=320, max_position_embeddings=600)
    model = mm.MiniMind(config).to(device, torch.bfloat16).eval()
    wide = mm.MiniMind(config).to(device, torch.float64).eval()
    wide.load_state_dict(model.state_dict())
    draw = torch.Generator().manual_seed(0)
    lengths = (250, 3, 131)
    prompts = [torch.randint(3, 320, (n,), generator=draw).tolist() for n in lengths]
    steps = torch.randint(3, 320, (12, len(lengths)), generator=draw).to(device)  # 250 + 12 passes 256 slots

    def run(net, fast):
        decoder = Decoder(net, len(prompts), 320)
        if not fast:
            decoder._fast = PlainStep(net, decoder.cache)
        logits = torch.stack([decoder.prefill(prompts), *(decoder.step(ids) for ids in steps)])
        return logits, type(decoder._fast).__name__

    got, how = run(model, True)
    assert how == {"cuda": "GraphStep", "cpu": "CpuStep"}[device]
    with ops.use("none"):
        plain, truth = run(model, False)[0], run(wide, False)[0]
    result = compare(got, plain, truth, norm_factor=NORM_FACTOR)
    assert result.passed, result.reason
