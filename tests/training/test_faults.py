"""What may go wrong in a run: two runs in one folder, damaged checkpoints, lost terminals, options that are no numbers."""

import json
import os
import shutil
import signal
import socket
import sys

import pytest
from launching import TINY, finish, hears, read_log, run, start, wait_for_step, write_corpus

import minimind_fast as mm
from minimind_fast.config import ModelConfig
from minimind_fast.data.bpe import train_bpe
from minimind_fast.errors import UserError
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.resume import MANIFEST, checkpoints, damage
from minimind_fast.weights.files import Hold


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    data = write_corpus(folder / "train.jsonl", 200)
    train_bpe((line for line in data.read_text(encoding="utf-8").splitlines()), 340).save(folder / "tokenizer")
    return ["--data_path", data, "--tokenizer_path", folder / "tokenizer", "--accumulation_steps", 1]


# ------------------------------------------------------------------------------------------------------ one run a folder


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(corpus, tmp_path):
    args = [*TINY, *corpus, "--save_dir", tmp_path]
    first = start("pretrain.py", [*args, "--max_steps", 100_000, "--epochs", 100_000])
    wait_for_step(tmp_path / "pretrain", 2, first)
    for more in ([], ["--from_resume"]):
        out = run("pretrain.py", [*args, "--max_steps", 2, *more], expect=1)
        assert (
            f"another run writes to {tmp_path / 'pretrain'} (process {first[0].pid} on {socket.gethostname()})" in out
        )
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["pretrain"]  # nothing moved aside
    first[0].send_signal(signal.SIGKILL)
    finish(first, expect=-signal.SIGKILL)
    run("pretrain.py", [*args, "--max_steps", 2])  # its death has freed the folder


def test_a_hold_goes_by_its_note_where_a_drive_has_no_locks(tmp_path, monkeypatch):
    folder, host = tmp_path / "run", socket.gethostname()
    monkeypatch.setattr(Hold, "_lock", staticmethod(lambda file: None))
    child = start("-c", ["import time; time.sleep(600)"], fresh=True)
    note = tmp_path / ".run.lock"
    try:
        for owner, held in (
            ({"pid": child[0].pid, "host": host}, True),
            ({"pid": 1, "host": "another"}, True),
            ({"pid": os.getpid(), "host": host}, False),
        ):
            note.write_text(json.dumps(owner), encoding="utf-8")
            if not held:
                continue
            with pytest.raises(UserError, match=f"process {owner['pid']} on .* no file locks: .* remove"):
                Hold(folder).take()
    finally:
        child[0].kill()
        child[0].wait()
    for left in (
        "",
        "{",
        json.dumps({"pid": child[0].pid, "host": host}),
        json.dumps({"pid": os.getpid(), "host": host}),
    ):
        note.write_text(left, encoding="utf-8")
        hold = Hold(folder)
        hold.take()
        assert json.loads(note.read_text(encoding="utf-8")) == {"pid": os.getpid(), "host": host}
        hold.release()
        assert note.read_text(encoding="utf-8") == ""


# ----------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    args = [*TINY, *corpus, "--save_interval", 2, "--keep_checkpoints", 3]
    run("pretrain.py", [*args, "--max_steps", 4, "--save_dir", folder])
    return folder, args


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_file_of_a_checkpoint_is_vouched_for(trained, tmp_path):
    shutil.copytree(trained[0] / "pretrain" / "checkpoints", tmp_path / "c")
    whole = checkpoints(tmp_path / "c")[-1]
    assert damage(whole) is None
    files = [p for p in sorted(whole.rglob("*")) if p.is_file() and p.name != MANIFEST]
    assert len(files) >= 3
    for path in files:
        kept = path.read_bytes()
        flip(path)
        assert damage(whole), path
        path.write_bytes(kept[:-1])
        assert damage(whole), path
        path.unlink()
        assert damage(whole), path
        path.write_bytes(kept)
    assert damage(whole) is None


