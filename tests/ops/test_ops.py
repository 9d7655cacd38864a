"""The switch: which implementation of an op runs, and that an invalid choice is an error."""

import os
import subprocess
import sys

import pytest
import torch

import minimind_fast as mm
from minimind_fast import ops
from minimind_fast.config import PRESETS
from minimind_fast.ops import reference

X = torch.randn(5, 16)
W = torch.ones(16)


@pytest.fixture(autouse=True)
def restore():
    with mm.ops.use("auto"):
        yield


@pytest.fixture
def marked(monkeypatch):
    """Kernels that record that they ran, and a device on which they may."""
    monkeypatch.setattr(ops, "kernel", lambda name: lambda *args, **kwargs: f"kernel {name}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_every_op_has_a_reference_and_a_name_in_ops():
    for name in ops.NAMES:
        assert callable(getattr(reference, name))
        assert callable(getattr(ops, name))
        assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


@pytest.mark.parametrize("spec", ["nope", "rms_norm,nope", "", ",", "ALL", "auto,rms_norm"])
def test_an_unknown_name_is_an_error_that_lists_the_names(spec):
    with pytest.raises(ValueError) as error:
        mm.ops.use(spec)
    for name in (*ops.NAMES, "auto", "all", "none"):
        assert name in str(error.value)


def test_a_wrong_wish_changes_nothing(marked):
    with mm.ops.use("rms_norm"):
        with pytest.raises(ValueError):
            mm.ops.use("nope")
        assert ops.rms_norm(X, W, 1e-5) == "kernel rms_norm"


def test_none_is_the_plain_reference_bit_for_bit(marked):
    with mm.ops.use("none"):
        assert torch.equal(ops.rms_norm(X, W, 1e-5), reference.rms_norm(X, W, 1e-5))
        assert torch.equal(ops.swiglu(X), reference.swiglu(X))
        assert all(text.startswith("reference") for text in ops.describe("cuda").values())


def test_auto_is_no_kernel_on_a_cpu_even_under_the_interpreter(marked):
    assert torch.equal(ops.swiglu(X), reference.swiglu(X))
    assert set(ops.describe("cpu").values()) == {"reference: on cpu", "chunks: on cpu"}


def test_auto_is_the_kernel_on_a_gpu(marked):
    assert set(ops.describe("cuda").values()) == {"kernel: on a GPU"}


def test_names_switch_those_on_and_all_others_off(marked):
    with mm.ops.use("rms_norm, swiglu"):
        assert ops.rms_norm(X, W, 1e-5) == "kernel rms_norm"
        assert ops.swiglu(X) == "kernel swiglu"
        said = ops.describe("cpu")
        assert said["rms_norm"] == said["swiglu"] == "kernel: asked for (interpreter)"
        assert all(text == "reference: switched off" for n, text in said.items() if n not in ("rms_norm", "swiglu"))


def test_all_switches_every_op_on(marked):
    with mm.ops.use("all"):
        assert all(getattr(ops, name)(X) == f"kernel {name}" for name in ops.NAMES)


def test_use_without_with_stays_and_with_restores(marked):
    mm.ops.use("all")
    assert ops.swiglu(X) == "kernel swiglu"
    with mm.ops.use("none"):
        assert torch.equal(ops.swiglu(X), reference.swiglu(X))
        with mm.ops.use("rms_norm"):
            assert ops.rms_norm(X, W, 1e-5) == "kernel rms_norm"
        assert torch.equal(ops.rms_norm(X, W, 1e-5), reference.rms_norm(X, W, 1e-5))
    assert ops.swiglu(X) == "kernel swiglu"


def test_with_restores_after_an_exception(marked):
    with pytest.raises(KeyError), mm.ops.use("all"):
        raise KeyError
    assert torch.equal(ops.swiglu(X), reference.swiglu(X))


@pytest.mark.parametrize("spec", ["all", "swiglu"])
def test_a_kernel_asked_for_on_a_cpu_without_the_interpreter_is_an_error(monkeypatch, spec):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with mm.ops.use(spec):
        with pytest.raises(
            ValueError, match="swiglu kernel was asked for but the tensors are on cpu.*TRITON_INTERPRET"
        ):
            ops.swiglu(X)
        with pytest.raises(ValueError, match="asked for"):
            ops.describe("cpu")


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MINIMIND_KERNELS", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, timeout=120)


DESCRIBE = "from minimind_fast import ops; d = ops.describe('cuda'); print(d['rms_norm'], '|', d['swiglu'])"


def test_the_environment_variable_sets_the_start():
    done = run_python(DESCRIBE, MINIMIND_KERNELS="none")
    assert done.stdout.strip() == "reference: switched off | reference: switched off", done.stderr
    done = run_python(DESCRIBE, MINIMIND_KERNELS="swiglu")
    assert done.stdout.strip() == "reference: switched off | kernel: asked for", done.stderr
    done = run_python(DESCRIBE, MINIMIND_KERNELS="nope")
    assert done.returncode != 0 and "unknown kernel nope; choose auto, all, none or any of rms_norm" in done.stderr


def test_importing_the_package_and_running_on_a_cpu_needs_no_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, minimind_fast as mm
config = mm.ModelConfig.preset("tiny", num_hidden_layers=1, vocab_size=64, max_position_embeddings=32)
print(mm.MiniMind(config)(torch.zeros(1, 4, dtype=torch.long)).logits.shape)
"""
    done = run_python(code)
    assert done.stdout.strip() == "torch.Size([1, 4, 64])", done.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_the_model_takes_every_op_from_the_switch_and_records_know_which(monkeypatch, preset):
    calls = set()
    for name in ops.NAMES:

        def spy(*args, _name=name, **kwargs):
            calls.add(_name)
            return getattr(reference, _name)(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    sizes = dict(num_hidden_layers=1, hidden_size=64, vocab_size=64, max_position_embeddings=32)
    config = mm.ModelConfig.preset(preset, **sizes)
    ids = torch.zeros(1, 4, dtype=torch.long)
    mm.MiniMind(config)(ids, targets=ids)
    assert calls == {name for name, op in ops.OPS.items() if op.in_forward and op.preset_case(preset, 1)}
