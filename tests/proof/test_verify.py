"""The proof itself: the error rule catches what it should, the cases cover every op, the command's exit code tells."""

# isort: off
import kernel_helpers  # before anything imports triton: it chooses the interpreter where there is no GPU

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks.report import proof_table
from minimind_fast import ops
from minimind_fast.commands import verify
from minimind_fast.ops import reference
from minimind_fast.proof import report
from minimind_fast.ops.cases import Draw
from minimind_fast.proof.cases import CASES, MODELS, check
from minimind_fast.proof.models import SameExperts, check_model
from minimind_fast.proof.rule import NORM_FACTOR, Comparison, compare
# isort: on

DEVICE = kernel_helpers.DEVICE


def three(dtype=torch.float32, size=200):
    truth = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return truth.to(dtype), truth.to(dtype), truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_rounded_truth_passes(dtype):
    assert compare(*three(dtype)).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_element_off_by_a_few_roundings_fails(dtype):
    ours, eager, truth = three(dtype)
    worst = truth.abs().argmax()
    ours[worst] *= 1 + 24 * torch.finfo(dtype).eps
    result = compare(ours, eager, truth)
    assert not result.passed and "1 of 200 elements" in result.reason


def test_many_elements_each_within_the_worst_of_eager_fail_by_norm():
    ours, eager, truth = three(torch.float16)
    eager[0] = eager[0] + 0.1
    ours += 0.05
    result = compare(ours, eager, truth)
    assert not result.passed and "error norm" in result.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unwritten_element_fails(value):
    ours, eager, truth = three()
    ours[7] = value
    assert not compare(ours, eager, truth).passed


def test_inf_where_eager_has_inf_passes_and_so_does_the_truth_there():
    ours, eager, truth = three(torch.float16)
    truth[3], truth[4] = 1e6, 5.0
    eager[3] = eager[4] = ours[3] = float("inf")
    ours[4] = 5.0
    assert compare(ours, eager, truth).passed
    ours[4] = 7.0
    assert not compare(ours, eager, truth).passed


def test_another_shape_or_dtype_fails():
    ours, eager, truth = three()
    assert not compare(ours[:-1], eager, truth).passed
    assert not compare(ours.double(), eager, truth).passed


def test_integers_must_be_equal():
    plan = torch.arange(5, dtype=torch.int32)
    assert compare(plan, plan, plan).passed
    assert not compare(plan.flip(0), plan, plan).passed


def test_an_error_of_twice_eager_fails_for_whole_models_too():
    _, eager, truth = three(torch.float16)
    noisy = (eager.double() + 1e-2).half()
    worse = (truth + 2 * (noisy.double() - truth)).half()
    assert not compare(worse, noisy, truth, norm_factor=NORM_FACTOR).passed


def test_every_op_has_model_shapes_and_awkward_cases():
    assert set(CASES) == set(ops.NAMES)
    for name, cases in CASES.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        called = [m for m in MODELS if ops.OPS[name].preset_case(m, 1) is not None]
        for model in called:
            assert any(model + " " in n for n in names), (name, model)
        assert called and all(m.endswith("-moe") for m in called) == ops.OPS[name].of_mixtures
        assert any("no " in n for n in names) and any("one" in n for n in names)


def test_cases_are_the_same_each_time_and_rounded_to_the_dtype():
    case = CASES["rope"][0]
    a, b = (case.tensors(Draw(torch.float16))["qkv"] for _ in range(2))
    assert torch.equal(a, b) and a.dtype == torch.float16
    assert not torch.equal(a, case.tensors(Draw(torch.float16, seed=1))["qkv"])


def test_the_routers_cases_hold_no_near_ties():
    for case in CASES["moe_route"]:
        t = case.tensors(Draw(torch.float32))
        if t["x"].shape[0] and t["gate_weight"].shape[0] > case.options["top_k"]:
            logits = (t["x"] @ t["gate_weight"].t()).sort(-1, descending=True).values
            gaps = (logits[:, :-1] - logits[:, 1:])[:, : case.options["top_k"]]
            assert gaps.min() > 0.02, case.name


