"""Which precision `auto` chooses from a CPU's flags, and whether those tell the truth."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

import minimind_fast as mm
from minimind_fast import ops
from minimind_fast.commands import options
from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import resolve
from minimind_fast.proof import cases
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.zero.options import deepspeed_config

attention = sys.modules["minimind_fast.ops.attention"]  # the module: `ops.attention` is the op
AVX2, ZEN4 = {"avx2": True, "avx512_bf16": False}, {"avx2": True, "avx512_bf16": True, "avx512_fp16": False}
SAPPHIRE_RAPIDS = {"avx512_bf16": True, "amx_bf16": True, "avx512_fp16": True}
GRAVITON = {"architecture": "aarch64", "bf16": True, "fp16_arith": True}


@pytest.fixture
def unlimited(monkeypatch):
    """Nothing keeps oneDNN from what the CPU has."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cpu(monkeypatch, unlimited):
    """Pretend to be a CPU with these flags, with or without oneDNN."""

    def be(flags, onednn=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)

    return be


@pytest.mark.parametrize(
    ("flags", "onednn", "training", "bf16", "fp16"),
    [
        (AVX2, True, "float32", torch.float32, torch.float32),
        (ZEN4, True, "bfloat16", torch.bfloat16, torch.float32),
        (SAPPHIRE_RAPIDS, True, "bfloat16", torch.bfloat16, torch.float16),
        (GRAVITON, True, "bfloat16", torch.bfloat16, torch.float16),
        (GRAVITON, False, "float32", torch.float32, torch.float32),  # a Mac: has the flags, but no oneDNN to use them
    ],
    ids=["AVX2", "Zen 4", "Sapphire Rapids", "Graviton", "Mac"],
)
def test_auto_is_what_the_cpu_multiplies(cpu, flags, onednn, training, bf16, fp16):
    cpu(flags, onednn)
    assert precision.choose("auto") == training
    assert deepspeed_config(TrainConfig(), 1).get("bf16", {}).get("enabled", False) == (training == "bfloat16")
    assert precision.as_stored(torch.bfloat16, "cpu") == bf16 and precision.as_stored(torch.float16, "cpu") == fp16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert precision.as_stored(dtype, "cuda") == dtype
    assert precision.as_stored(torch.float32, "cpu") == torch.float32
    for asked in ("bfloat16", "float16", "float32"):
        assert precision.choose(asked) == asked


@pytest.mark.parametrize(
    ("limit", "bf16", "fp16"),
    [
        ("AVX2", False, False),
        ("avx2_vnni", False, False),
        ("AVX512_CORE", False, False),
        ("AVX512_CORE_BF16", True, False),
        ("AVX512_CORE_AMX", True, True),
        ("DEFAULT", True, True),
        ("", True, True),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_onednn_may_not_use_is_not_there(cpu, monkeypatch, name, limit, bf16, fp16):
    cpu(SAPPHIRE_RAPIDS)
    monkeypatch.setenv(name, limit)
    assert precision.multiplies(torch.bfloat16) == bf16 and precision.multiplies(torch.float16) == fp16
    assert precision.choose("auto") == ("bfloat16" if bf16 else "float32")
    assert precision.multiplies(torch.float32) and precision.multiplies(torch.bfloat16, "cuda")
    cpu(GRAVITON)  # the limit is one of x86
    assert precision.multiplies(torch.bfloat16) and precision.multiplies(torch.float16)


def test_an_older_pytorch_is_asked_by_its_own_names(monkeypatch, unlimited):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)
    for here in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda here=here: here)
        assert precision.choose("auto") == ("bfloat16" if here else "float32")


