"""Our options as a DeepSpeed config, what the engine does with them, and the learning rate."""

import json
import math
import os

import pytest
import torch
from launching import finish_all, run, start

import minimind_fast as mm
from minimind_fast.training import losses, ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import clock, draw_loss
from minimind_fast.training.run import Stage, resolve
from minimind_fast.training.trainer import learning_rate
from minimind_fast.training.words import memory_advice
from minimind_fast.training.zero.engine import param_groups
from minimind_fast.training.zero.options import deepspeed_config


def test_a_users_deepspeed_file_is_laid_over_ours(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "gradient_clipping": 0.5}))
    config = TrainConfig(deepspeed_config=str(file))
    ds = deepspeed_config(config, 1)
    assert ds["zero_optimization"]["stage"] == 2 and ds["zero_optimization"]["reduce_bucket_size"] == 5
    run = resolve(config, Stage("x"))
    assert run.config.zero_stage == 2 and run.config.grad_clip == 0.5 and run.deepspeed == ds
    assert run.config.why("zero_stage") == f"in {file}" and config.zero_stage == -1


@pytest.mark.parametrize(
    ("theirs", "given", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 1}, "zero_optimization.stage = 2 .* --zero_stage"),
        ({"gradient_clipping": 3.0}, {"grad_clip": 1.0}, "gradient_clipping = 3.0 .* --grad_clip"),
        ({"optimizer": {"type": "Adam"}}, {}, "remove 'optimizer'; use --optimizer, --learning_rate"),
    ],
)
def test_a_clash_names_both(tmp_path, theirs, given, message):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(theirs))
    config = TrainConfig(deepspeed_config=str(file), **given)
    with pytest.raises(ValueError, match=message):
        deepspeed_config(config, 1)


def test_a_missing_deepspeed_file_is_named():
    with pytest.raises(ValueError, match="--deepspeed_config nowhere.json"):
        deepspeed_config(TrainConfig(deepspeed_config="nowhere.json"), 1)


def test_offload_needs_a_partitioned_optimizer():
    with pytest.raises(ValueError, match="--offload cpu needs --zero_stage 1"):
        deepspeed_config(TrainConfig(offload="cpu", zero_stage=0), 1)


def test_norms_do_not_decay():
    model = mm.MiniMind(mm.ModelConfig.preset("tiny", max_position_embeddings=64))
    matrices, norms = param_groups(model, 0.1)
    assert matrices["weight_decay"] == 0.1 and all(p.dim() > 1 for p in matrices["params"])
    assert norms["weight_decay"] == 0 and all(p.dim() == 1 for p in norms["params"])
    assert len(matrices["params"]) + len(norms["params"]) == len(list(model.parameters()))


def test_learning_rate_is_minimind_form():
    config = TrainConfig(learning_rate=1.0)
    assert learning_rate(config, 0, 100) == pytest.approx(1.0)
    assert learning_rate(config, 50, 100) == pytest.approx(0.55)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)
    assert learning_rate(config, 25, 100) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    config = TrainConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate(config, 0, 100) == pytest.approx(0.1)
    assert learning_rate(config, 9, 100) == learning_rate(config, 10, 100) == pytest.approx(1.0)
    assert learning_rate(TrainConfig(learning_rate=1.0, lr_schedule="constant"), 99, 100) == 1.0
    assert learning_rate(TrainConfig(learning_rate=1.0, lr_schedule="cosine"), 100, 100) == pytest.approx(0.0)


def test_lm_loss_is_the_weighted_sum():
    logprobs = torch.tensor([-1.0, 0.0, -3.0], requires_grad=True)
    assert losses.lm(logprobs).item() == 4.0
    loss = losses.lm(logprobs, torch.tensor([1.0, 1.0, 10.0]))
    assert loss.item() == 31.0
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-1.0, -1.0, -10.0]


def test_clock():
    assert [clock(x) for x in (0, 59.4, 61, 3600, 7325)] == ["0s", "59s", "1m01s", "1h00m", "2h02m"]


