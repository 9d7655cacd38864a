"""`minimind-fast train`: lists the stages, runs one, and says what is wrong."""

import sys
from pathlib import Path

import pytest

from minimind_fast import cli
from minimind_fast.commands import train

STAGES = {path.stem for path in (Path(__file__).resolve().parents[2] / "train").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("argv", [["train"], ["train", "--help"]])
def test_without_a_stage_it_lists_them_a_line_each(capsys, argv):
    assert cli.main(argv) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")][:-1]
    assert {words[0] for words in listed} == STAGES and all(len(words) > 3 for words in listed)


def test_an_unknown_stage_is_a_sentence_with_the_names(capsys):
    assert cli.main(["train", "sftt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no stage 'sftt'") and all(name in said for name in STAGES)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_is_handed_its_options(capsys, monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["minimind-fast"])
    with pytest.raises(SystemExit) as end:
        train.main([name, "--help"])
    assert end.value.code == 0 and f"usage: minimind-fast train {name} " in capsys.readouterr().out
