"""The benchmark suite's own promises: no time without a right answer, device time by events, numbers from files only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report, timing
from benchmarks.record import ROOT
from benchmarks.studies import allocator
from benchmarks.suite import (
    goals,
    harness,
    implementations,
    test_kernels,
    test_layers,
    test_steps,
    test_weight_gradients,
)
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.ops import reference
from minimind_fast.ops.registry import Work
from minimind_fast.proof.rule import Comparison


class FakeCuda:
    """torch.cuda for the timing code: a clock that advances by what is launched, and only then."""

    def __init__(self) -> None:
        self.now_ms, self.captured, self.capturing, self.waits = 0.0, [], False, 0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now_ms

            def elapsed_time(self, later: "Event") -> float:
                return later.at - self.at

        class Graph:
            def replay(self) -> None:
                assert not cuda.capturing
                for cost in cuda.captured:
                    cuda.now_ms += cost

        self.Event, self.CUDAGraph = Event, Graph
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda _: None)
        self.current_stream = lambda: SimpleNamespace(wait_stream=lambda _: None)

    def stream(self, _side):
        import contextlib

        return contextlib.nullcontext()

    def graph(self, _graph, stream):
        import contextlib

        @contextlib.contextmanager
        def capture():
            self.capturing = True
            yield
            self.capturing = False

        return capture()

    def synchronize(self) -> None:
        self.waits += 1

    def launch(self, cost_ms: float) -> None:
        if self.capturing:
            self.captured.append(cost_ms)
        else:
            self.now_ms += cost_ms + 0.5  # a launch by hand costs half a millisecond here

    def get_device_properties(self, _index):
        return SimpleNamespace(L2_cache_size=50 << 20)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_graph_replays_are_timed_without_launches_and_plain_calls_with_them(cuda):
    calls = [lambda: cuda.launch(2.0), lambda: cuda.launch(4.0)]
    samples, with_launch, how = timing.device_samples(calls)
    assert how.startswith("graph replay") and len(samples) == timing.REPLAYS and with_launch > 0
    assert samples == pytest.approx([3e-3] * len(samples))  # the mean of the two input sets
    samples, _, how = timing.device_samples(calls, capture=False)
    assert how.startswith("plain calls") and samples == pytest.approx([3.5e-3] * len(samples))


def test_the_host_waits_once_for_all_replays(cuda):
    graph = timing._between_events
    before = cuda.waits
    graph(lambda: cuda.launch(1.0), 1, replays=8)
    assert cuda.waits == before + 1


def test_input_sets_are_beyond_three_caches(cuda):
    size = 10 << 20
    sets = timing.num_sets(size, on_gpu=True)
    assert sets * size > 3 * (50 << 20) and timing.num_sets(1 << 30, True) == 1
    assert timing.num_sets(1, True) == timing.MAX_SETS and timing.num_sets(1, False) == 1


def test_samples_are_played_back_to_pytest_benchmark():
    clock = timing.Playback()
    clock.load([0.5, 0.25])
    rounds = [-(clock() - clock()) for _ in range(2)]
    assert rounds == [0.5, 0.25]
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 1.8, 4.2)


@pytest.mark.parametrize("kind", ["209", "mix"])
def test_documents_fill_the_batch(kind):
    lengths = harness.document_lengths(kind, 5000)
    assert sum(lengths) == 5000 and max(lengths) <= 2048 and lengths == harness.document_lengths(kind, 5000)
    assert harness.offsets(lengths, "cpu").tolist()[-1] == 5000
    assert (len(set(lengths)) > 5) == (kind == "mix")


@pytest.fixture
def suite():
    return harness.Suite(everything=False, presets=[], tokens=[], budget_s=1e9)


def _check(op: str, function) -> dict:
    bench, eager, truth = implementations.expected(op, "minimind2-small", 8, torch.float32, "cpu")
    mine = bench.results(function, poison=True)
    return {key: implementations.compare(mine[key], eager[key], truth[key]) for key in truth}


def test_a_wrong_implementation_has_no_time(suite):
    assert suite.hold_to(_check("swiglu", reference.swiglu), ours=True)["error"] < 1e-6
    wrong = _check("swiglu", lambda gate_up: reference.swiglu(gate_up) * 1.001)
    with pytest.raises(pytest.fail.Exception, match="no time without a right answer"):
        suite.hold_to(wrong, ours=True)
    with pytest.raises(pytest.skip.Exception, match="no time without a right answer"):
        suite.hold_to(wrong, ours=False)

    def unwritten(gate_up):
        return reference.swiglu(gate_up) + torch.empty(gate_up.shape[0], 1)  # memory that nobody wrote

    with pytest.raises(pytest.fail.Exception):
        suite.hold_to(_check("swiglu", unwritten), ours=True)


def test_a_peer_that_rounds_more_is_let_through_by_option_only_and_marked(suite):
    def comparison(times: float, passed: bool) -> Comparison:
        return Comparison(passed, "" if passed else "too far", norm_error=times * 1e-3, eager_norm_error=1e-3)

    rough = {"out": comparison(1.0, True), "d x": comparison(1.6, False)}
    with pytest.raises(pytest.skip.Exception, match="no time without a right answer: d x: too far"):
        suite.hold_to(rough, ours=False)
    suite.peer_error = 2.0
    assert suite.hold_to(rough, ours=False) == {"error": 1.6e-3, "eager_error": 1e-3, "above_the_rule": True}
    assert "above_the_rule" not in suite.hold_to({"out": comparison(1.0, True)}, ours=False)
    for refused in ({"out": comparison(2.1, False)}, {"out": Comparison(False, "shapes differ")}):
        with pytest.raises(pytest.skip.Exception):
            suite.hold_to(refused, ours=False)
    with pytest.raises(pytest.fail.Exception):  # never ours
        suite.hold_to(rough, ours=True)


@pytest.mark.parametrize("op", ["linear_cross_entropy", "rope", "moe_route"])
def test_ops_are_checked_as_training_calls_them(op):
    preset = "minimind3-moe" if op == "moe_route" else "minimind3"
    assert all(c.passed for c in implementations.check(op, preset, 5, torch.float32, "cpu", "eager").values())
    bench = implementations.Bench(op, preset, 5, torch.float32, "cpu")
    assert ("grad_weights" in bench.tensors) == (op == "linear_cross_entropy")
    bench.both(getattr(reference, op))
    bench.backward(bench.forward(getattr(reference, op)), keep=True)


def test_what_cannot_stand_side_by_side_says_why():
    assert "nothing whole to compile" in implementations.implementation("moe_mlp", "compile", "cpu")
    assert "Liger" in implementations.implementation("rope", "liger", "cpu")
    with pytest.raises(LookupError, match="does not call moe_mlp"):
        implementations.Bench("moe_mlp", "minimind3", 4, torch.float32, "cpu")


def _row(suite, monkeypatch, samples, **facts):
    """A row as on a GPU, its samples given."""
    monkeypatch.setattr(harness, "device_samples", lambda calls, capture: (samples, 2 * samples[0], "graph replay"))
    seen = SimpleNamespace(extra_info={}, stats=SimpleNamespace(stats=SimpleNamespace(data=[])), group=None)

    def pedantic(target, rounds):
        for _ in range(rounds):
            begin = harness.CLOCK()
            seen.stats.stats.data.append(harness.CLOCK() - begin)

    seen.pedantic = pedantic
    suite.row(seen, "g", facts.pop("implementation"), [lambda: None], facts.pop("work", None), **facts)
    return seen.extra_info


def test_a_row_of_a_gpu_has_its_share_and_its_ratios(suite, monkeypatch):
    suite.on_gpu, suite.device = True, "cuda"
    suite.__dict__["roofs"] = {"copy_bytes_per_s": 1e12, "matmul_flop_per_s": 1e14}
    monkeypatch.setattr(harness.Suite, "device_name", "NVIDIA Test")
    work = Work(bytes=1e6, flops=1e9)  # 1 us of copying, 10 us of multiplying
    eager = _row(suite, monkeypatch, [40e-6] * 5, implementation="eager", work=work, kind="kernel")
    ours = _row(
        suite, monkeypatch, [22e-6] * 5, implementation="ours", work=work, less=2e-6, same_shape_flop_per_s=1e14
    )
    assert eager["times_eager"] == 1 and ours["times_eager"] == pytest.approx(2)
    assert ours["share_of_roof"] == pytest.approx(0.5) and ours["share_of_same_shape"] == pytest.approx(0.5)
    assert ours["with_launch_s"] == pytest.approx(42e-6) and ours["p20_s"] == pytest.approx(20e-6)


def test_a_spent_budget_begins_nothing(suite):
    suite.budget_s = -1.0
    with pytest.raises(pytest.skip.Exception, match="out of time"):
        suite.stop_if_out_of_time()


def _written(file: Path, device: str = "NVIDIA Test 1", on_gpu: bool = True, **changes) -> Path:
    info = {"kind": "model step", "preset": "tiny", "device": device, "median_s": 2e-3, "p20_s": 1e-3, "p80_s": 3e-3}
    info.update(tokens_per_s=1234567.0, share_of_roof=0.5, peak_bytes=10**7, bytes=1e6, error=1e-3, eager_error=2e-3)
    rows = []
    for tokens in (100, 200):
        for name, ratio in (("eager", 1.0), ("ours", 4.0)):
            row = {**info, "tokens": tokens, "implementation": name, "times_eager": ratio, **changes}
            rows.append({"group": f"model step T={tokens}", "extra_info": row, "stats": {"data": [1, 2]}})
    rows.append({"group": "broken", "extra_info": {**info, "implementation": "liger", "median_s": None}})
    roofs = {"copy_bytes_per_s": 4e12, "memset_bytes_per_s": 3e12, "matmul_flop_per_s": 7e14}
    made = {"date": "2030-01-02", "commit": "abc1234", "processor": device, "command": "pytest benchmarks/"}
    head = {
        "made": made,
        "device": device,
        "on_gpu": on_gpu,
        "torch": "2",
        "roofs": roofs,
        "limits": ["What it can tell."],
    }
    file.write_text(json.dumps({"benchmarks": rows, "minimind_fast": head, "machine_info": {"node": "my-host"}}))
    return file


def test_a_report_is_made_of_files(tmp_path):
    runs = [_written(tmp_path / "a.json"), _written(tmp_path / "b.json", median_s=1e-3)]
    out = tmp_path / "results"
    assert report.main(["suite", *map(str, runs), "--out", str(out)]) == 0
    text = (out / "nvidia_test_1.md").read_text()
    assert text.startswith(
        "*Made 2030-01-02, commit abc1234, NVIDIA Test 1: `pytest benchmarks/`*\n\n# NVIDIA Test 1\n"
    )
    assert "copy 4,000 GB/s" in text and "| 1,234,567 |" in text and "| 4.00 |" in text and "50%" in text
    assert "1 ms (1 ms-3 ms)" in text and "2 ms" not in text  # the later run of the same rows
    assert "broken" not in text  # no time
    kept = json.loads((out / "nvidia_test_1.json").read_text())
    assert len(kept["benchmarks"]) == 4 and "my-host" not in (out / "nvidia_test_1.json").read_text()
    for chart in ("tokens", "memory"):
        assert (out / f"nvidia_test_1_{chart}.png").stat().st_size > 5000 and f"nvidia_test_1_{chart}.png" in text
    assert "model step T=100" in (out / "suite.md").read_text() and "NVIDIA Test 1" in (out / "suite.md").read_text()


def test_a_report_mixes_no_machines_and_takes_no_other_files(tmp_path, capsys):
    one, two = _written(tmp_path / "a.json"), _written(tmp_path / "b.json", device="NVIDIA Test 2")
    assert report.main(["suite", str(one), str(two), "--out", str(tmp_path)]) == 2
    assert "NVIDIA Test 2" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{}")
    assert report.main(["suite", str(tmp_path / "c.json"), "--out", str(tmp_path)]) == 2
    assert "not written by this suite" in capsys.readouterr().err


def test_the_suite_runs_says_its_limits_and_keeps_pytest_benchmarks_options(tmp_path):
    file = tmp_path / "run.json"
    run = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/suite/test_kernels.py",
        "-p",
        "no:cacheprovider",
        "--threads",
        "1",
    ]
    run += ["--tokens", "16", "--presets", "minimind2-small", "-k", "swiglu and not compile and not linear"]
    run += ["-rs", f"--benchmark-json={file}", "--benchmark-min-rounds=4"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # pytest-benchmark rests under xdist
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "anything of the Triton kernels" in done.stdout and "Liger-Kernel's kernels run on a GPU only" in done.stdout
    rows = json.loads(file.read_text())["benchmarks"]
    assert {r["extra_info"]["direction"] for r in rows} == {"forward", "backward", "both"}
    eager = [r for r in rows if r["extra_info"]["implementation"] == "eager"]
    for row in eager:
        info = row["extra_info"]
        assert info["times_eager"] == 1 and info["bytes"] > 0 and row["stats"]["rounds"] >= 4
        assert info["error"] == info["eager_error"] > 0
        assert "share_of_roof" not in info  # toy shapes lie in caches


# --------------------------------------------------------------------------------------------------------------- the goals


def test_every_goal_of_a_row_is_one_that_the_suite_fills_on_a_gpu():
    """A goal whose row nobody measures would stay "not measured" for ever."""
    suite = harness.Suite(everything=False, presets=[], tokens=[], budget_s=1e9)
    suite.on_gpu, suite.device = True, "cuda"
    filled = [
        {"kind": "kernel", "op": op, "preset": preset, "tokens": tokens, "implementation": name, "direction": way}
        for op, preset, tokens, name, way in test_kernels.ROWS["test_kernel"](suite)
    ]
    for preset, tokens, load, name, way in test_layers.ROWS["test_moe_layer"](suite):
        row = {"kind": "MoE layer", "preset": preset, "tokens": tokens, "implementation": name, "direction": way}
        filled.append({**row, "routing": load})
    for preset, tokens, name in test_layers.ROWS["test_head_loss"](suite):
        filled.append({"kind": "head", "preset": preset, "tokens": tokens, "implementation": name})
    for preset, tokens, kind, name in test_steps.ROWS["test_model_step"](suite):
        row = {"kind": "model step", "preset": preset, "tokens": tokens, "implementation": name}
        filled.append({**row, "documents": kind})
    for goal in goals.GOALS:
        if goal.row is None:
            assert goal.file and goal.file.endswith(".json"), goal.what
            continue
        rows = [goal.row] + ([goal.over] if isinstance(goal.over, dict) else [])
        if goal.fact.startswith("times_"):  # the other one's row must be there too
            rows.append({**goal.row, "implementation": goal.fact.removeprefix("times_")})
        for row in rows:
            assert goals._select(filled, row), f"{goal.what}: no row {row}"


def test_a_goal_is_met_missed_or_not_measured(tmp_path):
    at = {"kind": "kernel", "op": "swiglu", "preset": "minimind3", "tokens": 65536, "implementation": "ours"}
    rows = [
        {**at, "direction": "forward", "share_of_roof": 0.95},
        {**at, "direction": "backward", "share_of_roof": 0.5},
    ]
    moe = {
        "kind": "MoE layer",
        "preset": "minimind3-moe",
        "tokens": 65536,
        "implementation": "ours",
        "direction": "both",
    }
    rows += [{**moe, "routing": "balanced", "median_s": 2e-3}, {**moe, "routing": "70/10/10/10", "median_s": 2.2e-3}]
    (tmp_path / "cpu_pretrain.json").write_text('{"ratio": 9.5}')
    (tmp_path / "train_step_gpu.json").write_text('{"times_eager": 5.0, "times_joined": 2.5}')
    lines = goals.table(rows, [tmp_path / "nothing", tmp_path])
    verdicts = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    assert verdicts["SwiGLU forward: share of the roof"].endswith("| at least 93% | 95% | met |")
    assert verdicts["SwiGLU backward: share of the roof"].endswith("| at least 90% | 50% | missed |")
    assert verdicts["SwiGLU: x eager"].endswith("| at least 1.80x | - | not measured |")
    skew = verdicts["MoE layer minimind3-moe: time at 70/10/10/10 over balanced"]
    assert skew.endswith("| at most 1.15x | 1.10x | met |")
    assert next(line for what, line in verdicts.items() if "on a CPU: useful" in what).endswith("| 9.50x | missed |")
    assert next(line for what, line in verdicts.items() if "loop's, padded" in what).endswith("| 5.00x | met |")
    assert next(line for what, line in verdicts.items() if "loop's, the same" in what).endswith("| 2.50x | missed |")
    assert len(lines) == len(goals.GOALS) + 2 and sum("not measured" in line for line in lines) == len(goals.GOALS) - 6


def test_a_report_has_ratios_to_peers_goals_and_reasons(tmp_path):
    file = _written(tmp_path / "a.json", kind="MoE layer", flop_per_s=4.4e14, routing="balanced", direction="both")
    data = json.loads(file.read_text())
    template = data["benchmarks"][0]
    for name, seconds in (
        ("compile", 2.4e-3),
        ("liger", 3e-3),
        ("grouped_mm", 5e-3),
        ("grouped_mm compiled", 4e-3),
        ("dense", 1.8e-3),
    ):
        row = json.loads(json.dumps(template))
        row["extra_info"].update(implementation=name, median_s=seconds, above_the_rule=name == "liger")
        data["benchmarks"].append(row)
    data["minimind_fast"]["skipped"] = {
        "scattermoe is not installed": ["a", "b"],
        "no time without\na right answer": ["c"],
    }
    file.write_text(json.dumps(data))
    assert report.main(["suite", str(file), "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "nvidia_test_1.md"
    text = written.read_text()
    head = next(line for line in text.splitlines() if line.startswith("| group | implementation"))
    ours = next(line for line in text.splitlines() if line.startswith("| model step T=100 | ours"))
    cells = dict(zip(head.split(" | "), ours.split(" | "), strict=True))
    assert [cells[f"x {o}"] for o in ("liger", "dense", "grouped_mm")] == ["1.50", "0.90", "2.00"]  # the better form
    assert cells["TFLOP/s"] == "440" and cells["x compile"] == "1.20" and cells["peak MB"] == "10"
    other = next(line for line in text.splitlines() if line.startswith("| model step T=200 | ours"))
    assert dict(zip(head.split(" | "), other.split(" | "), strict=True))["x liger"] == "-"
    assert "- scattermoe is not installed: 2 rows, such as `a`" in text and "no time without a right answer: 1" in text
    assert text.count(", above the rule |") == 1
    assert "| project goal | bound | measured | verdict |" in text
    again = tmp_path / "again"  # a report's own rows make the same report
    assert report.main(["suite", str(written.with_suffix(".json")), "--out", str(again)]) == 0
    assert (again / written.name).read_text() == text


@pytest.mark.parametrize(
    "function, case, facts",
    [
        ("test_moe_layer", ("minimind3-moe", 12, "70/10/10/10", "grouped_mm", "both"), {"routing": "70/10/10/10"}),
        ("test_moe_layer", ("minimind3-moe", 12, "balanced", "dense", "forward"), {"direction": "forward"}),
        ("test_head_loss", ("minimind2-small", 12, "ours"), {"kind": "head"}),
        ("test_weight_gradient", ("minimind2-small", 70, "o", "bmm x4"), {"projection": "o"}),
    ],
)
def test_rows_of_a_gpu_are_filled(suite, monkeypatch, function, case, facts):
    """The groups' own code as on a GPU, but for where its tensors are and for the clock."""
    suite.on_gpu, suite.dtype = True, torch.float32
    suite.__dict__["roofs"] = {"copy_bytes_per_s": 1e12, "matmul_flop_per_s": 1e14}
    for name, value in (("device_name", "NVIDIA Test"), ("sets", lambda *_: 2), ("peak_bytes", lambda *_: 7)):
        monkeypatch.setattr(harness.Suite, name, value)
    monkeypatch.setattr(harness.Suite, "same_shape", lambda *_: 1e14)
    calls = []

    def samples(given, capture):
        calls.extend(given)
        for call in given:
            call()
        return [1e-3] * 5, 2e-3, "graph replay"

    monkeypatch.setattr(harness, "device_samples", samples)
    seen = SimpleNamespace(extra_info={}, stats=SimpleNamespace(stats=SimpleNamespace(data=[1e-3] * 5)))
    seen.pedantic = lambda target, rounds: None
    module = test_weight_gradients if function == "test_weight_gradient" else test_layers
    getattr(module, function)(case, suite, seen)
    info = seen.extra_info
    assert len(calls) == 2 and info["median_s"] == 1e-3 and info["peak_bytes"] == 7
    assert info["flop_per_s"] == info["flops"] / 1e-3 > 0 and 0 < info["share_of_roof"] < 1
    assert info["error"] < 1e-5 and facts.items() <= info.items()