def test_the_curve_is_drawn_from_the_log(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, **kw: drawn.update({kw["label"]: (x, y)}) or plot(self, x, y, **kw)
    )
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 2, "val_loss": 2.5}\n')
    draw_loss(log, tmp_path / "loss.png", "a run")
    assert drawn == {"training": ((1, 2), (3.0, 2.0)), "validation": ((2,), (2.5,))}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_out_of_memory_says_what_to_lower_with_numbers(tmp_path):
    config = TrainConfig(batch_size=32, max_seq_len=512, accumulation_steps=4)
    text = memory_advice(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), config, tmp_path)
    assert "32 x 512" in text and "--batch_size 16 --accumulation_steps 8" in text and "Tried to allocate 2 GiB" in text


# In its own process, because it becomes a rank: how each (ZeRO stage, dtype, optimizer) handles a non-finite loss, and the
# sums of two micro-batches at stage 1 in bf16.
UNDER_ENGINE = """
import json, math, sys
import torch
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

ranks.prepare(1)
from deepspeed.accelerator import get_accelerator
type(get_accelerator()).is_fp16_supported = lambda self: True  # DeepSpeed refuses float16 on a CPU; the arithmetic works
type(get_accelerator()).supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
ids, cu = torch.arange(32), torch.tensor([0, 32], dtype=torch.int32)
for stage, dtype, optimizer in json.loads(sys.argv[1]):
    shape = dict(num_hidden_layers=1, hidden_size=64, vocab_size=256, max_position_embeddings=64)
    torch.manual_seed(0)
    model = MiniMind(ModelConfig.preset("tiny", **shape))
    config = TrainConfig(zero_stage=stage, dtype=dtype, batch_size=1, accumulation_steps=2, optimizer=optimizer)
    engine = Engine(model, config, deepspeed_config(config, 1))
    attention = model.model.layers[0].self_attn
    weight = model.model.embed_tokens.weight if optimizer == "adamw" else attention.qkv_proj.weight
    steps, moved = [], []
    for factor in (1.0, float("nan"), 1.0):
        with engine.gathered():
            before = weight.detach().clone()
        for i in range(2):
            out = engine(ids.roll(i), targets=ids, cu_seqlens=cu, max_seqlen=32)
            engine.backward(-out.logprobs.mean() * factor, last=i == 1)
        sums = getattr(engine._ds.optimizer, "fp32_groups_gradients_flat", [torch.zeros(1)])[0].clone()
        norm = float(engine.step(1e-2))
        finite = math.isfinite(norm)
        with engine.gathered():
            steps.append([finite, not torch.equal(before, weight), bool(weight.isfinite().all())])
            moved.append([norm, (weight - before).float().abs().mean().item()])
    rounded = (sums == sums.bfloat16()).float().mean().item()
    print(json.dumps({"steps": steps, "first": moved[0], "rounded": rounded, "timer": engine._ds.tput_timer.config.enabled}))
"""
STAGES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (0, "bfloat16"), (1, "bfloat16")]
STAGES += [(1, "float16"), (2, "float16"), (3, "float16")]
STAGES = [(*case, "adamw") for case in STAGES] + [
    (*case, "muon") for case in STAGES if case[1] != "float32" or case[0] == 0
]


@pytest.fixture(scope="module")
def under_engine():
    said = run("-c", [UNDER_ENGINE, json.dumps(STAGES)])
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return dict(zip(STAGES, found, strict=True))


@pytest.mark.parametrize("case", STAGES, ids=lambda case: "-".join(map(str, case)))
def test_a_step_that_is_not_finite_is_skipped_under_every_stage(under_engine, case):
    """(reported finite, weights changed, weights finite) for a step, a non-finite one, and one after it."""
    assert under_engine[case]["steps"] == [[True, True, True], [False, False, True], [True, True, True]]


@pytest.mark.parametrize("case", STAGES, ids=lambda case: "-".join(map(str, case)))
def test_a_first_step_is_that_of_float32(under_engine, case):
    """(gradient norm, how far the embedding moved): a loss scale that is not undone would show in both."""
    assert under_engine[case]["first"] == pytest.approx(under_engine[0, "float32", case[2]]["first"], rel=0.02)


