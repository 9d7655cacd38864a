"""What the README shows is made from what was printed and measured: the newcomer's minute, the proof."""

import json

import pytest

from benchmarks import report

OUTPUT = """Installing into .venv
pip install
tiny: 5.0M parameters
326 optimizer steps
Validation loss at step 0: 8.8
step  10/326  loss 8.1
step  20/326  loss 6.3
step  30/326  loss 5.3
step 320/326  loss 0.5
Validation loss at step 325: 0.5

The model continues (239 tokens in 0.2s):
  one
  Once upon a time -> there
Done: 325 steps
  weights  out
Next: generate"""

SHOWN = """Installing into .venv
...
tiny: 5.0M parameters
...
Validation loss at step 0: 8.8
step  10/326  loss 8.1
step  20/326  loss 6.3
...
step 320/326  loss 0.5
Validation loss at step 325: 0.5

The model continues (239 tokens in 0.2s):
...
  Once upon a time -> there
Done: 325 steps
  weights  out
Next: generate"""


def test_the_first_minute_keeps_whole_lines_and_marks_what_is_missing():
    assert report.shorten(OUTPUT.splitlines()) == SHOWN.splitlines()


def test_a_run_that_died_is_shown_as_far_as_it_came():
    assert report.shorten(["tiny: 5.0M parameters", "error"]) == ["tiny: 5.0M parameters"]


def executed(folder, name, *rows, device="CPU, the PTX compiled for sm_90: small cases", complete=True):
    file = folder / name
    file.write_text(json.dumps({"device": device, "complete": complete, "rows": rows}))
    return file


def executed_case(op, passed=True, case="one row"):
    ran = {"opcodes": {"add.f32": 7}, "launches": {"_k": 2}, "programs": {"_k": 3}}
    result = {"passed": passed, "reason": "" if passed else "too far"}
    return {
        "op": op, "case": case, "dtype": "float16", "passed": passed, "seconds": 1.5, "executed": ran,
        "results": {"out0": result},
    }  # fmt: skip


def test_what_was_executed_is_summed_by_card_op_and_dtype_and_the_last_report_counts(tmp_path):
    first = executed(tmp_path, "a", executed_case("rope"), executed_case("rope"), executed_case("swiglu", False))
    other = executed(tmp_path, "b", executed_case("rope"), device="CPU, the PTX compiled for sm_80: small cases")
    rows = report.executed_rows([first, other])
    assert [(row["target"], row["op"], row["cases"], row["failed"]) for row in rows] == [
        ("sm_80", "rope", 1, 0), ("sm_90", "rope", 2, 0), ("sm_90", "swiglu", 1, 1),
    ]  # fmt: skip
    assert (rows[1]["launches"], rows[1]["programs"], rows[1]["instructions"], rows[1]["seconds"]) == (4, 6, 14, 3.0)
    text = report.executed_table(rows)
    assert (
        "| swiglu | float16 | not run | 1 **1 fail**, 2 s |" in text
        and "- sm_90 swiglu float16: one row: out0: too far" in text
    )
    again = executed(tmp_path, "c", executed_case("swiglu"))
    assert [row["failed"] for row in report.executed_rows([first, other, again])] == [0, 0, 0]
    with pytest.raises(ValueError, match="stopped"):
        report.executed_rows([executed(tmp_path, "d", complete=False)])
    with pytest.raises(ValueError, match="not from verify"):
        report.executed_rows([executed(tmp_path, "e", device="CPU, Triton's interpreter")])


def case(op, eager, ours, passed=True, dtype="float16"):
    result = {"eager_norm_error": eager, "norm_error": ours, "passed": passed}
    integers = {"eager_norm_error": 0.0, "norm_error": 0.0, "passed": True}
    return {"op": op, "dtype": dtype, "passed": passed, "results": {"out0": result, "indices": integers}}


def test_the_proof_counts_cases_and_results_and_compares_only_errors_above_float32s_own(tmp_path):
    rows = [
        case("rope", 1e-3, 1.1e-3),
        case("rope", 2e-3, 1e-3),
        case("rope", 1e-8, 9e-8),
        case("swiglu", 1e-3, 2e-3, False),
    ]
    rows += [case("swiglu", 1e-8, 1e-8, dtype="float32")]
    found = {"device": "a card", "torch": "2", "rows": rows}
    text = report.proof_table(found)
    assert "4 of 5 cases pass (a card, torch 2)" in text
    assert "| rope | float16 | 3 | 6 | 0.80 | 1.10 | pass |" in text
    assert "| swiglu | float16 | 1 | 2 | 2.00 | 2.00 | **FAIL** |" in text
    assert "| swiglu | float32 | 1 | 2 | - | - | pass |" in text
    report.draw_proof(found, tmp_path / "verify.png")
    assert (tmp_path / "verify.png").stat().st_size > 1000
