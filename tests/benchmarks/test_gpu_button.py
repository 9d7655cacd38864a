"""The one command for a GPU machine: what it runs, what it says when something is missing, and what its parts write."""

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import pack_for_gpu
from benchmarks.studies import loss_curves, real_run
from minimind_fast.data import samples

ROOT = Path(__file__).resolve().parents[2]
BUTTON = ROOT / "benchmarks" / "gpu.sh"
# The longest that each call may take: a card rented for 15 minutes in all, where one command takes at most ten.
CALLS = {
    "first": (480, ["verify", "steps", "kernels", "loss_curves"]),
    "second": (240, ["tests", "train_step", "zero", "generation"]),
    "third": (600, ["real_run", "engine_share", "layers", "rest"]),
}
KILL_S, INSTALL_S, REPORT_S = 5, 20, 15  # after a part's budget; the wheels' installation; the tables at the end


# ------------------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def button(tmp_path):
    """Runs gpu.sh with a stand-in for Python, which notes what it is asked for; what fails or is missing is told by name."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        """#!/bin/bash
case "$*" in
  *"import deepspeed"*) [[ $LACKING != *deepspeed* ]] ;;
  *"cuda.is_available"*) [[ $LACKING != *gpu* ]] ;;
  -c*) true ;;
  -) cat > /dev/null; echo "a machine" ;;
  *pip\\ install*) echo "$*" >> "$ASKED" ;;
  *) echo "$*" >> "$ASKED"; echo "the part's words"; [[ -z $FAILING || "$*" != *$FAILING* ]] ;;
esac
""",
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "pretrain.jsonl").touch()

    def run(*args, lacking="", failing="", **env):
        places = {name: str(tmp_path / name.lower()) for name in ("OUT", "CORPUS", "WHEELS")}
        own = {"PYTHON": str(stand_in), "ASKED": str(tmp_path / "asked"), "LACKING": lacking, "FAILING": failing}
        environment = {k: v for k, v in os.environ.items() if k not in ("PARTS",)} | places | own | env
        done = subprocess.run([str(BUTTON), *args], env=environment, capture_output=True, text=True, timeout=60)
        asked = tmp_path / "asked"
        return done, asked.read_text().splitlines() if asked.exists() else []

    return run


def told(folder: Path, name: str) -> dict[str, str]:
    """Part -> how it went, from the table of the parts."""
    lines = (folder / f"{name}_parts.tsv").read_text().splitlines()
    return dict(line.split("\t")[:2] for line in lines[1:])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_each_call_runs_all_its_parts_in_order(button, tmp_path, call, dry):
    name, parts = f"gpu_{call}".removesuffix("_first"), CALLS[call][1]
    done, asked = button(*([] if call == "first" else [f"--{call}"]), *dry)
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(tmp_path / "out", name) == dict.fromkeys(parts, "passed")
    assert list(told(tmp_path / "out", name)) == parts and len(asked) == len(parts)
    scripts = [
        re.search(r"(?:benchmarks|tests)/[\w/]+\.py|-m (?:minimind_fast|benchmarks)\.\w+|-m gpu", line)
        for line in asked
    ]
    assert all(scripts), asked
    for line in asked:
        modules = [
            f"{name.replace('.', '/')}.py" for name in re.findall(r"-m ((?:minimind_fast|benchmarks)[\w.]+)", line)
        ]
        for script in [*re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", line), *modules]:
            assert (ROOT / script).is_file(), script


def budgets(call: str, dry: bool) -> list[int]:
    """Of the parts that a call has, from the script's text."""
    text = BUTTON.read_text(encoding="utf-8")
    branches = re.split(r"^(?:if|elif|else)\b.*$", text, flags=re.M)
    mine = [b for b in branches if re.search(rf"^  (?:part|suite) {CALLS[call][1][0]} \d+", b, re.M)]
    assert len(mine) == 2  # the dry run's stands first
    return [int(n) for n in re.findall(r"(?:part|suite) \w+ (\d+) ", mine[0 if dry else 1].split("\nfi")[0])]