@pytest.mark.parametrize(
    ("capability", "hip", "training"),
    [((7, 0), None, "float16"), ((7, 5), None, "float16"), ((8, 0), None, "bfloat16"), ((9, 0), "7.0", "bfloat16")],
    ids=["V100", "T4", "A100", "AMD"],
)
def test_a_gpu_trains_in_what_its_tensor_cores_take(cpu, monkeypatch, capability, hip, training):
    cpu(AVX2)  # must not affect the GPU's choice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(precision, "_card", {})
    monkeypatch.setattr(sys.modules[resolve.__module__], "_flash_attn", lambda: (print, "installed"))
    assert precision.choose("auto") == training
    plain = {name for name, how in ops.describe("cuda").items() if how.startswith("reference")}
    assert plain == ({"moe_route", "moe_mlp", "symmetric_product"} if training == "float16" else set())
    backend, _ = resolve("auto", "cuda", getattr(torch, training))
    assert backend == ("sdpa" if training == "float16" else "flash_attn")


def times_float32(dtype):
    """Time of a matmul relative to float32: the best of many on one thread, because other tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = {torch.float32: float("inf"), dtype: float("inf")}
    inputs = {d: (torch.randn(128, 512).to(d), torch.randn(512, 512).to(d)) for d in best}
    for _ in range(25):
        for d, (x, weight) in inputs.items():
            begin = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best[d] = min(best[d], time.perf_counter() - begin)
    torch.set_num_threads(threads)
    return best[dtype] / best[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_this_cpu_says_is_true(dtype):
    """One of three tries must show it: with the instructions 16 bits are about as fast as float32 or faster; with AVX2 alone
    they are slower. AVX512 without them was not measured."""
    if precision.multiplies(dtype):
        assert any(times_float32(dtype) < 1.5 for _ in range(3))
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert any(times_float32(dtype) > 2 for _ in range(3))


@pytest.fixture
def half_folder(tmp_path):
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    model = MiniMind(ModelConfig.preset("tiny", num_hidden_layers=1, vocab_size=tokenizer.vocab_size))
    mm.save_pretrained(model, tmp_path / "half", tokenizer=tokenizer, dtype=torch.float16)
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("flags", "asked", "opened"),
    [
        (ZEN4, "auto", torch.float32),
        (SAPPHIRE_RAPIDS, "auto", torch.float16),
        (ZEN4, "float16", torch.float16),
        (ZEN4, "bfloat16", torch.bfloat16),
    ],
)
def test_weights_answer_as_stored_or_in_float32(cpu, half_folder, flags, asked, opened):
    cpu(flags)
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    model, _ = options.open_model(parser.parse_args([str(half_folder), "--device", "cpu", "--dtype", asked]))
    assert {p.dtype for p in model.parameters()} == {opened}


SWITCHES = ("allow_tf32", "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def switches():
    return [getattr(torch.backends.cuda.matmul, name) for name in SWITCHES]


def test_no_shortcut_is_left_on_in_a_truth_or_off_after_it():
    before = switches()
    try:
        precision.matmuls_for_training()
        assert switches() == [True, False, False]
        with precision.exact_matmuls():
            assert switches() == [False, False, False]
            precision.matmuls_for_training()  # a run that begins within a row of the benchmark
        assert switches() == [True, False, False]
    finally:
        for name, value in zip(SWITCHES, before, strict=True):
            setattr(torch.backends.cuda.matmul, name, value)


def test_truths_do_not_depend_on_who_set_what_before(monkeypatch):
    seen = []

    def evaluate(*_, **__):
        seen.append(switches())
        return {}

    monkeypatch.setattr(cases, "evaluate", evaluate)
    before = precision.matmuls_for_training()
    try:
        cases.check(cases.CASES["swiglu"][0], None, torch.float32, "cpu")
        assert switches() == [True, False, False]
    finally:
        precision._matmuls(**before)
    assert len(seen) == 3 and all(s == [False, False, False] for s in seen)  # truth, eager, kernel


def test_cublas_is_switched_in_one_place():
    root = Path(precision.__file__).resolve().parents[2]
    found = {
        str(file.relative_to(root))
        for folder in ("minimind_fast", "kernels", "train", "benchmarks")
        for file in (root / folder).rglob("*.py")
        if re.search(
            r"allow_tf32|reduced_precision_reduction|set_float32_matmul_precision|fp32_precision",
            file.read_text("utf-8"),
        )
    }
    assert found == {"minimind_fast/ops/precision.py"}


def test_deterministic_is_asked_of_pytorch_and_cublas(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        precision.repeat_sums()
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
