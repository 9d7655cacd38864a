"""Weights on disk: MiniMind's names byte for byte, whole folders or none, and errors that list what is wrong."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from launching import finish, start
from safetensors.torch import load_file, save_file

import minimind_fast as mm
from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.weights import checkpoint
from minimind_fast.weights import files as disk
from minimind_fast.weights.checkpoint import (
    read_weights,
    resolve_folder,
    to_disk_names,
    tokenizer_fingerprint,
    written_aside,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLE_TOKENIZER = samples.path("tokenizer")
SHAPES = {
    "dense2": dict(generation=2),
    "dense3": dict(generation=3, head_dim=12),
    "untied": dict(generation=3, tie_word_embeddings=False),
    "moe2": dict(generation=2, use_moe=True, num_shared_experts=2),
    "moe3": dict(generation=3, use_moe=True, moe_intermediate_size=24),
}


def tiny(name: str, **changes) -> mm.MiniMind:
    torch.manual_seed(0)
    size = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = mm.MiniMind(ModelConfig(**{**size, "max_position_embeddings": 64, **SHAPES[name], **changes}))
    for parameter in model.parameters():  # norms too, so that a swapped one is seen
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: mm.MiniMind) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None] * 3 % 97).logits


def same_weights(a: mm.MiniMind, b: mm.MiniMind) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) and x[n].dtype == y[n].dtype for n in x)


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", sorted(p.name for p in GOLDEN.iterdir()))
def test_minimind_folders_come_back_byte_for_byte(name, tmp_path):
    model = mm.load_pretrained(GOLDEN / name)
    mm.save_pretrained(model, tmp_path / "copy")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "copy"))
    theirs.pop("lm_head.weight", None)  # tied: some of MiniMind's files hold it twice
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key
    assert mm.load_pretrained(tmp_path / "copy").config == model.config


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_gives_the_same_model(name, tmp_path):
    model = tiny(name)
    mm.save_pretrained(model, tmp_path / "m")
    again = mm.load_pretrained(tmp_path / "m")
    assert same_weights(model, again) and again.config == model.config and not again.training
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["moe2", "moe3"])
def test_stacked_experts_are_their_own_tensors_on_disk(name):
    model = tiny(name)
    disk, c = to_disk_names(model.state_dict(), model.config), model.config
    mlp = model.model.layers[1].mlp
    for e in range(c.num_experts):
        prefix = f"model.layers.1.mlp.experts.{e}."
        gate_up = torch.cat([disk[f"{prefix}gate_proj.weight"], disk[f"{prefix}up_proj.weight"]])
        assert torch.equal(gate_up, mlp.experts.gate_up[e])
        assert torch.equal(disk[f"{prefix}down_proj.weight"], mlp.experts.down[e])
    shared = [n for n in disk if "layers.1.mlp.shared_experts" in n]
    assert len(shared) == 3 * c.num_shared_experts
    if shared:  # two shared experts, one after the other, are what the wide one computes
        x = torch.randn(5, c.hidden_size)
        y = 0
        for i in range(2):
            gate, up, down = (
                disk[f"model.layers.1.mlp.shared_experts.{i}.{k}_proj.weight"] for k in ("gate", "up", "down")
            )
            y = y + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        torch.testing.assert_close(mlp.shared(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_pth_is_float16_by_default_and_read_as_float32(name, tmp_path):
    model = tiny(name)
    mm.save_pretrained(model, tmp_path / "m.pth", format="pth")
    disk = torch.load(tmp_path / "m.pth", weights_only=True)
    assert {t.dtype for t in disk.values()} == {torch.float16}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= disk.keys()  # MiniMind loads it strictly
    again = mm.load_pretrained(tmp_path / "m.pth", config=model.config)
    assert next(again.parameters()).dtype == torch.float32
    assert same_weights(again, model.half().float())


def test_a_pth_in_float32_loses_nothing(tmp_path):
    model = tiny("moe2")
    mm.save_pretrained(model, tmp_path / "m.pth", format="pth", dtype=torch.float32)
    assert same_weights(mm.load_pretrained(tmp_path / "m.pth", config=model.config), model)


def test_a_pth_with_buffers_of_older_releases_is_read(tmp_path):
    model = tiny("dense2")
    disk = dict(to_disk_names(model.state_dict(), model.config))
    disk["model.freqs_cos"] = torch.zeros(64, 4)
    torch.save(disk, tmp_path / "m.pth")
    assert same_weights(mm.load_pretrained(tmp_path / "m.pth", config=model.config), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_on_disk_and_in_memory(dtype, tmp_path):
    model = tiny("dense3")
    mm.save_pretrained(model, tmp_path / "m", dtype=dtype)
    assert {t.dtype for t in read_weights(tmp_path / "m").values()} == {dtype}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert next(mm.load_pretrained(tmp_path / "m").parameters()).dtype == dtype
    wide = mm.load_pretrained(tmp_path / "m", dtype=torch.float32)
    assert same_weights(wide, tiny("dense3").to(dtype).float())


def test_other_weights_in_place_of_the_models(tmp_path):
    model = tiny("dense3")
    masters = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    mm.save_pretrained(model, tmp_path / "m", state=masters)
    again = mm.load_pretrained(tmp_path / "m").state_dict()
    assert all(torch.equal(again[name], masters[name]) for name in masters)


# ----------------------------------------------------------------------------------------------------------- tied heads


def test_a_tied_head_is_stored_once(tmp_path):
    model = tiny("dense3")
    mm.save_pretrained(model, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    again = mm.load_pretrained(tmp_path / "m")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    mm.save_pretrained(model, tmp_path / "m.pth", format="pth")
    disk = torch.load(tmp_path / "m.pth", weights_only=True)
    assert disk["lm_head.weight"].data_ptr() == disk["model.embed_tokens.weight"].data_ptr()
    untied = tiny("untied")
    mm.save_pretrained(untied, tmp_path / "u")
    assert "lm_head.weight" in load_file(tmp_path / "u" / "model.safetensors")


def test_a_tied_head_is_read_under_either_name(tmp_path):
    model = tiny("dense3")
    mm.save_pretrained(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    disk = load_file(file)
    disk["lm_head.weight"] = disk.pop("model.embed_tokens.weight")
    save_file(disk, file)
    assert same_weights(mm.load_pretrained(tmp_path / "m"), model)
    disk["model.embed_tokens.weight"] = disk["lm_head.weight"] + 1
    save_file(disk, file)
    with pytest.raises(ValueError, match='differ, but the config ties them; set "tie_word_embeddings": false'):
        mm.load_pretrained(tmp_path / "m")


# --------------------------------------------------------------------------------------------------------------- errors


def test_missing_and_extra_tensors_are_all_listed(tmp_path):
    model = tiny("moe3")
    mm.save_pretrained(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    disk = load_file(file)
    gone = [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.norm.weight",
    ]
    for name in gone:
        del disk[name]
    disk["model.layers.7.mlp.gate.weight"] = torch.zeros(2)
    disk["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(2)
    save_file(disk, file)
    with pytest.raises(ValueError) as error:
        mm.load_pretrained(tmp_path / "m")
    missing, extra = str(error.value).split("not part of this model: ")
    assert all(name in missing for name in gone)
    assert extra == "model.layers.0.self_attn.q_proj.bias, model.layers.7.mlp.gate.weight"


def test_misshapen_tensors_are_all_listed_even_where_the_sum_fits(tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    disk = load_file(file)
    attention = "model.layers.0.self_attn."
    q, k = (
        disk[f"{attention}q_proj.weight"],
        disk[f"{attention}k_proj.weight"],
    )  # rows moved: q | k | v as long as before
    disk[f"{attention}q_proj.weight"], disk[f"{attention}k_proj.weight"] = q[:-4].clone(), torch.cat([q[-4:], k])
    disk["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(disk, file)
    with pytest.raises(ValueError, match="does not fit the config") as error:
        mm.load_pretrained(tmp_path / "m")
    for text in (
        "q_proj.weight is (28, 32), expected (32, 32)",
        "k_proj.weight is (20, 32)",
        "up_proj.weight is (3, 32)",
    ):
        assert text in str(error.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_file_that_runs_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Bomb()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m\.pth cannot be read as weights"):
        mm.load_pretrained(tmp_path / "m.pth", config=tiny("dense2").config)
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_model_ends_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        mm.load_pretrained(tmp_path / "nothing")
    torch.save({"model": {"w": torch.zeros(1)}, "step": 3}, tmp_path / "resume.pth")
    with pytest.raises(ValueError, match="no matrix model.embed_tokens.weight"):
        mm.load_pretrained(tmp_path / "resume.pth")
    with pytest.raises(ValueError, match="does not hold this model"):
        mm.load_pretrained(tmp_path / "resume.pth", config=tiny("dense2").config)
    torch.save({"model": [torch.zeros(1)], "step": 3}, tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        mm.load_pretrained(tmp_path / "list.pth")
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: No such file"):
        mm.load_pretrained(folder)
    (folder / "config.json").write_text("{]")
    with pytest.raises(ValueError, match="config.json, line 1: not JSON"):
        mm.load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba' cannot be read; known are minimind, llama, qwen3, qwen3_moe"):
        mm.load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(tiny("dense2").config.to_dict()))
    with pytest.raises(ValueError, match=r"no model\.safetensors, pytorch_model\.bin or \.pth"):
        mm.load_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        mm.load_pretrained(folder)


def test_a_folder_edited_on_windows_is_read(tmp_path):
    mm.save_pretrained(tiny("dense2"), tmp_path / "m")
    for file in (tmp_path / "m").glob("*.json"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert mm.load_pretrained(tmp_path / "m").config == tiny("dense2").config


@pytest.mark.parametrize("kind", ["folder", "pth"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.to(torch.int8), "is stored as int8, so it is quantised"),
        (lambda t: t.to(torch.float8_e4m3fn), "is stored as float8_e4m3fn"),
        (lambda t: t.index_fill(0, torch.tensor(1), float("nan")), "holds NaN or infinity"),
        (lambda t: t.index_fill(0, torch.tensor(1), float("inf")), "holds NaN or infinity"),
    ],
    ids=["int8", "float8", "nan", "inf"],
)
def test_weights_that_are_no_numbers_are_named(kind, change, problem, tmp_path):
    path, name = tmp_path / {"folder": "m", "pth": "m.pth"}[kind], "model.layers.0.mlp.up_proj.weight"
    mm.save_pretrained(tiny("dense2"), path, format={"folder": "minimind"}.get(kind, kind), dtype=torch.float32)
    disk = read_weights(path)
    disk[name] = change(disk[name])
    torch.save(disk, path) if kind == "pth" else save_file(disk, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} {problem}"):
        mm.load_pretrained(path)


def test_wrong_wishes_are_refused_before_anything_is_written(tmp_path):
    model = tiny("dense2")
    for wish, message in [
        (dict(format="gguf"), "unknown format 'gguf'; choose one of minimind, pth, llama"),
        (dict(dtype=torch.int8), "float32, bfloat16 or float16, not torch.int8"),
        (dict(max_shard_size="lots"), "500MB or 2GiB, not 'lots'"),
        (dict(max_shard_size=0), "500MB or 2GiB, not 0"),
        (dict(format="pth", max_shard_size="1MB"), "is one file"),
    ]:
        with pytest.raises(ValueError, match=message):
            mm.save_pretrained(model, tmp_path / "m", **wish)
    model.model.norm.weight.data[3] = 1e5
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds 1 values beyond float16"):
        mm.save_pretrained(model, tmp_path / "m", dtype=torch.float16)
    assert files(tmp_path) == set()


# --------------------------------------------------------------------------------------------------------------- shards


def test_shards_with_an_index_come_back(tmp_path):
    model = tiny("moe2")
    mm.save_pretrained(model, tmp_path / "m", max_shard_size="20KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    beside = {"config.json", "modeling_minimind.py", "model.safetensors.index.json"}
    assert files(tmp_path / "m") == {*beside, *shards}
    total = 0
    for shard in shards:
        held = load_file(tmp_path / "m" / shard)
        assert set(held) == {name for name, file in index["weight_map"].items() if file == shard}
        size = sum(t.nbytes for t in held.values())
        assert size <= 20_000 or len(held) == 1
        total += size
    assert total == index["metadata"]["total_size"]
    assert same_weights(mm.load_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize(
    ("size", "count"), [("1GB", 1), ("1GiB", 1), (10**9, 1), ("1.5 kib", None), ("1KB", None), (1000, None)]
)
def test_shard_sizes_are_bytes_or_text(size, count, tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "m", max_shard_size=size)
    written = [p for p in (tmp_path / "m").iterdir() if p.suffix == ".safetensors"]
    assert len(written) == 1 if count else len(written) > 5
    assert same_weights(mm.load_pretrained(tmp_path / "m"), model)


def test_a_sharded_model_takes_the_place_of_a_whole_one_and_back(tmp_path):
    model = tiny("dense2")
    for size in (None, "5KB", None):
        mm.save_pretrained(model, tmp_path / "m", max_shard_size=size)
        assert ("model.safetensors" in files(tmp_path / "m")) == (size is None)
        assert same_weights(mm.load_pretrained(tmp_path / "m"), model)


def test_torch_shards_are_read(tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "m")
    disk = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    half = list(disk)[::2]
    where = {n: f"pytorch_model-0000{1 if n in half else 2}-of-00002.bin" for n in disk}
    for file in set(where.values()):
        torch.save({n: t for n, t in disk.items() if where[n] == file}, tmp_path / "m" / file)
    (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert same_weights(mm.load_pretrained(tmp_path / "m"), model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, r"not beside it: model-1\.safetensors"),
        ({"weight_map": {"a": "../secret.safetensors"}}, r"not beside it: \.\./secret"),
        ({"weight_map": {}}, "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_a_bad_index_is_named(index, message, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny("dense2").config.to_dict()))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        mm.load_pretrained(folder)


# --------------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("moment", ["weights", "json", "sync", "swap"])
def test_a_failed_save_leaves_the_old_folder_whole(moment, tmp_path, monkeypatch):
    old, new = tiny("dense2"), tiny("dense2", hidden_size=64)
    mm.save_pretrained(old, tmp_path / "m")

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "swap":
        real, calls = os.replace, []

        def second_fails(a, b):
            calls.append(a)
            return fail() if len(calls) == 2 else real(a, b)

        monkeypatch.setattr(disk.os, "replace", second_fails)
    else:
        name = {"weights": "save_file", "json": "_write_json", "sync": "sync_to_disk"}[moment]
        monkeypatch.setattr(disk if moment == "sync" else checkpoint, name, fail)
    with pytest.raises(OSError, match="No space left"):
        mm.save_pretrained(new, tmp_path / "m")
    monkeypatch.undo()
    assert files(tmp_path) == {"m"}
    assert same_weights(mm.load_pretrained(tmp_path / "m"), old)


KILLED = """
import os, signal, sys, torch
import minimind_fast as mm
from minimind_fast.weights import checkpoint
from minimind_fast.weights import files as disk
model = mm.load_pretrained(sys.argv[1])
model.model.norm.weight.data += 1
real = os.replace
def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "writing":
    checkpoint._write_json = kill
