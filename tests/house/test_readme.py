"""The READMEs say what is so."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
refreshed = runpy.run_path(str(ROOT / "benchmarks" / "refresh_readme.py"))["refreshed"]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_numbers_are_those_of_the_committed_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- results:cpu_pretrain -->" in text
    assert refreshed(text) == text, "run python benchmarks/refresh_readme.py"


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_tree_names_every_source_file_and_no_other(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = text.split("```\nminimind_fast/")[1].split("```")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {p.name for folder in ("minimind_fast", "train") for p in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert named == there


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_every_make_target_and_option_named_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    options = (ROOT / "minimind_fast" / "training" / "config.py").read_text(encoding="utf-8")
    for option in re.findall(r"`--(?:no_)?(\w+)", text):
        assert f"    {option}: " in options or option in ("num_gpus", "help"), option
