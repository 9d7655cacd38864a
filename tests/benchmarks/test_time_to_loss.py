"""Tokens to a loss: where a curve crosses it, and what the table says of runs that do or do not."""

import json

import pytest
from launching import run, write_corpus

from benchmarks.studies import time_to_loss as study
from minimind_fast.data import samples


def test_a_curve_crosses_on_the_line_between_two_points():
    curve = [(0, 0.0, 8.0), (100, 10.0, 6.0), (200, 30.0, 5.0), (300, 50.0, 5.5)]
    assert study.crossing(curve, 7.0) == (50.0, 5.0)
    assert study.crossing(curve, 5.5) == (150.0, 20.0)
    assert study.crossing(curve, 5.0) == (200.0, 30.0)
    assert study.crossing(curve, 4.9) is None


def test_the_best_rate_of_the_first_seed_runs_all_and_each_seed_has_its_own_target():
    def runs(recipe, rate, seed, *losses):
        curve = [(100 * i, 10.0 * i, loss) for i, loss in enumerate((8.0, *losses))]
        return {"recipe": recipe, "rate": rate, "seed": seed, "curve": curve}

    found = [runs("minimind", 5e-4, 0, 7.0, 6.0), runs("minimind", 5e-4, 1, 7.0, 5.0)]
    found += [runs("adamw", 1e-3, 0, 7.0, 6.5), runs("adamw", 2e-3, 0, 7.0, 6.2), runs("adamw", 2e-3, 1, 6.0, 5.5)]
    found += [runs("muon", 1e-3, 0, 6.0, 4.0), runs("muon", 1e-3, 1, 5.0, 4.0)]
    minimind, adamw, muon = study.judge(found)
    assert (minimind["loss"], minimind["tokens"]) == (5.5, 200)
    assert (adamw["rate"], adamw["seeds"], adamw["tokens"]) == (2e-3, 2, None)
    assert adamw["losses_by_rate"] == {"0.001": 6.5, "0.002": 6.2}
    assert (muon["tokens"], muon["seconds"]) == (100, 10.0)
    about = dict(threads=1, processor="a", torch="2", model="tiny", share=1.0, step_tokens=8)
    text = study.table({**about, "runs": found})
    assert "| muon | 0.001 | 2 | 4.000 | 100 (0.50) | 10 (0.50) |" in text
    assert "| adamw | 0.002 | 2 | 5.850 | not reached | not reached |" in text


@pytest.mark.slow
def test_it_runs_and_goes_on_where_it_stopped(tmp_path):
    data, val = write_corpus(tmp_path / "train.jsonl", 300), write_corpus(tmp_path / "val.jsonl", 10, seed=1)
    args = ["--data_path", data, "--val_data_path", val, "--tokenizer_path", samples.path("tokenizer")]
    args += ["--hidden", 32, "--layers", 1, "--seeds", 1, "--step_tokens", 680, "--rates", 1e-3, "--dtype", "float32"]
    args += ["--out", tmp_path / "found"]
    run("benchmarks.studies.time_to_loss", [*args, "--recipes", "minimind", "adamw"])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [r["recipe"] for r in found["runs"]] == ["minimind", "adamw"]
    said = run("benchmarks.studies.time_to_loss", args)
    assert "muon 0.001 seed 0" in said and "adamw 0.001 seed 0" not in said
    curves = [r["curve"] for r in json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["runs"]]
    assert curves[0][-1][0] == curves[1][-1][0] == curves[2][-1][0]  # the same text
    assert all(curve[-1][2] < curve[0][2] for curve in curves) and (tmp_path / "found.png").stat().st_size > 1000
