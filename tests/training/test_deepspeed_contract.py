"""DeepSpeed internals that `training.engine` relies on, one test each: after an upgrade, a failure names what moved."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest

# In its own process: what an engine has at each (stage, dtype), and what its startup leaves behind.
LOOK = """
import json, sys
import torch
import deepspeed, deepspeed.ops
from deepspeed.runtime import bf16_optimizer, compiler
from minimind_fast.config import ModelConfig
from minimind_fast.model import MiniMind
from minimind_fast.training import ranks
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.engine import Engine
from minimind_fast.training.zero.options import deepspeed_config

BF16_STEP = "mpu has_moe_layers norm_type grad_acc_dtype clip_grad optimizer fp32_groups_gradients_flat overflow".split()
BF16_STEP += "fp32_groups_flat_partition fp32_groups_gradient_flat_partition _global_grad_norm update_lp_params".split()
BF16_STEP += ["clear_hp_grads", "_lazy_init_hp_params_optimizer_state"]
before = compiler.compile, bf16_optimizer.see_memory_usage, "__compatible_ops__" in vars(deepspeed.ops)
ranks.prepare(1)
found = {}
for stage, dtype in ((0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")):
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=1, hidden_size=64, vocab_size=256, max_position_embeddings=64)
    config = TrainConfig(zero_stage=stage, dtype=dtype, batch_size=1, accumulation_steps=1)
    engine = Engine(MiniMind(ModelConfig.preset("tiny", **shape)), config, deepspeed_config(config, 1))
    inner, optimizer = engine._ds, engine._ds.optimizer
    parameter = next(engine.module.parameters())
    parts = []
    for p in engine.module.parameters():
        at = engine._place(p)
        with engine.gathered():
            weight = p.detach().flatten().float()
        parts.append(at is not None and at.numel == weight.numel() and torch.allclose(
            at.master.detach().flatten()[at.offset : at.offset + at.numel], weight, rtol=2**-8))
    found[f"{stage} {dtype}"] = {
        "overflow": hasattr(optimizer, "overflow"),
        "clear_hp_grads": hasattr(optimizer, "clear_hp_grads"),
        "bf16_step": sorted(set(BF16_STEP) - set(dir(optimizer))),
        "clear_lp_grads": hasattr(optimizer, "clear_lp_grads"),
        "fp16_groups": hasattr(optimizer, "fp16_groups") and hasattr(optimizer, "fp32_groups"),
        "micro_steps": getattr(inner, "micro_steps", None),
        "enable_backward_allreduce": getattr(inner, "enable_backward_allreduce", None),
        "gradient_clipping": getattr(inner._config, "gradient_clipping", None),
        "places": all(parts),
        "ds_tensor": hasattr(parameter, "ds_tensor"),
        "whole": parameter.whole_numel == parameter.ds_numel if stage == 3 else parameter.whole_numel == parameter.numel(),
        "counters": sorted({float(s["step"]) for s in engine_optimizer.state.values()})
        if (engine_optimizer := getattr(optimizer, "optimizer", optimizer)) and engine_optimizer.state else [],
    }
after = compiler.compile, bf16_optimizer.see_memory_usage, "__compatible_ops__" in vars(deepspeed.ops)
found["put back"] = before == after
found["inductor"] = "torch._inductor.compile_fx" in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOOK], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


ENGINES = ["0 float32", "0 bfloat16", "1 bfloat16", "2 bfloat16", "3 bfloat16"]


def test_optimizer_overflow_is_there_except_in_plain_fp32(found):
    assert [found[e]["overflow"] for e in ENGINES] == [False, True, True, True, True]


def test_optimizer_clear_hp_grads_and_clear_lp_grads_mark_the_bf16_optimizer_of_stage_1(found):
    assert [found[e]["clear_hp_grads"] for e in ENGINES] == [False, False, True, False, False]
    assert found["1 bfloat16"]["clear_lp_grads"]


def test_bf16_optimizer_has_all_that_our_step_of_it_uses(found):
    missing = found["1 bfloat16"]["bf16_step"]
    assert missing in ([], ["_global_grad_norm"])  # its own step makes that one, and ours
    assert found["0 bfloat16"]["bf16_step"]


def test_optimizer_fp16_groups_and_fp32_groups_pair_weights_and_masters_at_stage_0(found):
    assert found["0 bfloat16"]["fp16_groups"]


def test_parameter_ds_tensor_is_there_at_stage_3(found):
    assert [found[e]["ds_tensor"] for e in ENGINES] == [False] * 4 + [True]


def test_hp_mapping_and_grad_position_say_where_the_masters_lie(found):
    assert all(found[e]["places"] for e in ENGINES)


def test_parameters_are_the_same_objects_after_partitioning_and_remember_their_size(found):
    assert all(found[e]["whole"] for e in ENGINES)


def test_engine_micro_steps_is_a_counter(found):
    assert all(found[e]["micro_steps"] == 0 for e in ENGINES)


def test_engine_enable_backward_allreduce_is_off_where_one_rank_would_reduce_with_itself(found):
    assert [found[e]["enable_backward_allreduce"] for e in ENGINES] == [False, False, False, True, True]


def test_engine_config_gradient_clipping_is_taken_over_in_plain_fp32_only(found):
    assert [found[e]["gradient_clipping"] for e in ENGINES] == [0.0, 1.0, 1.0, 1.0, 1.0]


def test_the_step_inside_initialize_leaves_no_trace_in_adams_counter(found):
    assert all(set(found[e]["counters"]) <= {0.0} for e in ENGINES)


def test_patches_are_put_back_and_inductor_stays_out(found):
    assert found["put back"] and not found["inductor"]


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        ("deepspeed", "initialize", {"model", "optimizer", "config"}),
        ("deepspeed.runtime.engine", "DeepSpeedEngine.set_gradient_accumulation_boundary", {"is_boundary"}),
        ("deepspeed.runtime.engine", "DeepSpeedEngine.backward", set()),
        ("deepspeed.runtime.engine", "DeepSpeedEngine.get_global_grad_norm", set()),
        ("deepspeed.runtime.engine", "DeepSpeedEngine.zero_grad", set()),
        (
            "deepspeed.runtime.engine",
            "DeepSpeedEngine.save_checkpoint",
            {"tag", "client_state", "save_latest", "exclude_frozen_parameters"},
        ),
        ("deepspeed.runtime.engine", "DeepSpeedEngine.load_checkpoint", {"tag", "load_module_strict"}),
        ("deepspeed.utils", "safe_set_full_fp32_param", {"param", "value"}),
        ("deepspeed.utils", "safe_set_local_fp32_param", {"param", "value"}),
        ("deepspeed.runtime.zero", "GatheredParameters", {"params", "modifier_rank"}),
        ("deepspeed.checkpoint.ds_to_universal", "main", set()),
        ("deepspeed.accelerator", "get_accelerator", set()),
    ],
)
def test_function(module, name, arguments):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)
    assert arguments <= set(signature.parameters), f"{module}.{name}{signature}"
