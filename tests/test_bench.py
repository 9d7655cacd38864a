"""The benchmark suite's own promises: no time without a right answer, device time by events, numbers from files only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # a script's own folder comes first there too

import harness  # noqa: E402
import implementations  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402

from minimind_fast import reference  # noqa: E402
from minimind_fast.roofline import Work  # noqa: E402


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
    head = {"device": device, "on_gpu": on_gpu, "torch": "2", "roofs": roofs, "limits": ["What it can tell."]}
    file.write_text(json.dumps({"benchmarks": rows, "minimind_fast": head, "machine_info": {"node": "my-host"}}))
    return file


def test_a_report_is_made_of_files(tmp_path):
    runs = [_written(tmp_path / "a.json"), _written(tmp_path / "b.json", median_s=1e-3)]
    out = tmp_path / "results"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    text = (out / "nvidia_test_1.md").read_text()
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
    assert report.main([str(one), str(two), "--out", str(tmp_path)]) == 2
    assert "NVIDIA Test 2" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{}")
    assert report.main([str(tmp_path / "c.json"), "--out", str(tmp_path)]) == 2
    assert "not written by this suite" in capsys.readouterr().err


def test_the_suite_runs_says_its_limits_and_keeps_pytest_benchmarks_options(tmp_path):
    file = tmp_path / "run.json"
    run = [sys.executable, "-m", "pytest", "benchmarks/test_kernels.py", "-p", "no:cacheprovider", "--threads", "1"]
    run += ["--tokens", "16", "--presets", "minimind2-small", "-k", "swiglu and not compile and not linear"]
    run += ["-rs", f"--benchmark-json={file}", "--benchmark-min-rounds=4"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # pytest-benchmark rests under xdist
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, env=alone)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "anything of the Triton kernels" in done.stdout and "Liger-Kernel is not installed" in done.stdout
    rows = json.loads(file.read_text())["benchmarks"]
    assert {r["extra_info"]["direction"] for r in rows} == {"forward", "backward", "both"}
    eager = [r for r in rows if r["extra_info"]["implementation"] == "eager"]
    for row in eager:
        info = row["extra_info"]
        assert info["times_eager"] == 1 and info["bytes"] > 0 and row["stats"]["rounds"] >= 4
        assert info["error"] == info["eager_error"] > 0
        assert "share_of_roof" not in info  # toy shapes lie in caches
