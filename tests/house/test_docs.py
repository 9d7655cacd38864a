"""The docs and READMEs say what is so: pages, commands, options, defaults, data, links and numbers."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import re
import runpy
import shlex
from functools import cache
from pathlib import Path

import pytest
from launching import load_script, own_config
from pages import DOCS, PAGES, ROOT, commands, fenced

import minimind_fast
from minimind_fast import cli
from minimind_fast.commands.plan import exchanged_bytes
from minimind_fast.data import samples
from minimind_fast.data.cache import BadRow, string_field
from minimind_fast.data.chats import ChatEncoder
from minimind_fast.data.pairs import PairEncoder
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.proof.memory import held
from minimind_fast.rl.rewards import question
from minimind_fast.training.cli import parse

LANGUAGES = ("en", "zh")
refresh = runpy.run_path(str(ROOT / "benchmarks" / "refresh_readme.py"))
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
def test_every_kernel_and_every_stage_has_a_page(folder, prefix):
    files = {p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert files == {p.stem.removeprefix(prefix) for p in (DOCS / "en").glob(f"{prefix}*.md")}


@every_page
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if not target.startswith(("http://", "https://")):
            assert "#" not in target, f"{target}: headings change; link the page"
            assert (page.parent / target).exists(), target


# ----------------------------------------------------------------------------------------------------------- the numbers


@every_page
def test_marked_sections_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert refresh["refreshed"](text) == text, "run python benchmarks/refresh_readme.py"
    found = re.findall(r"<!-- results:(\w+) -->\n.+?<!-- /results -->", text, re.S)
    wanted = {"cpu": "cpu_pretrain", **{p.stem: f"aot_{p.stem[7:]}" for p in (DOCS / "en").glob("kernel_*.md")}}
    assert page.stem not in wanted or wanted[page.stem] in found


def test_no_page_denies_that_a_gpu_was_measured_once_one_was():
    """A result of a GPU in benchmarks/results makes these sentences false: rewrite them then."""
    found = (json.loads(p.read_text(encoding="utf-8")) for p in (ROOT / "benchmarks" / "results").glob("*.json"))
    measured = any(isinstance(result, dict) and result.get("on_gpu") for result in found)
    deny = [
        p.name for p in PAGES if re.search("not yet run on a GPU|还没有在 GPU 上运行过", p.read_text(encoding="utf-8"))
    ]
    assert not (measured and deny)


# page -> the file and its constants that the page explains; (NAME, unit) where it tells them in another unit.
EXPLAINED = {
    "kernel_rms_norm": (
        "kernels/rms_norm.py",
        ["COLUMNS_PER_WARP", "VALUES_PER_THREAD_FWD", "VALUES_PER_THREAD_BWD", "WARPS_PER_SM_BWD"],
    ),
    "kernel_rope": ("kernels/rope.py", ["VALUES_PER_THREAD", "VALUES_PER_THREAD_NORM_BWD", "WARPS_PER_SM_BWD"]),
    "kernel_swiglu": ("kernels/swiglu.py", ["BLOCK_F", "TILE"]),
    "kernel_linear_cross_entropy": ("kernels/linear_cross_entropy.py", [("CHUNK_BYTES", 2**20), "MIN_CHUNK_ROWS"]),
    "kernel_linear_kl": ("kernels/linear_kl.py", [("CHUNK_BYTES", 2**20), "MIN_CHUNK_ROWS"]),
    "kernel_moe_route": (
        "kernels/moe_route.py",
        ["TILE_T_FEW", "TILE_T_MANY", "TILE_T_SHORT", "FEW_EXPERTS", "BLOCK_D", "DW_PROGRAMS", "MAX_EXPERTS"],
    ),
    "kernel_moe_mlp": ("kernels/moe_mlp.py", ["DW_TILES"]),
    "cpu": ("minimind_fast/ops/cpu/fused.py", ["HEAD_ROWS"]),
    "packing": ("minimind_fast/data/packing.py", ["LOOK_AHEAD_PIECES"]),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", EXPLAINED)
def test_block_sizes_told_are_those_of_the_code(page, language):
    """From the source, not by import: Triton decides at its import how kernels run."""
    text = (DOCS / language / f"{page}.md").read_text(encoding="utf-8").replace(",", "")
    numbers = {int(n) for n in re.findall(r"\d+", re.sub(r"<!-- results.*?/results -->", "", text, flags=re.S))}
    file, names = EXPLAINED[page]
    values: dict[str, int] = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            with contextlib.suppress(Exception):  # what is no constant
                exec(compile(ast.Module([node], []), file, "exec"), values)
    for name in names:
        name, unit = (name, 1) if isinstance(name, str) else name
        assert values[name] // unit in numbers, f"{name} = {values[name]}"


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
def test_shares_of_the_pipeline_are_those_of_the_code(language):
    text = (DOCS / language / "train_pipeline.md").read_text(encoding="utf-8")
    told = re.findall(r"(\w+) (\d+)%", text)
    assert told == [(stage.name, f"{100 * stage.share:.0f}") for stage in script("pipeline").STAGES]


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
        parse_options(re.fullmatch(r"train/(\w+)\.py", args.user_script)[1], args.user_args)
    elif program in ("python", "torchrun"):
        at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
        assert (ROOT / rest[at]).is_file(), rest[at]
        if rest[at].startswith("train/"):
            parse_options(Path(rest[at]).stem, rest[at + 1 :])
        source = (ROOT / rest[at]).read_text(encoding="utf-8")
        assert rest[at].startswith("train/") or all(f'"{o}"' in source for o in rest[at + 1 :] if o.startswith("--"))
    elif program == "minimind-fast":
        assert rest[0] in cli.COMMANDS, rest[0]
        command = rest[:2] if rest[0] == "lora" else rest[:1]
        for option in (word for word in rest if word.startswith("--") and word != "--help"):
            assert re.search(rf"{option}(?![\w-])", help_of(*command)), f"minimind-fast {' '.join(command)} {option}"
    elif program.startswith("benchmarks/"):
        script = (ROOT / program).read_text(encoding="utf-8")
        assert all(f"{option})" in script for option in rest if option.startswith("--"))
    else:
        assert program in ("pip", "pytest", "tensorboard", "lm_eval", "curl", "source"), f"unknown program {program}"


@every_page
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
    texts = [help_of(command) for command in cli.COMMANDS] + [help_of("lora", "merge")]
    return names | {"config"} | {name for text in texts for name in re.findall(r"--([\w-]+)", text)}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.parent == DOCS], ids=lambda p: f"{p.parent.name}-{p.stem}"
)
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
