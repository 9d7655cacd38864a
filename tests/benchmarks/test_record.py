"""A result says when it was made, at which commit, on which processor, by which command."""

import json
import re

import pytest

from benchmarks import record

RESULTS = sorted(record.RESULTS.glob("*.md"))
KEYS = {"date", "commit", "processor", "command"}


@pytest.mark.parametrize("file", RESULTS, ids=lambda p: p.stem)
def test_every_committed_result_has_its_head(file):
    text = file.read_text(encoding="utf-8")
    assert re.match(r"\*Made 20\d\d-\d\d-\d\d.*, commit [0-9a-f]{7}.*: `.+`\*\n\n", text)
    assert not record.body(text).startswith("*Made")
    data = file.with_suffix(".json")
    if data.exists():
        head = json.loads(data.read_text(encoding="utf-8"))["made"]
        assert head.keys() == KEYS and text.startswith(record.line(head))


def test_every_json_has_a_table_beside_it():
    assert {p.stem for p in record.RESULTS.glob("*.json")} <= {p.stem for p in RESULTS}


def test_a_result_is_written_with_its_head_and_read_without(tmp_path):
    record.write(tmp_path / "new" / "some", {"ratio": 0.1}, "A table.\n")
    data = json.loads((tmp_path / "new" / "some.json").read_text(encoding="utf-8"))
    text = (tmp_path / "new" / "some.md").read_text(encoding="utf-8")
    assert list(data) == ["made", "ratio"] and data["made"].keys() == KEYS and all(data["made"].values())
    assert text == record.line(data["made"]) + "A table.\n" and record.body(text) == "A table.\n"
    assert record.body("A table.\n") == "A table.\n"


@pytest.mark.parametrize(
    "argv, shown",
    [
        (
            ["/a/python", "-m", "benchmarks.x", "--data_path", "/a/b c.jsonl"],
            "python -m benchmarks.x --data_path 'b c.jsonl'",
        ),
        (["/a/python", "/a/bin/pytest", "benchmarks/", "--json=/a/b/run.json"], "pytest benchmarks/ --json=run.json"),
        (["python", "tool.py", "out/here", "3/4"], "python tool.py out/here 3/4"),
    ],
)
def test_a_command_names_no_folder_of_this_machine(argv, shown):
    assert record.command(argv) == shown
