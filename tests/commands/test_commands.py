"""Every command of the READMEs and of docs/ is run, in the order in which a reader would come to need it.

All run in one folder, each on what those before it left there: the real scripts with the options that are written, cut in
size only. Data files of the names that the pages use hold a few rows of the samples; the presets are narrow; a file of
defaults (--config) asks for two steps, which an option that is written overrules; ports are free ones. A script runs
in a fork of one process (`forking`), by which it starts in no time; `make pretrain` goes by the launcher itself.
"""

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forking import Forks
from launching import free_port, load_script, own_config
from pages import DOCS, PAGES, ROOT, commands, fenced

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.training.cli import parse

LM_EVAL = "lm_eval --model hf --model_args pretrained=out/hf,dtype=float32"
NO_LM_EVAL = "lm-eval is not installed here; tests/weights/test_exchange.py holds what its answers rest on"
# What is not run -> why; test_docs.py holds its options to the scripts' own parsers. `make pipeline` is made, up to the
# commands of its stages (`check_chain`).
NOT_RUN = {
    "make test": "it is this suite",
    "make aot": "minutes; CI runs it in make proof",
    "make proof": "minutes; CI runs it after the suite",
    "minimind-fast verify --device ptx:sm_90 --ops swiglu": "a minute; tests/proof/ptx/test_compiled.py runs such cases",
    "make bench": "minutes; tests/benchmarks/test_bench.py runs some of the suite",
    "pytest benchmarks/ --benchmark-json=run.json": "minutes; tests/benchmarks/test_bench.py runs some of the suite",
    "python -m benchmarks.report suite run.json": "needs the file of the line before; test_bench.py has others",
    "source .venv/bin/activate": "the environment is that of the tests",
    "pip install 'lm-eval[hf]'": "needs a network",
    f"{LM_EVAL},add_bos_token=True --device cpu --batch_size 8 --include_path tasks --tasks my_choices": NO_LM_EVAL,
    f"{LM_EVAL} --device cpu --batch_size 8 --include_path tasks --tasks my_texts": NO_LM_EVAL,
    "pip install -c constraints.txt -e '.[serve]'": "needs a network",
    "pip install -c constraints.txt -e '.[gguf]'": "needs a network",
    "python -m benchmarks.pack_for_gpu --data_path pretrain.jsonl --val_data_path val.jsonl --sft_data_path chats.jsonl "
    "--tokenizer_path FOLDER": "needs a network for wheels; tests/benchmarks/test_gpu_button.py packs without them",
    "benchmarks/gpu.sh --dry-run": "minutes; tests/benchmarks/test_gpu_button.py goes through its parts",
    "benchmarks/gpu.sh --second --dry-run": "minutes; tests/benchmarks/test_gpu_button.py goes through its parts",
    "benchmarks/gpu.sh --archive all.tar.gz": "needs a GPU; tests/benchmarks/test_gpu_button.py goes through its parts",
    "benchmarks/gpu.sh --third": "needs a GPU; tests/benchmarks/test_gpu_button.py goes through its parts",
    "benchmarks/gpu.sh --second": "needs a GPU; tests/benchmarks/test_gpu_button.py goes through its parts",
    "PARTS=verify benchmarks/gpu.sh": "needs a GPU; tests/benchmarks/test_gpu_button.py chooses parts",
    "deepspeed train/grpo.py --data_path rlaif.jsonl --recipe minimind3 --reward_model_path internlm2-1_8b-reward "
    "--trust_remote_code": "needs a network for the model; tests/rl/test_rewards.py has a tiny one of its kind",
    "python train/pipeline.py --save_dir out/try --max_steps 3": "tests/stages/test_pipeline.py runs the chain so",
}
# What stands before the script -> why the script runs on one rank all the same. test_docs.py parses it.
ON_ONE_RANK = {
    "deepspeed --num_gpus 8": "needs eight GPUs",
    "deepspeed --include localhost:0,2": "needs three GPUs",
    "deepspeed --hostfile hostfile": "needs two machines",
    "torchrun --nproc_per_node 8": "needs eight GPUs",
    **{
        f"torchrun --nnodes 2 --node_rank {rank} --nproc_per_node 8 --master_addr node1 --master_port 29500": "two machines"
        for rank in (0, 1)
    },
    "deepspeed --num_gpus 2": "tests/training/test_training.py starts two ranks by the launchers",
}
# Pretraining first, what goes on from it after: each page reads the folder that those before it left.
FIRST = ["train_tokenizer", "train_pretrain", "cpu", "deepspeed", "README", "README_zh"]
LAST = ["from_minimind"]  # fine-tunes a model of another shape
SIZES: dict[str, Any] = dict(max_steps=2, batch_size=4, max_seq_len=64, accumulation_steps=1, log_interval=1)
SIZES |= dict(num_threads=1, sample_tokens=2, cache_dir="cache")
SHAPE = dict(hidden_size=64, num_hidden_layers=2)
OWN = ("grpo", "pretrain")  # pages with functions for mine.py: a reward, a loss
PLACE_OF_RESULT = {"export": 2, "import": 2, "lora merge": 4, "lora convert": 3}  # among the words of a tool
NARROW = f"from minimind_fast.config import PRESETS\nfor preset in PRESETS.values(): preset.update({SHAPE})\n"
FEW_CASES = "from minimind_fast.proof.cases import CASES\nCASES.update({op: some[-2:] for op, some in CASES.items()})\n"
SOMETHING = "import torch\ninput_ids = torch.randint(0, 6400, (1, 9))\ntargets = input_ids + 1\n"