def test_a_dense_twin_has_the_flops_that_a_token_meets():
    config = ModelConfig.preset("minimind2-moe")
    dense = test_layers._Dense(config)
    met = (
        (config.num_experts_per_tok + config.num_shared_experts) * 3 * config.hidden_size * config.moe_intermediate_size
    )
    assert sum(p.numel() for p in dense.parameters()) == met


def test_experts_are_swapped_for_a_while_only():
    own = ops.moe_mlp
    with pytest.raises(RuntimeError), test_layers._experts_by(torch.add):
        assert ops.moe_mlp is torch.add
        raise RuntimeError
    assert ops.moe_mlp is own
    with test_layers._experts_by(None):
        assert ops.moe_mlp is own


def test_a_peer_may_write_to_the_gradients_that_it_is_given():
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate_up):
            ctx.save_for_backward(gate_up)
            return reference.swiglu(gate_up)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaf = ctx.saved_tensors[0].detach().requires_grad_()
                found = torch.autograd.grad(reference.swiglu(leaf), leaf, grad)
            grad.zero_()
            return found[0]

    for _ in range(2):  # the second would see zeros
        assert all(c.passed for c in _check("swiglu", Writes.apply).values())


def test_by_the_allocator_s_model_packs_of_different_length_cost_fixed_segments_only():
    assert allocator.reserved_share(0.0, False, packs=3) < 1.1
    assert allocator.reserved_share(0.02, False, packs=20) > 1.2 > 1.02 > allocator.reserved_share(0.02, True, packs=20)