@pytest.mark.parametrize("call", CALLS)
def test_the_budgets_of_a_call_fit_into_it(call):
    text = BUTTON.read_text(encoding="utf-8")
    assert f"--kill-after={KILL_S} " in text
    assert f"|| part report {REPORT_S} " in text
    found = [*budgets(call, dry=False), *([REPORT_S] if call != "second" else [])]
    assert len(found) >= 4 and sum(found) + KILL_S * len(found) + INSTALL_S <= CALLS[call][0]


DRY_S = 240  # on a CPU, whatever its parts do


def test_the_budgets_of_the_first_dry_run_end_in_time():
    found = [*budgets("first", dry=True), REPORT_S]
    assert len(found) == 6 and sum(found) + KILL_S * len(found) <= DRY_S


@pytest.mark.proof
def test_the_first_dry_run_goes_through_in_time(tmp_path):
    """Some 40 s of one core."""
    began = time.monotonic()
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # under xdist benchmarks do not time
    how = {"env": env | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}, "timeout": 300}
    done = subprocess.run(
        [str(BUTTON), "--dry-run", "--archive", str(tmp_path / "all.tar.gz")], text=True, capture_output=True, **how
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert time.monotonic() - began < DRY_S
    assert set(told(tmp_path / "out", "gpu").values()) == {"passed"}
    with tarfile.open(tmp_path / "all.tar.gz") as kept:
        names = {Path(name).name for name in kept.getnames()}
    assert {
        "verify.json",
        "verify.md",
        "suite_steps.json",
        "suite_kernels.json",
        "loss_curves.json",
        "gpu.log",
    } <= names


def test_a_part_that_fails_stops_no_other_and_all_that_was_written_is_in_the_archive(button, tmp_path):
    archive = tmp_path / "out" / "all.tar.gz"  # within what it holds, without holding itself
    done, asked = button("--second", "--archive", str(archive), failing="train_step")
    assert done.returncode == 1 and len(asked) == len(CALLS["second"][1])
    assert told(tmp_path / "out", "gpu_second") == dict.fromkeys(CALLS["second"][1], "passed") | {
        "train_step": "failed (1)"
    }
    with tarfile.open(archive) as kept:
        assert {Path(n).name for n in kept.getnames() if Path(n).suffix} == {"gpu_second.log", "gpu_second_parts.tsv"}
        log = kept.extractfile("./gpu_second.log")
        assert log is not None and b"the part's words" in log.read()


def test_parts_can_be_chosen(button, tmp_path):
    done, asked = button("--second", PARTS="generation zero")
    assert done.returncode == 0 and list(told(tmp_path / "out", "gpu_second")) == ["zero", "generation"]


def test_what_is_missing_is_said_with_what_to_do(button, tmp_path):
    for args in ([], ["--second"], ["--third"]):
        done, asked = button(*args, lacking="deepspeed")
        assert done.returncode == 1 and "pack_for_gpu" in done.stdout and not asked
        done, asked = button(*args, lacking="gpu")
        assert done.returncode == 1 and "no GPU here" in done.stdout and "--dry-run" in done.stdout and not asked
    done, asked = button("--third", CORPUS=str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "No real text" in done.stdout and "pack_for_gpu" in done.stdout and not asked
    assert button("--fourth")[0].returncode == 2 and button("--archive")[0].returncode == 2


def test_wheels_that_travelled_are_installed_without_a_network(button, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "deepspeed-1-py3-none-any.whl").touch()
    done, asked = button(lacking="deepspeed", PARTS="verify")
    assert done.returncode == 0 and len(asked) == 2
    assert "--no-index" in asked[0] and "deepspeed-1-py3-none-any.whl" in asked[0]


# ------------------------------------------------------------------------------------------------------------- the corpus


def packed(tmp_path, *more, sft="sft.jsonl"):
    command = [
        sys.executable,
        "-m",
        "benchmarks.pack_for_gpu",
        "--no_wheels",
        "--out",
        tmp_path / "corpus",
    ]
    command += ["--data_path", samples.path("pretrain.jsonl"), "--val_data_path", samples.path("pretrain_val.jsonl")]
    command += ["--sft_data_path", samples.path(sft), "--tokenizer_path", samples.path("tokenizer"), *more]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_corpus_is_cut_to_size_and_found_again(tmp_path):
    whole = samples.path("pretrain.jsonl").stat().st_size
    small = sum(samples.path(n).stat().st_size for n in ("pretrain_val.jsonl", "sft.jsonl"))
    small += sum(file.stat().st_size for file in samples.path("tokenizer").iterdir())
    done = packed(tmp_path, "--max_mb", f"{(small + whole / 3) / 1e6}")
    assert done.returncode == 0, done.stderr
    corpus = pack_for_gpu.find_corpus(tmp_path / "corpus")
    told = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    lines = samples.path("pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    kept = corpus.pretrain.read_text(encoding="utf-8").splitlines()
    assert set(kept) <= set(lines) and len(kept) == told["pretrain"]["rows"] < told["pretrain"]["of_rows"] == len(lines)
    assert whole / 4 < corpus.pretrain.stat().st_size == told["pretrain"]["bytes"] <= whole / 3
    assert kept[-1] in lines[-len(lines) // 10 :]  # thinned, not cut off
    assert told["pretrain"]["tokens"] > 1000 and told["sft"]["rows"] == told["sft"]["of_rows"]


def test_a_corpus_with_a_bad_line_does_not_travel(tmp_path):
    done = packed(tmp_path, sft="dpo.jsonl")
    assert done.returncode == 1 and "line 1" in done.stderr and not (tmp_path / "corpus").exists()


def test_without_a_corpus_only_a_dry_run_goes_on(tmp_path):
    with pytest.raises(ValueError, match="pack_for_gpu"):
        pack_for_gpu.find_corpus(tmp_path)
    assert pack_for_gpu.find_corpus(tmp_path, dry_run=True).pretrain == samples.path("pretrain.jsonl")


# ------------------------------------------------------------------------------------------------- loss curves, a real run


def curves(**shift):
    """Four runs of 40 steps whose losses wander by 0.01 around one curve; `shift` moves the run with kernels on."""
    off = [8.0 - 0.1 * step for step in range(40)]
    found = {}
    for i, name in enumerate(loss_curves.runs("all", "bfloat16")):
        wander = [0.0 if name == "off" else 0.01 * (-1) ** (step + i) for step in range(40)]
        found[name] = {
            "losses": [a + b for a, b in zip(off, wander, strict=True)],
            "val_loss": 4.1,
            "dtype": "bfloat16",
        }
    found["on"]["losses"] = [x + shift.get("loss", 0.0) for x in found["on"]["losses"]]
    found["on"]["val_loss"] += shift.get("val", 0.0)
    return found


def test_curves_within_rounding_agree_and_others_do_not():
    assert loss_curves.judged(curves())["within_noise"]
    assert not loss_curves.judged(curves(loss=0.03))["within_noise"]
    assert not loss_curves.judged(curves(val=0.02))["within_noise"]
    assert not loss_curves.judged(curves(loss=float("nan")))["within_noise"]
    assert loss_curves.judged(curves())["noise"] == pytest.approx(0.01)
    assert loss_curves.fall(curves()["off"]["losses"]) > 3


def test_a_nudge_is_less_than_rounding_to_the_format_may_be():
    import torch

    model = torch.nn.Linear(64, 64)
    before = model.weight.detach().clone()
    loss_curves.nudge(model, 2**-7)
    moved = (model.weight / before - 1).abs()
    assert moved.mean() > 2**-10 and moved.max() <= 2**-8 + 1e-6


def test_loss_curves_go_through_on_a_cpu_and_write_what_they_promise(tmp_path):
    run = [sys.executable, "-m", "benchmarks.studies.loss_curves", "--dry_run", "--steps", "2"]
    run += ["--corpus", str(tmp_path / "none"), "--out", str(tmp_path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "loss_curves.json").read_text())
    assert result["within_noise"] and result["dry_run"] and not result["on_gpu"]
    on, off = (result["runs"][name]["losses"] for name in ("on", "off"))
    assert len(on) == 2 and on == pytest.approx(off, abs=1e-4) and on[1] < on[0]
    how = {name: set(run["ops"].values()) for name, run in result["runs"].items()}
    assert how["on"] == {"kernel: asked for (interpreter)"} and how["off"] == {"reference: switched off"}
    assert (tmp_path / "loss_curves.png").stat().st_size > 5000
    assert "| on |" in (tmp_path / "loss_curves.md").read_text()


LOG = [{"step": 0, "val_loss": 8.8}]
LOG += [
    {
        "step": s,
        "loss": 9.0 - s,
        "useful_tokens": 100 * s,
        "tokens_per_s": 1.0 if s == 1 else 1000.0 + s,
        "mfu": 0.4,
        "memory_gib": s / 8,
    }
    for s in range(1, 6)
]
LOG += [{"step": 5, "val_loss": 4.2}]


def test_a_real_run_is_told_from_its_logs(tmp_path):
    log = "".join(json.dumps(row) + "\n" for row in LOG)
    found = real_run.summary(log)
    assert found["steps"] == 5 and found["tokens"] == 500 and found["tokens_per_s"] == 1003.0
    assert found["memory_gib"] == 5 / 8 and found["val_curve"] == [(0, 8.8), (5, 4.2)]
    output = (
        "step 1\n\nThe model continues (9 tokens in 0.1s):\n  Once upon → a | time\n  从前 → 有个孩子\nDone: 5 steps\n"
    )
    assert real_run.said(output, "continues") == {"Once upon": "a | time", "从前": "有个孩子"}
    stages = {name: {**found, "seconds": 9.0, "ops": ""} for name in ("pretrain", "sft")}
    result = {"device": "NVIDIA Test", "torch": "2", "preset": "minimind3", "minutes": 3, "on_gpu": True}
    result |= {"stages": stages, "continues": real_run.said(output, "continues"), "answers": {"Hm?": "Yes.\nNo."}}
    real_run.write(result, tmp_path)
    text = (tmp_path / "real_run.md").read_text(encoding="utf-8")
    assert "| pretrain | 5 | 500 | 1,003 | 40.0% | 0.6 GiB | 8.000 | 4.000 | 8.800 to 4.200 | 9 s |" in text
    assert "> **Hm?** Yes. No." in text and "a \\| time" in text
    assert json.loads((tmp_path / "real_run.json").read_text()) and (tmp_path / "real_run.png").stat().st_size > 5000


def test_a_real_run_types_commands_that_the_scripts_know(tmp_path):
    from launching import load_script

    from minimind_fast.training.cli import parse
    from minimind_fast.training.config import TrainConfig

    for dry in (False, True):
        corpus = pack_for_gpu.find_corpus(tmp_path, dry_run=True)
        for name, command in real_run.commands(corpus, tmp_path, 3.0, dry).items():
            at = command.index(str(ROOT / "train" / f"{name}.py"))
            cls = TrainConfig if name == "pretrain" else load_script("sft").SFTConfig
            typed = parse(cls, command[at + 1 :])
            assert typed.max_minutes > 0 and typed.save_dir == typed.cache_dir.removesuffix("/cache")
            if not dry and name == "pretrain":
                assert typed.preset == "minimind3" and typed.batch_size * typed.max_seq_len == 53248


def test_a_stage_that_fails_ends_the_run_with_its_name():
    with pytest.raises(ValueError, match="pretrain ended with exit code 3"):
        real_run.run("pretrain", [sys.executable, "-c", "raise SystemExit(3)"])
