"""The docs and READMEs say what is so: commands, options, defaults, data, links and numbers. What they tell is theirs."""

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from launching import load_script, own_config
from pages import CONTRIBUTING, DOCS, PAGES, ROOT, commands, fenced

import minimind_fast
from benchmarks import marked
from minimind_fast import cli
from minimind_fast.commands.plan import Run, compute_seconds, exchanged_bytes
from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.data.chats import ChatEncoder
from minimind_fast.data.minimind import sets
from minimind_fast.data.pairs import PairEncoder
from minimind_fast.data.rows import BadRow, string_field
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.proof.cards import CARDS
from minimind_fast.proof.memory import held
from minimind_fast.recipes import RECIPES
from minimind_fast.rl.rewards import question
from minimind_fast.training.cli import parse

LANGUAGES = ("en", "zh")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
stage_pages = pytest.mark.parametrize(
    "page", sorted(DOCS.glob("*/train_*.md")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


# ------------------------------------------------------------------------------------------------------------- the pages


def test_every_page_is_there_in_both_languages_and_in_the_index():
    names = {language: {p.name for p in (DOCS / language).glob("*.md")} for language in LANGUAGES}
    assert names["en"] == names["zh"]
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    for language in LANGUAGES:
        for name in names[language]:
            assert f"({language}/{name})" in index, f"docs/README.md does not link {language}/{name}"


@pytest.mark.parametrize("folder, prefix", [("kernels", "kernel_"), ("train", "train_")])
def test_a_page_of_a_kernel_or_a_stage_is_of_one_that_exists(folder, prefix):
    for page in (DOCS / "en").glob(f"{prefix}*.md"):
        assert (ROOT / folder / f"{page.stem.removeprefix(prefix)}.py").is_file(), page.name


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://")):
            assert "#" not in target, f"{target}: headings change; link the page"
            assert (page.parent / target).exists(), target


FOLDERS = (
    "minimind_fast",
    "kernels",
    "train",
    "benchmarks",
    "tests",
    "docs",
    "ops",
    "data",
    "weights",
    "infer",
    "serve",
)
FOLDERS += ("training", "rl", "proof", "commands")


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_named_in_the_text_exists(page):
    """A file of the repository by its path, from the root or from the package; `X`, `OP`, `NAME` stand for a name."""
    for name in re.findall(r"`([\w/.]+/[\w.]+\.(?:py|sh|md))`", page.read_text(encoding="utf-8")):
        if name.split("/")[0] in FOLDERS and not re.search(
            r"(?<![A-Za-z])[A-Z]+(?![a-z])", name.removesuffix("README.md")
        ):
            assert (ROOT / name).exists() or (ROOT / "minimind_fast" / name).exists(), name


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_architecture_page_names_no_file_that_is_not_there(language):
    text = (DOCS / language / "architecture.md").read_text(encoding="utf-8")
    sections = re.split(r"^### `([\w/]+)/`.*$", text, flags=re.M)
    named = [(f, name) for f, body in zip(sections[1::2], sections[2::2], strict=True) for name in rows(body)]
    assert len(named) > 50, "the page's lists are not read"
    for folder, name in named:
        assert (ROOT / folder / name).exists(), f"{folder}/{name}"


def rows(text: str) -> list[str]:
    """The names at the head of a list's lines."""
    return re.findall(r"^- `([\w./*]+)`", text, flags=re.M)


# ----------------------------------------------------------------------------------------------------------- the numbers


@every_page
def test_marked_sections_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert marked.refreshed(text) == text, "run python -m benchmarks.report pages"


def test_a_stale_section_is_seen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stale = text.replace("useful tokens/s |", "tokens |")
    assert stale != text and marked.refreshed(stale) == text


def test_no_page_denies_that_a_gpu_was_measured_once_one_was():
    """A result of a GPU in benchmarks/results makes these sentences false: rewrite them then."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "benchmarks" / "results").glob("*.json"))
    measured = any(isinstance(result, dict) and result.get("on_gpu") for result in found)
    deny = [
        p.name for p in PAGES if re.search("not yet run on a GPU|还没有在 GPU 上运行过", p.read_text(encoding="utf-8"))
    ]
    assert not (measured and deny)


@pytest.mark.parametrize("language", LANGUAGES)
def test_bytes_of_each_zero_stage_are_those_of_the_code(language):
    text = (DOCS / language / "deepspeed.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|$", text, re.M)
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    for ranks, micro_batches in ((2, 1), (8, 4)):
        for stage, *cells, sent in rows:
            told = [eval(cell, {"W": ranks}) for cell in cells]
            assert told == list(dataclasses.astuple(held(int(stage), "bfloat16", ranks)))
            share = eval(re.sub(r"(\d)a", r"\1*a", sent), {"a": micro_batches}) * (ranks - 1) / ranks
            assert share == exchanged_bytes(1, int(stage), "bfloat16", ranks, micro_batches)


@pytest.mark.parametrize("language", LANGUAGES)
def test_shares_of_the_pipeline_that_are_told_are_those_of_the_code(language):
    text = (DOCS / language / "train_pipeline.md").read_text(encoding="utf-8")
    shares = {stage.name: f"{100 * stage.share:.0f}" for stage in script("pipeline").STAGES}
    told = [(name, share) for name, share in re.findall(r"(\w+) (\d+)%", text) if name in shares]
    assert all(shares[name] == share for name, share in told)


@pytest.mark.parametrize("language", LANGUAGES)
def test_minimind_s_data_sets_and_their_hours_are_those_of_the_code(language):
    text = (DOCS / language / "data.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    assert told == [(s.file, s.size, s.about, ", ".join(s.stages)) for s in sets.SETS.values()]
    assert all(where in text for where in sets.WHERE)
    hours = re.findall(r"^\| ([A-Z][\w ]+) \| ([\d,]+)k \| (\d+) min \| (\d+) min \|$", text, re.M)
    assert len(hours) == 4
    for card, rate, *minutes in hours:
        seconds = sum(
            compute_seconds(Run(ModelConfig.preset("minimind3"), CARDS[card], tokens=10800, document=200)).values()
        )
        assert float(rate.replace(",", "")) == pytest.approx(10.8 / seconds, abs=0.51)
        for name, told_minutes in zip(("pretrain_t2t_mini", "sft_t2t_mini"), minutes, strict=True):
            assert float(told_minutes) == pytest.approx(sets.find(name).tokens * seconds / 10800 / 60, abs=0.51)


# All options of MiniMind's scripts of August 2026 but those of train_ppo.py and train_agent.py, which are not here.
THEIRS = """
save_dir save_weight epochs batch_size learning_rate device dtype num_workers accumulation_steps grad_clip log_interval
save_interval hidden_size num_hidden_layers max_seq_len use_moe data_path from_weight from_resume use_wandb wandb_project
use_compile lora_name beta student_hidden_size student_num_layers teacher_hidden_size teacher_num_layers student_use_moe
teacher_use_moe from_student_weight from_teacher_weight alpha temperature max_gen_len num_generations loss_type epsilon
epsilon_high reward_model_path debug_mode debug_interval thinking_ratio rollout_engine sglang_base_url sglang_model_path
sglang_shared_path load_from weight lora_weight inference_rope_scaling max_new_tokens top_p open_thinking historys show_speed
"""


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_option_of_minimind_s_is_in_the_table(language):
    text = (DOCS / language / "from_minimind.md").read_text(encoding="utf-8")
    section = text.split("\n## ")[2]
    assert not [name for name in THEIRS.split() if f"`{name}`" not in section]
    recipe = text.split("\n## ")[3]
    assert not [name for name in RECIPES["minimind3"] if f"`--{name}`" not in recipe]


# ---------------------------------------------------------------------------------------------------------- the commands


@cache
def script(name: str):
    return load_script(name)


def parse_options(name: str, argv: list[str]) -> None:
    """As the script itself reads its arguments; raises SystemExit where they are wrong."""
    module = script(name)
    if hasattr(module, "parse_args"):
        module.parse_args(argv)
    else:
        parse(own_config(module), argv)


@cache
def help_of(*command: str) -> str:
    module, function = cli.COMMANDS[command[0]][0].split(":")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)([*command[1:], "--help"])
    return out.getvalue()


def check_command(words: list[str]) -> None:
    """Fail unless the command names what exists, with options that it has."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert f"\n{rest[0]}:" in makefile, f"make {rest[0]}"
        for given in rest[1:]:
            assert rest[0] in ("pretrain", "pipeline") and given.startswith("ARGS=")
            parse_options(rest[0], shlex.split(given.removeprefix("ARGS=")))
    elif program == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        args = parse_args(rest)
        found = re.fullmatch(r"train/(\w+)\.py|minimind_fast\.stages\.(\w+)", args.user_script)
        assert found is not None and bool(found[2]) == args.module, args.user_script
        parse_options(found[1] or found[2], args.user_args)
    elif program == "python" and rest[0] == "-m":
        file = ROOT / f"{rest[1].replace('.', '/')}.py"
        assert file.is_file(), rest[1]
        source = file.read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in rest[2:] if option.startswith("--")), shlex.join(rest)
    elif program in ("python", "torchrun"):
        at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert (ROOT / rest[at]).is_file(), rest[at]
        if rest[at].startswith("train/"):
            parse_options(Path(rest[at]).stem, rest[at + 1 :])
        source = (ROOT / rest[at]).read_text(encoding="utf-8")
        assert rest[at].startswith("train/") or all(f'"{o}"' in source for o in rest[at + 1 :] if o.startswith("--"))
    elif program == "minimind-fast":
        assert rest[0] in cli.COMMANDS, rest[0]
        if rest[0] == "train":
            return parse_options(rest[1], rest[2:]) if rest[1:] else None
        command = rest[:2] if rest[0] == "lora" else rest[:1]
        for option in (word for word in rest if word.startswith("--") and word != "--help"):
            assert re.search(rf"{option}(?![\w-])", help_of(*command)), f"minimind-fast {' '.join(command)} {option}"
    elif program.startswith("benchmarks/"):
        script = (ROOT / program).read_text(encoding="utf-8")
        assert all(f"{option})" in script for option in rest if option.startswith("--"))
    else:
        assert program in ("pip", "pytest", "tensorboard", "lm_eval", "curl", "source"), f"unknown program {program}"


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_names_real_scripts_and_options(page):
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check_command(words)
        except SystemExit as error:
            raise AssertionError(f"wrong options: {shlex.join(words)}") from error


@every_page
def test_python_shown_compiles_and_names_what_the_package_has(page):
    for block in fenced(page.read_text(encoding="utf-8"), "python"):
        compile(block, str(page), "exec")
        for path in re.findall(r"\bmm\.([\w.]+)", block):
            functools.reduce(getattr, path.split("."), minimind_fast)


@cache
def all_options() -> set[str]:
    names = {"num_gpus", "num_nodes", "hostfile", "include", "master_port", "master_addr", "help"}
    for path in (ROOT / "train").glob("*.py"):
        if not hasattr(script(path.stem), "parse_args"):
            names |= {f.name for f in dataclasses.fields(own_config(script(path.stem))) if "help" in f.metadata}
        else:
            names |= set(re.findall(r'"--(\w+)"', path.read_text(encoding="utf-8")))
    stages = [stage.name for stage in script("pipeline").STAGES]
    names |= {f"{s}_{suffix}" for s in [*stages, "tokenizer"] for suffix in ("args", "data_path", "val_data_path")}
    texts = [help_of(command) for command in cli.COMMANDS if command != "train"] + [help_of("lora", "merge")]
    return names | {"config"} | {name for text in texts for name in re.findall(r"--([\w-]+)", text)}


@every_page
def test_every_option_named_in_the_text_exists(page):
    # Tables that set MiniMind's options beside ours name MiniMind's without dashes.
    for name in re.findall(r"`--(?:no_)?([\w-]+)", prose(page.read_text(encoding="utf-8"))):
        assert name in all_options() or f"no_{name}" in all_options(), f"--{name}"


# ------------------------------------------------------------------------------------------- what a stage's page promises


@stage_pages
def test_defaults_are_those_of_the_code(page):
    name = page.stem.removeprefix("train_")
    rows = re.findall(r"^\| `--(\w+)` \| `([^`]*)` \|", page.read_text(encoding="utf-8"), re.M)
    assert rows
    if hasattr(script(name), "parse_args"):
        required = ["--data_path", "x"] if name == "tokenizer" else []
        default = vars(script(name).parse_args(required))
        for option, shown in rows:
            assert str(default[option]) == shown, option
        return
    cls = own_config(script(name))
    for option, shown in rows:
        typed = parse(cls, [f"--{option}", *shown.split()])
        assert getattr(typed, option) == getattr(cls(), option), option


ENCODERS = {"sft": ChatEncoder, "lora": ChatEncoder, "distill": ChatEncoder, "reason": ChatEncoder, "dpo": PairEncoder}


@stage_pages
def test_lines_of_data_shown_are_lines_that_the_stage_reads(page):
    name = page.stem.removeprefix("train_")
    lines = [line for block in fenced(page.read_text(encoding="utf-8"), "json") for line in block.splitlines()]
    assert lines or name == "pipeline"
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    for row in map(json.loads, lines):
        if name in ("pretrain", "tokenizer"):
            assert isinstance(string_field(row, "text"), str)
        elif name == "grpo":
            question(row)
        else:
            assert not isinstance(ENCODERS[name](tokenizer).layouts(row, tokenizer), BadRow)