def test_float16_is_refused_where_deepspeed_would_lose_gradients(tmp_path):
    with pytest.raises(ValueError, match="float16 at ZeRO stage 0"):
        deepspeed_config(TrainConfig(dtype="float16", zero_stage=0), 1)
    assert deepspeed_config(TrainConfig(dtype="float16"), 1)["zero_optimization"]["stage"] == 1
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}))
    with pytest.raises(ValueError, match="float16 at ZeRO stage 0"):
        deepspeed_config(TrainConfig(dtype="float32", deepspeed_config=str(file)), 1)


def test_sums_of_micro_batches_stay_in_float32(under_engine):
    """DeepSpeed's default rounds them to bf16 for the reduction, even on one rank."""
    assert under_engine[1, "bfloat16", "adamw"]["rounded"] < 0.7


# One process a rank: how far masters are from the given weights, and whether weights are those rounded.
MASTERS = """
import json, sys
import torch
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

ranks.prepare(1)
rank, size = ranks.world()
from deepspeed.utils import safe_get_full_fp32_param
for stage in range(4):
    torch.manual_seed(rank)  # rank 0's weights count
    shape = dict(num_hidden_layers=1, hidden_size=48, vocab_size=257, max_position_embeddings=64)  # no even parts
    model = MiniMind(ModelConfig.preset("tiny", **shape))
    torch.manual_seed(0)
    given = [p.detach() for p in MiniMind(model.config).parameters()]
    config = TrainConfig(zero_stage=stage, dtype="bfloat16", batch_size=1, accumulation_steps=1)
    engine = Engine(model, config, deepspeed_config(config, size))
    if stage:
        masters = [safe_get_full_fp32_param(p) for p in model.parameters()]
    else:
        groups = zip(engine._ds.optimizer.fp16_groups, engine._ds.optimizer.fp32_groups)
        of = {id(low): high for lows, highs in groups for low, high in zip(lows, highs)}
        masters = [of[id(p)] for p in model.parameters()]
    with engine.gathered():
        weights = [p.detach().clone() for p in model.parameters()]
    apart = max(float((m.view_as(g) - g).abs().max()) for m, g in zip(masters, given, strict=True))
    rounded = all(torch.equal(w, g.to(w.dtype)) for w, g in zip(weights, given, strict=True))
    print(json.dumps([stage, apart, rounded]))
ranks.leave()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_masters_are_the_weights_before_their_rounding(ranks):
    for out in finish_all(start("-c", [MASTERS], ranks)):
        found = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
        assert found == [[stage, 0.0, True] for stage in range(4)]


# Unawaited collectives are still running when the script ends, and the group stays alive, as DeepSpeed's do.
LEAVES = """
import torch
import torch.distributed as dist
from minimind_fast.training import ranks

ranks.prepare(1)
kept = dist.new_group()
for _ in range(300):
    mine = torch.ones(10_000)
    dist.all_gather([torch.empty_like(mine) for _ in range(2)], mine, group=kept, async_op=True)
print("all is written")
ranks.leave()
"""


def test_a_rank_leaves_without_an_abort_and_with_its_output_written():
    for out in finish_all(start("-c", [LEAVES], ranks=2, fresh=True)):
        assert out.endswith("all is written\n")


# A bug of ours, not a user's mistake.
FAILS = """
from minimind_fast.training import ranks, setup

def main():
    ranks.prepare(1)
    raise KeyError("a fault")

