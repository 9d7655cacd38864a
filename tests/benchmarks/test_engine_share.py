"""The bare loop that the engine is measured against takes the same steps, and the measurement ends in a table."""

import json
import re
from pathlib import Path

import pytest
from launching import run

from benchmarks.record import ROOT
from benchmarks.studies import engine_share

ENGINES = ["ZeRO 0", "ZeRO 1", "ZeRO 1 plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of two steps of two micro-batches each, timed and clocked."""
    out = tmp_path_factory.mktemp("share")
    options = "--preset tiny --dtype float32 --tokens 64 --world 1 --accumulation 2 --warm 1 --turns 1 --clocked 1"
    how = [*options.split(), "--threads", "1", "--out", out, "--loops", *ENGINES]
    run("benchmarks.studies.engine_share", how, cwd=ROOT)
    return out


def test_the_bare_loop_takes_the_engines_steps(folder):
    bare, *engines = json.loads((folder / "cpu_engine_share.json").read_text())["cases"][0]["rows"]
    assert bare["loop"] == "bare" and [row["loop"] for row in engines] == ENGINES
    for row in engines:
        assert row["loss"] == pytest.approx(bare["loss"], abs=2e-6)
        assert row["weights"] < 1e-3  # of the way that they have gone
        assert row["engine_ms"] == pytest.approx(row["ms"] - bare["ms"])


def test_every_phase_of_a_step_is_clocked(folder):
    for row in json.loads((folder / "cpu_engine_share.json").read_text())["cases"][0]["rows"]:
        idle = {name for name, ms in row["phases"].items() if ms < 1e-3}
        # float32: stage 0 and the bare loop have neither masters to copy from nor anything to reduce.
        assert idle <= ({"weights", "gradients"} if row["loop"] in ("bare", "ZeRO 0") else set())


def test_the_table_shows_every_loop_twice(folder):
    lines = (folder / "cpu_engine_share.md").read_text().splitlines()
    for loop in ("bare", *ENGINES):
        assert len([line for line in lines if f"| {loop} |" in line]) == 2


def test_what_is_clocked_is_in_this_deepspeed():
    """A function that a new version calls otherwise would silently count for what surrounds it."""
    import deepspeed  # noqa: F401
    from deepspeed.runtime import bf16_optimizer, engine, utils
    from deepspeed.runtime.fp16 import unfused_optimizer
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2

    optimizers = (bf16_optimizer, unfused_optimizer, stage3, stage_1_and_2)
    files = {
        "optimizer": optimizers,
        "optimizer's module": optimizers,
        "engine": (engine,),
        "overflow checker": (utils,),
    }
    files["coordinator"] = (partitioned_param_coordinator,)
    for functions in engine_share.CLOCKED.values():
        for owner in files.keys() & functions.keys():
            source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in files[owner])
            for name in functions[owner]:
                assert re.search(rf"\b{name}\(", source), name