def in_order() -> dict[str, str]:
    """Every command -> the page that it was met on first."""

    def key(page: Path) -> tuple[int, str]:
        rank = FIRST.index(page.stem) if page.stem in FIRST else len(FIRST) + (page.stem in LAST)
        return rank, page.stem

    found: dict[str, str] = {}
    for page in sorted(PAGES, key=key):
        for words in commands(page.read_text(encoding="utf-8")):
            found.setdefault(shlex.join(words), page.stem)
    return found


def needs_interpreter(words: list[str]) -> bool:
    """Whether it runs Triton kernels, which a CPU does only where Triton was imported under its interpreter."""
    asked = words[words.index("--kernels") + 1] if "--kernels" in words else "none"
    return words[:2] == ["minimind-fast", "verify"] or asked not in ("none", "auto")


def write_data(folder: Path) -> None:
    """The files that the pages name: few rows of the samples."""
    sources = {"a": "pretrain", "b": "pretrain_val", "val": "pretrain_val", "chats": "sft", "sft_mini_512": "sft"}
    sources |= {"pretrain_t2t_mini": "pretrain", "sft_t2t_mini": "sft", "rlaif": "grpo"}  # as MiniMind names them
    sources |= {"dpo": "dpo", "pairs": "dpo", "val_pairs": "dpo_val", "prompts": "grpo", "identity": "lora_identity"}
    sources |= {"reason": "reason", "my": "pretrain"}
    for name, source in sources.items():
        lines = samples.path(f"{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:60]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rng = random.Random(0)  # words enough for the largest vocabulary that is asked for
    words = ["".join(rng.choices(string.ascii_lowercase, k=9)) for _ in range(2500)]
    with (folder / "my.jsonl").open("a", encoding="utf-8") as file:
        for at in range(0, len(words), 25):
            file.write(json.dumps({"text": " ".join(words[at : at + 25] * 2)}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A clone's scripts, and what a reader has: data, a DeepSpeed file, a reward, a teacher, MiniMind's files."""
    made = tmp_path_factory.mktemp("reader")
    for name in ("train", "benchmarks"):
        shutil.copytree(ROOT / name, made / name, ignore=shutil.ignore_patterns("results", "wheels", "corpus", "*.pyc"))
    benchmark = made / "benchmarks" / "studies" / "cpu_pretrain.py"
    small = benchmark.read_text(encoding="utf-8").replace("ROWS, LENGTH = 8, 512", "ROWS, LENGTH = 2, 32")
    benchmark.write_text(small, encoding="utf-8")
    shutil.copytree(samples.path("tokenizer"), made / "minimind_tokenizer")
    write_data(made)
    (made / "shared").mkdir()
    shutil.copyfile(made / "my.jsonl", made / "shared" / "my.jsonl")
    (made / "ds.json").write_text(fenced((DOCS / "en" / "deepspeed.md").read_text(encoding="utf-8"), "json")[0])
    own = [fenced((DOCS / "en" / f"train_{name}.md").read_text(encoding="utf-8"), "python")[0] for name in OWN]
    (made / "mine.py").write_text("\n".join(own))
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    for name, preset, form in (("big_model", "minimind3", "minimind"), ("pretrain_512.pth", "minimind2-small", "pth")):
        model = mm.MiniMind(mm.ModelConfig.preset(preset, **SHAPE))
        mm.save_pretrained(model, made / name, format=form, tokenizer=tokenizer if form == "minimind" else None)
    (made / "sizes.json").write_text(json.dumps(SIZES))
    (made / "launched.json").write_text(json.dumps(SIZES | SHAPE))
    (made / "grpo.json").write_text(json.dumps(SIZES | dict(num_generations=2, max_gen_len=4)))
    return made


class Reader:
    """Types commands in a folder; what a command does not leave behind is an error."""

    def __init__(self, folder: Path, forks: Forks, interprets: bool) -> None:
        self.folder, self.forks, self.log, self.interprets = folder, forks, folder / "said", interprets
        self.done: set[tuple[str, ...]] = set()

    def type(self, command: str) -> None:
        """Run a command of the pages, and look for what it promises."""
        program, *rest = shlex.split(command)
        if program == "curl":
            self.serve(["minimind-fast", "serve", "out/sft/weights"], rest)
        elif program == "make":
            self.make(*rest)
        elif program == "minimind-fast" and rest[0] == "serve":
            self.serve([program, *rest])
        elif program == "minimind-fast":
            self.tool(rest)
        elif rest[:1] == ["-m"]:
            self.script(rest[1], rest[2:])
        else:
            at = next((i for i, word in enumerate(rest) if word.endswith(".py")), -1)
            assert at >= 0, "neither run nor in NOT_RUN with a reason"
            launcher = shlex.join([program, *rest[:at]])
            assert launcher in ("python", "deepspeed", *ON_ONE_RANK), f"{launcher}: how many ranks? See ON_ONE_RANK"
            self.script(rest[at], [word.replace("/shared/", "shared/") for word in rest[at + 1 :]])

    def run(self, target: str, argv: list[str], said: str = "", before: str = "") -> str:
        """Run a script or a tool to its good end -> what it said."""
        code = self.forks.start(target, argv, self.folder, self.log, said, before).wait()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        assert code == 0, f"exit code {code}: {shlex.join([target, *argv])}\n{text[-3000:]}"
        assert "Traceback" not in text, text
        return text

    def script(self, path: str, argv: list[str]) -> None:
        """A script of train/, or a module of benchmarks/."""
        if (path, *argv) in self.done:  # the same by another launcher
            return
        self.done.add((path, *argv))
        name = Path(path).stem if path.endswith(".py") else path.split(".")[-1]
        if name == "tokenizer":
            self.run(path, argv)
            self.left(f"{value(argv, '--save_dir', 'out/tokenizer')}/tokenizer.json")
        elif name == "cpu_pretrain":
            self.run(path, [*argv, "--preset", "tiny", "--turns", "1", "--threads", "1"], before=NARROW)
            self.left("benchmarks/results/cpu_pretrain.json", "benchmarks/results/cpu_pretrain.md")
        else:
            self.train(path, name, argv)

    def train(self, path: str, name: str, argv: list[str]) -> None:
        """A stage: its weights, log and curve, and a checkpoint to go on from."""
        sizes = ["--config", "grpo.json" if name == "grpo" else "sizes.json"]
        steps = 2
        if "--from_resume" in argv:  # from what the same command without it leaves
            self.run(path, [*(word for word in argv if word != "--from_resume"), *sizes], before=NARROW)
            steps = 4
        if {"--max_steps", "--from_resume"} & set(argv):
            sizes += ["--max_steps", str(steps)]
        if needs_interpreter(argv):
            sizes += ["--max_seq_len", "16", "--batch_size", "1"]
        said = self.run(path, [*argv, *sizes], before=NARROW)
        run = f"{value(argv, '--save_dir', 'out')}/{value(argv, '--save_weight', name)}"
        rows = [json.loads(line) for line in self.left(f"{run}/log.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == steps and f"Done: {steps} steps" in said
        made = ["loss.png", "tensorboard", "checkpoints", "weights/config.json"]
        self.left(*(f"{run}/{part}" for part in [*made, *["adapter/adapter_config.json"] * (name == "lora")]))

    def tool(self, argv: list[str]) -> None:
        """A command of `minimind-fast` that comes to an end."""
        before = said = ""
        words = argv
        if argv[0] == "verify":
            before, words = NARROW + FEW_CASES, [*argv, "--dtype", "float32", "--jobs", "0"]
            words += [] if "--models" in argv else ["--preset", "minimind3"]
        elif argv[0] in ("chat", "generate"):
            said, words = "hello", [*argv, "--max_new_tokens", "4"]
        elif argv[0] == "import":
            before = NARROW
            if not (self.folder / argv[1]).exists():
                assert argv[1] == "some_hf_folder"
                shutil.copytree(self.folder / "out" / "hf", self.folder / argv[1])
        place = PLACE_OF_RESULT.get(" ".join(argv[: 2 if argv[0] == "lora" else 1]))
        if place:  # two pages may name the same
            there = self.folder / argv[place]
            shutil.rmtree(there, ignore_errors=True)
            for file in (there, there.with_suffix(".Modelfile")):
                file.unlink(missing_ok=True)
        text = self.run("minimind-fast", words, said, before)
        if place:
            is_file, inside = argv[place].endswith((".pth", ".gguf")), "model.gguf" if "gguf" in argv else "config.json"
            self.left(argv[place] if is_file else f"{argv[place]}/{inside}")
        else:
            wanted = {"verify": r"\d+ of \d+ pass", "plan": "GPU", "eval": "usage", "generate": r"\S", "chat": r"\S"}
            assert re.search(wanted[argv[0]], text), text

    def left(self, *names: str) -> Path:
        """Assert that these are there; the first."""
        for name in names:
            assert (self.folder / name).exists(), f"{name} is not there"
        return self.folder / names[0]

    def serve(self, argv: list[str], curl: list[str] | None = None) -> None:
        """The server, on a free port, up to its page; or a request to it, by curl's options, up to an answer."""
        port = str(free_port())
        process = self.forks.start(
            "minimind-fast", [*argv[1:], "--port", port, "--max_new_tokens", "4"], self.folder, self.log
        )
        try:
            end = time.monotonic() + 60
            while "a chat page" not in self.log.read_text(encoding="utf-8"):
                assert time.monotonic() < end, f"no server after a minute: {self.log.read_text(encoding='utf-8')}"
                time.sleep(0.05)
            if curl is None:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
                    assert "<html" in page.read().decode()
                return
            parser = argparse.ArgumentParser()
            parser.add_argument("url")
            parser.add_argument("-H", dest="header")
            parser.add_argument("-d", dest="data")
            asked = parser.parse_args(curl)
            header = dict([asked.header.split(": ")])
            request = urllib.request.Request(asked.url.replace(":8000", f":{port}"), asked.data.encode(), header)
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert json.load(answer)["choices"][0]["message"]["role"] == "assistant"
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait()
            said = self.log.read_text(encoding="utf-8")
        assert code in (0, 130) and "Traceback" not in said, said

    def make(self, target: str, given: str = "ARGS=") -> None:
        """A target of the Makefile, in an environment that is installed already."""
        programs = self.folder / "venv" / "bin"
        programs.mkdir(parents=True, exist_ok=True)
        launcher = Path(sys.executable).with_name("deepspeed")
        stand_ins = {
            "deepspeed": f'exec {shlex.quote(str(launcher))} --master_port {free_port()} "$@"',
            "python": f'exec {shlex.quote(sys.executable)} -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$@"',
        }
        for name, line in stand_ins.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)
        if target == "pretrain":
            given += f" --config {self.folder / 'launched.json'}"
        command = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", "venv/installed", "VENV=venv", target, given]
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "MINIMIND_KERNELS", "MAKEFLAGS")}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        if target == "pretrain":
            assert "Next: minimind-fast generate out/pretrain/weights" in done.stdout
            self.left("out/pretrain/weights/config.json", "out/pretrain/loss.png", "out/pretrain/checkpoints")
        else:
            check_chain(json.loads(done.stdout))


