"""Two steps of training through the deepspeed launcher on one GPU, ZeRO 0 to 3, against the same steps on the CPU.

The truth is the CPU's steps in float32 with every kernel off; the yardstick is how far the CPU's bfloat16 steps are from
it. As in `test_zero_stages.py`, this file is both the test and the script that the processes run. Without a GPU the
launcher starts the same on the CPU.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import ROOT, free_port, load_script, read_log, write_corpus

import minimind_fast as mm
from minimind_fast.ops import cards
from minimind_fast.training import log as progress

HAS_GPU = torch.cuda.is_available()
MODELS = {"dense": "minimind3", "moe": "minimind3-moe"}
STEPS = (1, 2)
RUNS = [*(("ours", stage) for stage in "0123"), *(("graphs", stage) for stage in "012")]  # graphs: with --cuda_graphs
ROUNDING = 2**-10  # relative, for a mean of some hundred losses; the CPU's bfloat16 steps are within 2**-11


def run_all(folder: Path, models: str, runs: list[str]) -> None:
    """Train each model in each run (name:zero_stages:dtype:kernels), as `train/pretrain.py` does."""
    # Plots and measuring the machine would take longer than the training.
    progress.draw_loss, cards.peak_flops = lambda *_: None, lambda *_: (1.0, "not measured")
    module = load_script("pretrain")
    common = ["--data_path", str(folder / "text.jsonl"), "--val_data_path", str(folder / "val.jsonl")]
    common += ["--hidden_size", "128", "--num_hidden_layers", "2", "--max_seq_len", "64", "--batch_size", "8"]
    common += ["--accumulation_steps", "2", "--max_steps", str(len(STEPS)), "--learning_rate", "5e-3"]
    common += ["--lr_schedule", "constant", "--log_interval", "1", "--val_interval", "1", "--num_threads", "1"]
    common += ["--sample_tokens", "0", "--save_dir", str(folder)]
    for model in models.split(","):
        for name, zero_stages, dtype, kernels in (run.split(":") for run in runs):
            for zero_stage in zero_stages:
                own = ["--preset", MODELS[model], "--zero_stage", zero_stage, "--dtype", dtype, "--kernels", kernels]
                own += ["--cuda_graphs"] if name == "graphs" else []
                sys.argv = ["pretrain.py", *common, *own, "--save_weight", f"{name}-{model}-{zero_stage}"]
                module.main()


def start(arguments: list[str], on_gpu: bool) -> subprocess.Popen:
    """Start through the launcher, as a user would; the environment decides whether there is a GPU."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIMIND_KERNELS")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    if not on_gpu:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "1"]
    command = [*launch, "--master_port", str(free_port()), __file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module", params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def runs(request, tmp_path_factory):
    """The folder of all runs."""
    on_gpu = request.param == "cuda"
    if HAS_GPU and not on_gpu:
        pytest.skip("the GPU's run is the test here")
    folder = tmp_path_factory.mktemp("training")
    write_corpus(folder / "text.jsonl", 200)
    write_corpus(folder / "val.jsonl", 40, seed=1)
    # Without a GPU one case shows that the test works; test_zero_stages.py covers the stages on a CPU.
    models, stages = (list(MODELS), "0123") if on_gpu else (["dense"], "1")
    ours = ["ours:0123:bfloat16:all", "graphs:012:bfloat16:all"] if on_gpu else ["ours:1:bfloat16:auto"]
    what = [str(folder), ",".join(models)]
    processes = [
        start([*what, "truth:0:float32:none", f"eager:{stages}:bfloat16:none"], on_gpu=False),
        start([*what, *ours], on_gpu),
    ]
    try:
        for process in processes:
            said = process.communicate(timeout=240)[0]
            assert process.returncode == 0, said[-6000:]
    finally:
        for process in processes:
            process.kill()
    return folder


def losses(folder: Path, run: str) -> list[float]:
    log = read_log(folder / run)
    return [log[step][name] for step in STEPS for name in ("loss", "val_loss")]


def weights(folder: Path, run: str) -> torch.Tensor:
    model = mm.load_pretrained(folder / run / "weights", dtype=torch.float32)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name, zero_stage", RUNS)
@pytest.mark.parametrize("model", MODELS)
def test_two_steps_lose_what_the_cpu_loses_in_float32(runs, model, name, zero_stage):
    if not HAS_GPU and (name, zero_stage, model) != ("ours", "1", "dense"):
        pytest.skip("without a GPU one case shows that the test works")
    want, got = (losses(runs, run) for run in (f"truth-{model}-0", f"{name}-{model}-{zero_stage}"))
    assert want[0] - want[-1] > 32 * ROUNDING * want[0]  # a skipped step would show
    assert got == pytest.approx(want, rel=ROUNDING)


@pytest.mark.parametrize("name, zero_stage", RUNS)
def test_two_steps_move_the_weights_as_exactly_as_eager_steps_do(runs, name, zero_stage):
    """By the error rule's norm, for the dense model: rounding changes a mixture's choice of experts."""
    if not HAS_GPU and (name, zero_stage) != ("ours", "1"):
        pytest.skip("without a GPU one case shows that the test works")
    truth, eager, ours = (
        weights(runs, f"{run}-dense-{stage}")
        for run, stage in (("truth", "0"), ("eager", zero_stage), (name, zero_stage))
    )
    error, allowed = ((w - truth).norm().item() for w in (ours, eager))
    assert math.isfinite(error) and 0 < error <= 1.25 * allowed


if __name__ == "__main__":
    folder, models, *runs_of_it = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    run_all(Path(folder), models, runs_of_it)