setup.start(main)
"""


def test_a_fault_shows_its_traceback_and_exit_code_1():
    said = run("-c", [FAILS], expect=1)
    assert "in main" in said and "KeyError: 'a fault'" in said


def test_no_timer_waits_for_the_gpu(under_engine):
    assert not any(found["timer"] for found in under_engine.values())


def test_a_users_file_decides_the_stage_and_what_follows_from_it(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    ds = deepspeed_config(TrainConfig(dtype="bfloat16", deepspeed_config=str(file)), 2)
    assert "data_types" not in ds and "communication_data_type" not in ds  # DeepSpeed refuses fp32 sums at stage 0
    file.write_text(json.dumps({"communication_data_type": "bf16"}))
    assert (
        deepspeed_config(TrainConfig(dtype="bfloat16", deepspeed_config=str(file)), 2)["communication_data_type"]
        == "bf16"
    )
    assert deepspeed_config(TrainConfig(dtype="bfloat16"), 2)["communication_data_type"] == "fp32"
    assert "communication_data_type" not in deepspeed_config(TrainConfig(dtype="bfloat16", zero_stage=2), 2)


# Three steps at stage 1 in bf16, the second not finite, by DeepSpeed's own step and by ours: what they ask the device for.
TWO_STEPS = """
import json, math
import torch
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.zero import engine as engine_module
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.options import deepspeed_config

class Count(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

ranks.prepare(1)
ids, cu = torch.arange(32), torch.tensor([0, 32], dtype=torch.int32)
replaceable = engine_module._replaceable
for clip, optimizer in ((0.0, "adamw"), (0.01, "adamw"), (100.0, "adamw"), (0.01, "muon")):
    for own in (False, True):
        engine_module._replaceable = replaceable if own else lambda _: False
        torch.manual_seed(0)
        shape = dict(num_hidden_layers=1, hidden_size=64, vocab_size=256, max_position_embeddings=64)
        model = MiniMind(ModelConfig.preset("tiny", **shape))
        how = dict(zero_stage=1, dtype="bfloat16", batch_size=1, accumulation_steps=1)
        config = TrainConfig(grad_clip=clip, optimizer=optimizer, **how)
        engine, told = engine_module.Engine(model, config, deepspeed_config(config, 1)), []
        for factor in (1.0, float("nan"), 1.0):
            out = engine(ids, targets=ids, cu_seqlens=cu, max_seqlen=32)
            engine.backward(-out.logprobs.mean() * factor)
            counts = Counter()
            with Count():
                norm = engine.step(1e-2)
            told.append([float(norm), math.isfinite(norm)])
        masters = torch.cat([m.detach() for m in engine._ds.optimizer.fp32_groups_flat_partition])
        state = [float(s["step"]) for s in engine._ds.optimizer.optimizer.state.values()]
        found = {"optimizer": optimizer, "told": told, "masters": masters[::97].tolist(), "counts": counts, "adam": state}
        print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_steps():
    found = [json.loads(line) for line in run("-c", [TWO_STEPS]).splitlines() if line.startswith("{")]
    return list(zip(found[::2], found[1::2], strict=True))


def test_the_bf16_step_asks_the_device_nothing_and_launches_one_norm(two_steps):
    for theirs, ours in two_steps:
        counts = ours["counts"]
        assert not {"_local_scalar_dense", "lift_fresh"} & set(counts)
        assert counts["_foreach_norm"] == 1
        if ours["optimizer"] == "adamw":  # Muon divides each matrix by its norm, and decays by itself
            assert counts["linalg_vector_norm"] == 1 and counts.get("mul_", 0) == 0  # clipping is AdamW's
        assert theirs["counts"]["_local_scalar_dense"] >= 1 and theirs["counts"]["linalg_vector_norm"] >= 10


def test_the_bf16_step_is_deepspeed_s(two_steps):
    """Clipped or not, and after a step that was skipped: the same norm, weights, counter (Muon makes much of last bits)."""
    for theirs, ours in two_steps[:3]:
        assert [taken for _, taken in ours["told"]] == [taken for _, taken in theirs["told"]] == [True, False, True]
        for (norm, taken), (wanted, _) in zip(ours["told"], theirs["told"], strict=True):
            assert not taken or norm == pytest.approx(wanted, rel=1e-5)
        assert ours["adam"] == theirs["adam"] == [2.0, 2.0]
        assert ours["masters"] == pytest.approx(theirs["masters"], abs=2e-5)
    steps = [ours["masters"] for _, ours in two_steps]
    assert steps[0] != steps[1]  # the second was clipped


def test_segments_grow_unless_the_user_has_set_the_allocator_up(monkeypatch):
    names = [f"PYTORCH_{kind}ALLOC_CONF" for kind in ("", "CUDA_", "HIP_")]
    for own in (None, *names):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        if own:
            monkeypatch.setenv(own, "max_split_size_mb:512")
        ranks.grow_segments()
        assert {name: os.environ[name] for name in names if name in os.environ} == (
            {own: "max_split_size_mb:512"} if own else {names[0]: "expandable_segments:True"}
        )


@pytest.fixture
def cards(monkeypatch):
    """A machine of two GPUs, as far as becoming a rank asks for them; notes what is done in which order."""
    told = []
    monkeypatch.setattr(ranks, "grow_segments", lambda: told.append("segments"))
    monkeypatch.setattr(ranks, "matmuls_for_training", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: told.append("device"))
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *_, device_id: told.append(device_id))
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)

    def become(rank, world):
        told.clear()
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world)):
            monkeypatch.setenv(name, str(value))
        ranks.prepare()
        return told

    return become