def value(argv: list[str], option: str, default: str) -> str:
    return argv[argv.index(option) + 1] if option in argv else default


def check_chain(argv: list[str]) -> None:
    """What `make` hands to train/pipeline.py is a chain of commands that each stage understands.

    tests/stages/test_pipeline.py runs the chain.
    """
    assert argv[0] == "train/pipeline.py"
    pipeline = load_script("pipeline")
    args = pipeline.parse_args(argv[1:])
    load_script("tokenizer").parse_args(pipeline.tokenizer_command(args)[2:])
    for stage in pipeline.STAGES:
        words = pipeline.stage_command(args, stage)
        at = next(i for i, word in enumerate(words) if word.endswith(f"{stage.name}.py"))
        parse(own_config(load_script(stage.name)), words[at + 1 :])


@pytest.fixture(params=[pytest.param("", id="plain", marks=pytest.mark.slow), pytest.param("1", id="interpreter")])
def reader(request, folder) -> Iterator[Reader]:
    """With Triton as it is, or under its interpreter: that is decided when it is imported."""
    dropped = ("TRITON_INTERPRET", "MINIMIND_KERNELS", "MINIMIND_API_KEY")
    env = {name: text for name, text in os.environ.items() if name not in dropped}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    forks = Forks(env | ({"TRITON_INTERPRET": "1"} if request.param else {}))
    yield Reader(folder, forks, bool(request.param))
    forks.close()


def test_every_command_does_what_it_says(reader):
    for command, page in in_order().items():
        if command not in NOT_RUN and needs_interpreter(shlex.split(command)) == reader.interprets:
            try:
                reader.type(command)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page}: {command}\n{error}") from error
    if not reader.interprets:
        for page in PAGES:
            for number, block in enumerate(fenced(page.read_text(encoding="utf-8"), "python")):
                if "setup.begin(" in block:  # half an hour of training; tests/training/test_run.py cuts it short
                    continue
                script = reader.folder / f"{page.stem}_{number}.py"
                script.write_text(SOMETHING + block, encoding="utf-8")
                reader.run(script.name, [])


def test_what_is_not_run_is_in_the_pages():
    there = in_order()
    assert set(NOT_RUN) <= set(there), set(NOT_RUN) - set(there)
    assert all(any(command.startswith(f"{start} ") for command in there) for start in ON_ONE_RANK)
