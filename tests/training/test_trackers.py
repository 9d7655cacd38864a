"""wandb and SwanLab by stand-in modules: what they are told, and that a resumed run goes on with its curve."""

import json
import sys
import types

import pytest

from minimind_fast.errors import UserError
from minimind_fast.training.log import Progress


def stand_in(told, fails=""):
    """A module with what both have in common: init (whose run has an id), log, finish."""

    def init(**given):
        if fails:
            raise RuntimeError(fails)
        told.append(given)
        return types.SimpleNamespace(id=given.get("id", f"new{len(told)}"))

    log = lambda numbers, step: told.append((step, numbers["loss"]))  # noqa: E731
    return types.SimpleNamespace(init=init, log=log, finish=lambda: None)


def write(folder, first, last, trackers):
    progress = Progress(folder, 9, first, {"seed": 1, "from_resume": first > 0}, "name", trackers, resumed=first > 0)
    for step in range(first + 1, last + 1):
        progress.record(step, {"loss": step / 10})
    progress.close()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_resumed_run_goes_on_with_its_curve(tmp_path, monkeypatch, name):
    told = []
    monkeypatch.setitem(sys.modules, name, stand_in(told))
    write(tmp_path, 0, 2, {name: "mine"})
    begun = {"project": "mine", "name": "name", "config": {"seed": 1, "from_resume": False}}
    assert told == [begun, (1, 0.1), (2, 0.2)]
    told.clear()
    write(tmp_path, 2, 3, {name: "mine"})
    assert told[0]["id"] == "new1" and told[0]["resume"] == "allow" and told[1:] == [(3, 0.3)]
    assert ("allow_val_change" in told[0]) == (name == "wandb")  # its config may not change otherwise
    told.clear()
    write(tmp_path, 0, 1, {name: "mine"})
    assert "id" not in told[0], "a run that begins anew has a curve of its own"
    told.clear()
    progress = Progress(tmp_path, 9, 5, {}, "name", {name: "mine"})  # at MiniMind's step, and yet anew
    progress.record(6, {"loss": 0.6})
    progress.close()
    assert "id" not in told[0] and (tmp_path / "log.jsonl").read_text() == '{"step": 6, "loss": 0.6}\n'


def test_one_tracker_more_on_resume_keeps_the_other_s_id(tmp_path, monkeypatch):
    told = []
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, stand_in(told))
    write(tmp_path, 0, 1, {"wandb": "a"})
    write(tmp_path, 1, 2, {"swanlab": "b"})
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"wandb", "swanlab"}


def test_what_keeps_a_tracker_from_beginning_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--use_wandb needs the package: pip install wandb"):
        write(tmp_path, 0, 1, {"wandb": "a"})
    monkeypatch.setitem(sys.modules, "swanlab", stand_in([], "no api key"))
    with pytest.raises(UserError, match="--use_swanlab: swanlab could not begin: no api key. Run `swanlab login`"):
        write(tmp_path, 0, 1, {"swanlab": "a"})