class Spoil(torch.autograd.Function):
    """The identity, whose gradient is off by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize("name", ops.NAMES)
def test_the_reference_passes_its_own_check_and_a_broken_one_fails(name):
    """A check that cannot fail is no check: each output and each gradient, spoilt in turn, must be seen."""
    case = next(c for c in CASES[name] if "T=" in c.name)
    plain = getattr(reference, name)
    healthy = check(case, plain, torch.float32, "cpu")
    assert all(result.passed for result in healthy.values())

    tensors = case.tensors(Draw(torch.float32))
    wanted = [key for key in ops.OPS[name].differentiable if tensors[key] is not None]
    assert wanted and set(healthy) >= {f"d {key}" for key in wanted}
    for key in wanted:

        def wrong_gradient(*args, _key=key, **kwargs):
            if _key in kwargs:
                kwargs[_key] = Spoil.apply(kwargs[_key])
            for argument, value in kwargs.items():  # or it is a part of one
                if _key in getattr(value, "_fields", ()):
                    kwargs[argument] = value._replace(**{_key: Spoil.apply(getattr(value, _key))})
            return plain(*args, **kwargs)

        results = check(case, wrong_gradient, torch.float32, "cpu")
        assert {k for k, result in results.items() if not result.passed} == {f"d {key}"}

    outputs = [k for k in healthy if k.startswith("out")]
    for i, key in enumerate(outputs):

        def wrong_output(*args, _i=i, **kwargs):
            out = plain(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                return out * 1.001
            parts = list(out)
            parts[_i] = parts[_i] * 1.001 if parts[_i].is_floating_point() else parts[_i] + 1
            return tuple(parts)

        assert not check(case, wrong_output, torch.float32, "cpu")[key].passed, key


def test_an_op_that_writes_to_its_input_or_leaves_memory_unwritten_fails():
    case = next(c for c in CASES["swiglu"] if "T=" in c.name)

    def writes(gate_up):
        out = reference.swiglu(gate_up)
        gate_up.data.zero_()
        return out

    def unwritten(gate_up):
        out = reference.swiglu(gate_up)
        hole = torch.empty_like(out)
        return torch.cat([out[:1], hole[1:2], out[2:]])

    for broken in (writes, unwritten):
        assert not all(r.passed for r in check(case, broken, torch.float32, "cpu").values())


def test_whole_models_see_a_wrong_kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "kernel", lambda name: getattr(reference, name))
    rows = list(check_model("minimind3-moe", torch.float32, "cpu", ops.NAMES))
    assert [row["op"] for row in rows] == [
        "rms_norm", "rope", "linear_cross_entropy", "moe_route", "moe_mlp", "all",
    ]  # fmt: skip
    assert all(r.passed for row in rows for r in row["results"].values())
    assert all(row["gradient_difference"] == 0 for row in rows)

    def wrong(x, weight, eps, residual=None, cast_first=False):
        return reference.rms_norm(x, weight, eps * 30, residual, cast_first)

    monkeypatch.setattr(ops, "kernel", lambda name: wrong if name == "rms_norm" else getattr(reference, name))
    failed = {r["op"] for r in check_model("minimind2-small", torch.float32, "cpu", ops.NAMES)
              if not all(result.passed for result in r["results"].values())}  # fmt: skip
    assert failed == {"rms_norm", "all"}


def test_choices_that_differ_between_experts_are_counted_and_held():
    x, gate = torch.randn(6, 8), torch.randn(4, 8)
    with SameExperts() as experts:
        before = ops.moe_route(x, gate, 2, True)
        experts.replay()
        after = ops.moe_route(-x, gate, 2, True)
    assert experts.differed > 0
    assert torch.equal(after.experts, before.experts)
    slots = torch.arange(12)
    assert torch.equal(after.order[after.inverse.long()].long(), slots)
    assert torch.equal(after.counts, before.counts)
    torch.testing.assert_close(after.weights.sum(-1), torch.ones(6))
    assert ops.moe_route is not experts._route


def command(*argv: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "minimind_fast.commands.verify", *argv]
    return subprocess.run(run, env=clean | env, capture_output=True, text=True, timeout=280)


@pytest.mark.skipif(kernel_helpers.HAS_GPU, reason="with a GPU the command runs there")
def test_the_command_runs_itself_under_the_interpreter_and_says_so(tmp_path):
    file = tmp_path / "verify.json"
    done = command("--ops", "swiglu", "--models", "no", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton's interpreter" in done.stdout and "bfloat16 and speed need a GPU" in done.stdout
    found = json.loads(file.read_text())
    assert found["passed"] and {row["dtype"] for row in found["rows"]} == {"float32", "float16"}
    assert {row["case"] for row in found["rows"]} == {case.name for case in CASES["swiglu"]}
    numbers = found["rows"][0]["results"]["d gate_up"]
    assert 0 < numbers["norm_error"] < 1e-6 and 0 < numbers["eager_norm_error"] < 1e-6


SWIGLU = ["--ops", "swiglu", "--models", "no", "--dtype", "float32", "--device", "cpu"]


def test_a_failing_kernel_gives_exit_code_1(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ops, "kernel", lambda name: lambda gate_up: reference.swiglu(gate_up) * 1.01)
    assert verify.main([*SWIGLU, "--jobs", "0"]) == 1
    assert "FAIL swiglu: " in capsys.readouterr().out


def test_of_failures_the_smallest_case_is_told():
    def row(case, dtype, elements, passed=False):
        return {
            "op": "swiglu",
            "case": case,
            "dtype": dtype,
            "passed": passed,
            "results": {"out0": Comparison(passed, elements=elements)},
        }

    rows = [
        row("large", "bfloat16", 900),
        row("small", "bfloat16", 9),
        row("fine", "bfloat16", 1, True),
        row("one", "float32", 5),
    ]
    told = ["FAIL swiglu: small bfloat16, the smallest of 2", "FAIL swiglu: one float32"]
    assert report.smallest_failures(rows) == told
    case = min(CASES["swiglu"], key=lambda case: len(case.name))
    wrong = check(case, lambda gate_up: reference.swiglu(gate_up) * 1.01, torch.float32, "cpu")
    assert all(result.elements > 0 for result in wrong.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ops", "nope"], "unknown op nope; choose of rms_norm"),
        (["--dtype", "int8"], "unknown dtype int8"),
        (["--device", "cpu", "--dtype", "bfloat16"], "interpreter is wrong in it; use a GPU"),
    ],
)
def test_wrong_usage_is_told(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        verify.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_process_that_dies_is_a_failure_of_its_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert verify.main([*SWIGLU, "--jobs", "1"]) == 1
    assert "the process ended with 1" in capsys.readouterr().out


def test_rows_arrive_as_they_are_made_and_a_stopped_check_leaves_them(tmp_path):
    """The command is interrupted, as a budget that ends does, once one row is there and while others are to come."""
    file = tmp_path / "verify.json"
    run = [sys.executable, "-m", "minimind_fast.commands.verify", *SWIGLU[:4], "--json", str(file), "--device", "cpu"]
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(run, env=clean, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("swiglu "):
        assert line, "it ended without a row"
    os.killpg(process.pid, signal.SIGKILL)  # no chance to say goodbye
    process.wait()
    found = json.loads(file.read_text())
    assert not found["complete"] and not found["passed"] and found["rows"][0]["op"] == "swiglu"
    assert len(found["rows"]) < 2 * len(CASES["swiglu"])
    assert "It was stopped before the end." in proof_table(found)


def test_on_a_gpu_dtypes_are_spread_over_processes_and_training_s_own_comes_first(monkeypatch, tmp_path):
    noted = tmp_path / "noted"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/bash\necho "$*" >> {noted}\n', encoding="utf-8")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    rows = report.report_by_processes(["rms_norm", "moe_mlp"], list(report.DTYPES), "cuda", "yes", ["minimind3"], 1)
    assert list(rows) == []
    asked = [line.split("--dtype ")[1].split()[0] for line in noted.read_text().splitlines()]
    assert len(asked) == 9 and asked[:3] == ["bfloat16"] * 3
    assert {asked.count(name) for name in report.DTYPES} == {3}


@pytest.mark.gpu
def test_every_kernel_in_every_dtype_on_the_gpu():
    done = command("--device", "cuda")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