@pytest.mark.parametrize("how", ["flipped", "cut", "empty state"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_offered(trained, tmp_path, how):
    source, args = trained
    shutil.copytree(source / "pretrain", tmp_path / "pretrain")
    older, newest = checkpoints(tmp_path / "pretrain" / "checkpoints")[-2:]
    weights = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how == "flipped":
        flip(weights)
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (newest / "state.json").write_bytes(b"")
    args = [*args, "--save_dir", tmp_path, "--max_steps", 5, "--from_resume"]
    out = run("pretrain.py", args, expect=1)
    assert f"{newest} is damaged" in out and f"{older} is whole: remove {newest}" in out and "Traceback" not in out
    shutil.rmtree(newest)
    assert "Going on from step 2 " in run("pretrain.py", args)
    assert max(read_log(tmp_path / "pretrain")) == 5


def test_another_shape_is_told_before_anything_is_loaded(trained, tmp_path):
    source, args = trained
    shutil.copytree(source / "pretrain", tmp_path / "pretrain")
    out = run("pretrain.py", [*args, "--save_dir", tmp_path, "--hidden_size", 32, "--from_resume"], expect=1)
    assert "holds a model of another shape" in out and "Traceback" not in out


# --------------------------------------------------------------------------------------------------- signals and screens


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_slurms_warning_save_and_end(corpus, tmp_path, number):
    args = [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 100_000, "--epochs", 100_000]
    processes = start("pretrain.py", args, before=hears(number))
    wait_for_step(tmp_path / "pretrain", 2, processes)
    processes[0].send_signal(number)
    assert "as asked" in finish(processes)
    assert len(checkpoints(tmp_path / "pretrain" / "checkpoints")) == 1
    assert mm.load_pretrained(tmp_path / "pretrain" / "weights").num_parameters() > 0


@pytest.mark.slow
def test_under_nohup_a_lost_terminal_does_not_end_the_run(corpus, tmp_path):
    args = [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 100_000, "--epochs", 100_000]
    processes = start("pretrain.py", args, before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    wait_for_step(tmp_path / "pretrain", 2, processes)
    processes[0].send_signal(signal.SIGHUP)
    seen = max(read_log(tmp_path / "pretrain"))
    wait_for_step(tmp_path / "pretrain", seen + 3, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert "as asked" in finish(processes)


def test_a_screen_that_shows_ascii_only_does_not_end_a_run(corpus, tmp_path):
    args = [*TINY, *corpus, "--save_dir", tmp_path / "天地", "--max_steps", 1, "--sample_tokens", 3]
    args += ["--sample_prompts", "山 水"]
    out = run("pretrain.py", args, fresh=True, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert "Done: 1 steps" in out and "? ?" in out


def test_a_screen_that_has_gone_does_not_end_a_run(corpus, tmp_path):
    args = [*TINY, *corpus, "--save_dir", tmp_path, "--max_steps", 3]
    gone = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)"
    run("pretrain.py", args, before=gone, expect=None)
    assert mm.load_pretrained(tmp_path / "pretrain" / "weights").num_parameters() > 0
    assert max(read_log(tmp_path / "pretrain")) == 3


# --------------------------------------------------------------------------------------------------------------- options


FLOATS = [f.name for f in TrainConfig.__dataclass_fields__.values() if isinstance(f.default, float)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_none_is_refused(name, value, capsys):
    with pytest.raises(UserError, match=f"--{name} must be a finite number"):
        TrainConfig(**{name: float(value)})
    with pytest.raises(SystemExit):
        parse(TrainConfig, [f"--{name}={value}"])
    assert f"--{name} must be a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'\xef\xbb\xbf{"epochs": 3}', None),
        (b'{"epochs": "3"}', "--epochs must be a whole number, not '3'"),
        (b'{"epochs": NaN}', "--epochs must be a whole number, not nan"),
        (b'{"learning_rate": NaN}', "--learning_rate must be a finite number"),
        (b'{"dtype": "bf16"}', "--dtype must be one of"),
        (b'{"data_path": "a.jsonl"}', "--data_path must be a list of texts"),
        (b'{"use_moe": 1}', "--use_moe must be true or false"),
        (b'{"epoch": 3}', r"unknown options \['epoch'\]"),
        (b"[]", "must hold a JSON object, not a list"),
        (b'{"epochs": 3, "epochs": 4}', 'the field "epochs" comes twice'),
        (b'{"epochs": 3,\n}', "line 2: not JSON"),
        (b'{"save_dir": "\xff"}', "line 1: not UTF-8"),
    ],
)
def test_a_config_file(content, problem, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_bytes(content)
    if problem is None:
        assert parse(TrainConfig, ["--config", str(path)]).epochs == 3
        return
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--config", str(path)])
    __import__("re").search(problem, capsys.readouterr().err) or pytest.fail(problem)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0, not 0"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"dropout": float("nan")}, "dropout"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef must be a finite number not negative"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers must be at most"),
        ({"rope_scaling": {"type": "yarn", "factor": float("nan")}}, "rope_scaling: factor"),
    ],
)
def test_a_model_config_without_sense_is_refused(change, problem):
    with pytest.raises(UserError, match=problem):
        ModelConfig.preset("minimind3", **change)
    assert ModelConfig.preset("minimind3", router_aux_loss_coef=0).router_aux_loss_coef == 0


# --------------------------------------------------------------------------------------------------- errors and sentences


def test_a_context_that_is_too_short_is_told_before_the_first_step(trained, corpus, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(trained[0] / "pretrain" / "weights", short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}), encoding="utf-8")
    args = [*TINY, *corpus[:2], *corpus[4:], "--save_dir", tmp_path, "--from_weight", short]
    out = run("pretrain.py", args, expect=1)
    assert "--max_seq_len 64 is longer than the model's context of 32 tokens" in out and "Traceback" not in out
    assert not (tmp_path / "pretrain").exists()


OWN = """
import json, sys
from minimind_fast.errors import UserError
from minimind_fast.training import setup
def main():
    {body}
setup.start(main)
"""


@pytest.mark.parametrize(
    ("body", "traceback"),
    [("raise UserError('give another folder')", False), ("json.loads('')", True), ("raise ValueError('x')", True)],
)
def test_only_our_own_errors_are_sentences(body, traceback, tmp_path):
    script = tmp_path / "stages" / "own.py"
    script.parent.mkdir()
    script.write_text(OWN.format(body=body), encoding="utf-8")
    out = finish(start("-c", [script.read_text(encoding="utf-8")], fresh=True), expect=1)
    assert ("Traceback" in out) == traceback
    assert ("Error: give another folder" in out) != traceback
    assert ("this is not a wrong option or file" in out) == traceback


def test_the_house_raises_its_own_class():
    """A bare ValueError would show a user a traceback instead of a sentence."""
    from pathlib import Path

    root = Path(mm.__file__).parent
    exempt = {"kernels", "stages", "records"}
    found = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if not exempt & set(path.relative_to(root).parts) and "raise ValueError(" in path.read_text(encoding="utf-8")
    ]
    assert not found
    assert sys.modules["minimind_fast.errors"].DataError.__mro__[1:3] == (UserError, ValueError)