def test_a_run_sets_its_allocator_up_before_it_touches_the_gpu(cards):
    """The allocator reads its settings once, at the first tensor."""
    assert cards(0, 1)[:2] == ["segments", "device"]


def test_a_world_of_one_binds_no_device(cards):
    """NCCL would split its communicator for each new group, which fails on some drivers where there is no peer."""
    assert cards(0, 1)[2:] == [None] and cards(1, 2)[2:] == [torch.device("cuda", 1)]


def test_more_ranks_than_gpus_are_refused_by_what_was_asked_for(cards):
    with pytest.raises(ValueError, match="2 GPUs, and rank 2 asks for number 3: lower --num_gpus"):
        cards(2, 4)


# In its own process: one step of a plain AdamW that has made two already, and of the engine that goes on with its state.
MOMENTS = """
import json, sys
import torch
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine, param_groups
from minimind_fast.training.zero.options import deepspeed_config

ranks.prepare(1)
ids, cu = torch.arange(32), torch.tensor([0, 32], dtype=torch.int32)

def loss(model):
    return -model(ids, targets=ids.roll(-1), cu_seqlens=cu, max_seqlen=32).logprobs.mean()

for stage, dtype in [(0, "float32"), (1, "float32"), (2, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "bfloat16")]:
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=1, hidden_size=48, vocab_size=257, max_position_embeddings=64)
    plain = MiniMind(ModelConfig.preset("tiny", **shape))
    adamw = torch.optim.AdamW(param_groups(plain, 0.01), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(3):
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        states = {n: adamw.state[p] for n, p in plain.named_parameters()}
        moments = {n: (s["exp_avg"].clone(), s["exp_avg_sq"].clone()) for n, s in states.items() if s}
        adamw.zero_grad()
        loss(plain).backward()
        adamw.step()
    model = MiniMind(plain.config)
    model.load_state_dict(before, strict=False)
    config = TrainConfig(zero_stage=stage, dtype=dtype, batch_size=1, accumulation_steps=1, grad_clip=0.0)
    apart = []
    for given in (moments, None):
        model.load_state_dict(before, strict=False)
        engine = Engine(model.float(), config, deepspeed_config(config, 1))
        if given:
            engine.set_moments(given, 2)
        engine.backward(loss(engine))
        engine.step(1e-2)
        moved = [(p.float() - before[n]).flatten() for n, p in model.named_parameters()]
        want = [(p - before[n]).flatten() for n, p in plain.named_parameters()]
        apart.append(float((torch.cat(moved) - torch.cat(want)).norm() / torch.cat(want).norm()))
    print(json.dumps(apart))
ranks.leave()
"""


def test_another_adamw_s_state_is_gone_on_with_at_every_stage_that_holds_it_whole():
    """The distance of the third step from the plain optimizer's, with its state and without; bf16 rounds weights of 0.1."""
    found = [json.loads(line) for line in run("-c", [MOMENTS]).splitlines() if line.startswith("[")]
    assert len(found) == 6
    for (taken, anew), limit in zip(found, [1e-4] * 3 + [0.1] * 3, strict=True):
        assert taken < limit and anew > 3 * limit