else:
    disk.os.replace = lambda a, b: (real(a, b), kill())  # after the first of the two renames
mm.save_pretrained(model, sys.argv[1])
"""


@pytest.mark.parametrize("moment", ["writing", "between the renames"])
def test_a_killed_save_leaves_the_old_folder_whole(moment, tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "m")
    finish(start("-c", [KILLED, tmp_path / "m", moment]), expect=-signal.SIGKILL)
    if moment == "writing":
        assert same_weights(mm.load_pretrained(tmp_path / "m"), model)
    else:  # neither is in its place; the error says where the old one is
        (old,) = tmp_path.glob(".m.old-*")
        with pytest.raises(ValueError, match=rf"{old.name}: rename that"):
            mm.load_pretrained(tmp_path / "m")
        assert same_weights(mm.load_pretrained(old), model)


def test_written_aside_replaces_a_file_and_keeps_it_on_failure(tmp_path):
    file = tmp_path / "x.txt"
    with written_aside(file) as aside:
        aside.write_text("one")
        assert not file.exists()
    with pytest.raises(RuntimeError), written_aside(file) as aside:
        aside.write_text("two")
        raise RuntimeError
    assert file.read_text() == "one" and files(tmp_path) == {"x.txt"}


def test_a_link_to_a_folder_is_replaced_and_not_what_it_points_to(tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    mm.save_pretrained(tiny("dense3"), tmp_path / "link")
    assert files(tmp_path) == {"real", "link"} and not (tmp_path / "link").is_symlink()
    assert same_weights(mm.load_pretrained(tmp_path / "real"), model)


def test_what_is_not_a_model_is_never_replaced(tmp_path):
    model = tiny("dense2")
    mm.save_pretrained(model, tmp_path / "m")
    for name, make in [("notes.txt", Path.touch), ("checkpoints", Path.mkdir), ("other.safetensors", Path.touch)]:
        path = tmp_path / "m" / name
        make(path)
        with pytest.raises(ValueError, match=rf"holds other things than a model \({name}\)"):
            mm.save_pretrained(model, tmp_path / "m")
        path.unlink() if path.is_file() else path.rmdir()
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        mm.save_pretrained(model, tmp_path / "m", format="pth")
    mm.save_pretrained(model, tmp_path / "m.pth", format="pth")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        mm.save_pretrained(model, tmp_path / "m.pth")
    assert files(tmp_path) == {"m", "m.pth"}


# ----------------------------------------------------------------------------------------------------- beside the weights


def test_the_tokenizer_and_its_fingerprint_lie_beside_the_weights(tmp_path):
    tokenizer = mm.Tokenizer.load(SAMPLE_TOKENIZER)
    mm.save_pretrained(tiny("dense3", vocab_size=6400), tmp_path / "m", tokenizer=tokenizer)
    beside = {"config.json", "modeling_minimind.py", "tokenizer.json", "tokenizer_config.json"}
    assert files(tmp_path / "m") == {*beside, "model.safetensors"}
    assert tokenizer_fingerprint(tmp_path / "m") == tokenizer.fingerprint
    again = mm.Tokenizer.load(tmp_path / "m")
    chat = [{"role": "user", "content": "你好"}]
    assert again.fingerprint == tokenizer.fingerprint
    assert again.render_chat(chat, add_generation_prompt=True) == tokenizer.render_chat(
        chat, add_generation_prompt=True
    )
    mm.load_pretrained(tmp_path / "m")  # the fingerprint in config.json disturbs nobody
    mm.save_pretrained(tiny("dense3"), tmp_path / "m")
    assert tokenizer_fingerprint(tmp_path / "m") is None and "tokenizer.json" not in files(tmp_path / "m")


def test_resolve_folder_finds_the_weights_of_a_run(tmp_path):
    run = tmp_path / "run"
    mm.save_pretrained(tiny("dense2"), run / "weights")
    assert resolve_folder(run) == resolve_folder(str(run / "weights")) == run / "weights"
    assert resolve_folder(tmp_path / "absent") == tmp_path / "absent"
    assert same_weights(mm.load_pretrained(run), tiny("dense2"))


def test_loading_draws_nothing_from_the_callers_generator(tmp_path):
    mm.save_pretrained(tiny("dense2"), tmp_path / "m")
    state = torch.get_rng_state()
    mm.load_pretrained(tmp_path / "m")
    assert torch.equal(state, torch.get_rng_state())
