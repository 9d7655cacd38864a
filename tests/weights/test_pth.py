"""MiniMind's `.pth` of any shape: read from its tensors; written only where MiniMind reads the same model from it."""

import argparse
import copy
import json

import pytest
import torch
from stand_ins import resume_file

import minimind_fast as mm
from minimind_fast.commands import convert, options
from minimind_fast.config import YARN, ModelConfig
from minimind_fast.data import samples
from minimind_fast.training import resume, setup, words
from minimind_fast.training.cli import parse
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.run import Run, Stage, resolve
from minimind_fast.weights.checkpoint import to_disk_names
from minimind_fast.weights.pth import read_differently, shape_of
from minimind_fast.weights.resume_pth import read_adamw

SMALL = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, max_position_embeddings=32768)
# What MiniMind's two generations can be; 8 heads in generation 2, where nothing in the file says so.
SHAPES = {
    "dense2": dict(generation=2, num_attention_heads=8, num_key_value_heads=2),
    "untied2": dict(generation=2, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False),
    "wide2": dict(generation=2, num_attention_heads=8, num_key_value_heads=2, head_dim=12, intermediate_size=96),
    "moe2": dict(generation=2, num_attention_heads=8, num_key_value_heads=2, use_moe=True, num_experts=3),
    "moe2-shared": dict(generation=2, num_attention_heads=8, use_moe=True, num_shared_experts=2, num_experts=5),
    "moe2-one": dict(generation=2, num_attention_heads=8, use_moe=True, num_experts=1, num_experts_per_tok=1),
    "dense3": dict(generation=3, num_attention_heads=4, num_key_value_heads=1),
    "wide3": dict(generation=3, num_attention_heads=2, num_key_value_heads=2, head_dim=24),
    "moe3": dict(generation=3, num_attention_heads=8, num_key_value_heads=4, use_moe=True, num_experts=6),
    "moe3-narrow": dict(generation=3, num_attention_heads=8, use_moe=True, moe_intermediate_size=40),
}
IDS = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(3))


def model_of(**changes):
    torch.manual_seed(0)
    model = mm.MiniMind(ModelConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def written(model, path):
    mm.save_pretrained(model, path, format="pth", dtype=torch.float32)
    return path


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_is_read_from_the_tensors(name, tmp_path):
    model = model_of(**SHAPES[name])
    again = mm.load_pretrained(written(model, tmp_path / "m.pth"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    fields = (
        "generation",
        "num_experts",
        "num_shared_experts",
        "num_experts_per_tok",
        "tie_word_embeddings",
        "qk_norm",
    )
    for field in fields if model.config.use_moe else ("generation", "intermediate_size", "head_dim", "qk_norm"):
        assert getattr(again.config, field) == getattr(model.config, field), field


def test_a_mixture_s_pth_is_minimind_s_unless_told_otherwise(tmp_path):
    """Whatever the preset or the options leave open: the chosen scores are normalised, one expert in generation 3."""
    model = model_of(**SHAPES["moe3"])
    file = written(model, tmp_path / "full_sft_64_moe.pth")
    told = mm.load_pretrained(file, told={"norm_topk_prob": False})
    assert not torch.allclose(told(IDS).logits, model(IDS).logits, atol=0.1)

    def opened(*words):
        parser = argparse.ArgumentParser()
        options.add_shape_options(parser)
        return mm.load_pretrained(file, **options.told_shape(parser.parse_args(words), file))

    assert torch.equal(opened()(IDS).logits, model(IDS).logits)
    assert torch.equal(opened("--no-norm_topk_prob")(IDS).logits, told(IDS).logits)
    two = mm.load_pretrained(file, told={"num_experts_per_tok": 2})
    assert torch.equal(opened("--num_experts_per_tok", "2")(IDS).logits, two(IDS).logits)
    with pytest.raises(ValueError, match="does not hold this model"):
        opened("--no-use_moe")
    with pytest.raises(ValueError, match="does not fit the config"):
        opened("--hidden_size", "32")


def test_a_preset_s_own_mixture_is_not_taken_for_minimind_s(tmp_path, monkeypatch):
    own = dict(generation=3, use_moe=True, norm_topk_prob=False, num_experts_per_tok=2, **SMALL)
    monkeypatch.setitem(mm.config.PRESETS, "own-moe", own)
    model = model_of(generation=3, use_moe=True)
    file = written(model, tmp_path / "m.pth")
    argv = [str(file), str(tmp_path / "out"), "--preset", "own-moe"]
    assert convert.main_import(argv) == 0
    assert torch.equal(mm.load_pretrained(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("preset", [(), ("--preset", "small-moe")])
def test_training_goes_on_from_minimind_s_mixture(preset, tmp_path, monkeypatch):
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    monkeypatch.setitem(mm.config.PRESETS, "small-moe", dict(generation=3, use_moe=True, norm_topk_prob=False, **small))
    model = model_of(generation=3, use_moe=True, vocab_size=6400)
    file = written(model, tmp_path / "m.pth")
    tokenizer = mm.Tokenizer.load(samples.path("tokenizer"))
    again = setup.load_model(parse(TrainConfig, ["--from_weight", str(file), *preset]), tokenizer)
    assert again.config.norm_topk_prob and again.config.num_experts_per_tok == 1
    assert torch.equal(again.eval()(IDS).logits, model(IDS).logits)


def test_a_checkpoint_to_resume_from_is_read_for_its_weights(tmp_path):
    model = model_of(**SHAPES["dense3"])
    state = torch.load(written(model, tmp_path / "m.pth"), weights_only=True)
    raw = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 1, "step": 30, "world_size": 1, "wandb_id": None, "scaler": {},
    }  # fmt: skip
    file = tmp_path / "full_sft_64_resume.pth"
    torch.save(raw, file)
    run = resolve(TrainConfig(from_weight=str(file), dtype="float32"), Stage("x"))
    assert f"{file}: its weights are taken; --with_optimizer" in "\n".join(words.introduction(run, model, "cpu", 1, 1))
    assert torch.equal(mm.load_pretrained(tmp_path / "full_sft_64_resume.pth")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimizer_of_a_checkpoint_is_fused_as_its_weights_are(shape, tmp_path):
    model = model_of(**SHAPES[shape])
    want = resume_file(model, tmp_path / "a_resume.pth")
    got = read_adamw(tmp_path / "a_resume.pth", model)
    assert (got.step, got.epoch) == (3, 1) and got.moments.keys() == dict(model.named_parameters()).keys()
    for half in (0, 1):
        disk = to_disk_names({name: pair[half] for name, pair in got.moments.items()}, model.config)
        assert all(torch.equal(disk[name], pair[half]) for name, pair in want.items())


def test_an_optimizer_that_does_not_fit_is_refused(tmp_path):
    model, file = model_of(**SHAPES["dense3"]), tmp_path / "a_resume.pth"
    resume_file(model, file)
    raw = torch.load(file, weights_only=True)
    for change, said in (
        (lambda r: r["optimizer"]["state"].pop(0), "states and .* numbers for"),
        (lambda r: r["optimizer"]["state"][1].pop("exp_avg_sq"), "layers.0.* has no exp_avg_sq of its shape"),
        (lambda r: r["optimizer"]["state"][1].update(step=torch.tensor(9.0)), "at different steps"),
        (lambda r: r.pop("optimizer"), "holds no model with its optimizer"),
    ):
        broken = copy.deepcopy(raw)
        change(broken)
        torch.save(broken, file)
        with pytest.raises(ValueError, match=f"--with_optimizer: .*a_resume.pth.*{said}"):
            read_adamw(file, model)
    for given, said in (
        (dict(from_weight=str(tmp_path)), "needs MiniMind's"),
        (dict(zero_stage=3), "at --zero_stage 0, 1 or 2"),
    ):
        config = TrainConfig(**{"from_weight": str(file), "with_optimizer": True, "dtype": "float32", **given})
        with pytest.raises(ValueError, match=f"--with_optimizer.*{said}"):
            resume.minimind_s(Run("pretrain", config, {}, 1), model)


def test_heads_that_the_file_does_not_show_are_told(tmp_path):
    model = model_of(generation=2, num_attention_heads=4, num_key_value_heads=1)
    file = written(model, tmp_path / "m.pth")
    assert not torch.allclose(mm.load_pretrained(file)(IDS).logits, model(IDS).logits, atol=0.1)  # 8 heads of 8
    told = mm.load_pretrained(file, told=dict(num_attention_heads=4))
    assert torch.equal(told(IDS).logits, model(IDS).logits) and told.config.num_key_value_heads == 1
    odd = model_of(generation=2, num_attention_heads=3, num_key_value_heads=1, head_dim=20)
    with pytest.raises(ValueError, match="60 rows of q and 20 of k are not 8 heads; say --num_attention_heads"):
        mm.load_pretrained(written(odd, tmp_path / "odd.pth"))
    with pytest.raises(ValueError, match="no matrix model.layers.0.mlp.gate_proj.weight"):
        shape_of({k: v for k, v in torch.load(file).items() if "mlp" not in k}, "m.pth")


def test_yarn_is_switched_on_for_answers(tmp_path):
    model = model_of(**SHAPES["dense3"])
    mm.save_pretrained(model, tmp_path / "folder")
    stretched = mm.MiniMind(ModelConfig(**{**SMALL, **SHAPES["dense3"], "rope_scaling": dict(YARN)})).eval()
    stretched.load_state_dict(model.state_dict())
    for path in (written(model, tmp_path / "m.pth"), tmp_path / "folder"):
        parser = argparse.ArgumentParser()
        options.add_model_options(parser)
        args = parser.parse_args([str(path), "--inference_rope_scaling"])
        got = mm.load_pretrained(path, **options.told_shape(args, path))
        assert torch.equal(got(IDS).logits, stretched(IDS).logits)
        assert not torch.equal(got(IDS).logits, model(IDS).logits)


def test_a_shape_is_not_told_of_a_folder(tmp_path):
    mm.save_pretrained(model_of(**SHAPES["dense3"]), tmp_path / "folder")
    with pytest.raises(ValueError, match="--rope_theta says the shape of a .pth; .* is a folder"):
        convert.main_export([str(tmp_path / "folder"), str(tmp_path / "out"), "--rope_theta", "1e4"])


MISREAD = {
    "other heads": (dict(generation=2, num_attention_heads=4, num_key_value_heads=1), "num_attention_heads"),
    "theta": (dict(generation=3, rope_theta=1e4), "rope_theta"),
    "eps": (dict(generation=2, num_attention_heads=8, rms_norm_eps=1e-6), "rms_norm_eps"),
    "untied": (dict(generation=3, tie_word_embeddings=False), "tie_word_embeddings"),
    "yarn": (dict(generation=3, rope_scaling=dict(YARN)), "inference_rope_scaling"),
    "scores": (dict(generation=3, use_moe=True, norm_topk_prob=False), "norm_topk_prob"),
    "top-2": (dict(generation=3, use_moe=True, num_experts_per_tok=2), "num_experts_per_tok"),
    "top-1": (dict(generation=2, num_attention_heads=8, use_moe=True, num_experts_per_tok=1), "num_experts_per_tok"),
    "shared": (dict(generation=3, use_moe=True, num_shared_experts=1), "num_shared_experts"),
    "none shared": (
        dict(generation=2, num_attention_heads=8, use_moe=True, num_shared_experts=0),
        "num_shared_experts",
    ),
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_pth_that_minimind_would_misread_is_not_written_unasked(name, tmp_path, capsys):
    changes, field = MISREAD[name]
    mm.save_pretrained(model_of(**changes), tmp_path / "folder")
    argv = [str(tmp_path / "folder"), str(tmp_path / "m.pth"), "--format", "pth"]
    with pytest.raises(ValueError, match=f"another model of this one: it needs .*{field}="):
        convert.main_export(argv)
    assert not (tmp_path / "m.pth").exists()
    assert convert.main_export([*argv, "--edited_config"]) == 0
    assert f"MiniMindConfig(..., {field}=" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    dict(generation=2, num_attention_heads=8), dict(generation=3), dict(generation=3, use_moe=True),
    dict(generation=2, num_attention_heads=8, use_moe=True),
    dict(generation=3, use_moe=True, straight_through_router=True),
    # the only expert's score is 1, and two of two sum to 1: normalised or not is the same
    dict(generation=3, use_moe=True, num_experts=1, norm_topk_prob=False),
    dict(generation=2, num_attention_heads=8, use_moe=True, num_experts=2, norm_topk_prob=False),
])  # fmt: skip
def test_what_minimind_reads_as_it_is_needs_no_word(changes):
    assert not read_differently(ModelConfig(**{**SMALL, **changes}))


def test_presets_of_minimind_go_back_to_minimind():
    """All but the mixture of generation 3, which weighs by the score itself; trained as MiniMind's it goes back too."""
    for name in mm.config.PRESETS:
        expected = {"norm_topk_prob": False} if name == "minimind3-moe" else {}
        assert read_differently(ModelConfig.preset(name)) == expected, name
    readable = ModelConfig.preset("minimind3-moe", norm_topk_prob=True, straight_through_router=True)
    assert readable.router_gets_lm_gradient and not read_differently(readable)


def test_scores_of_generation_2_s_only_expert_go_to_qwen3_as_they_are(tmp_path):
    """Generation 2 leaves one expert's score as it is, whatever norm_topk_prob says; Qwen3-MoE does what it says."""
    model = model_of(generation=2, qk_norm=True, use_moe=True, num_experts_per_tok=1, num_shared_experts=0)
    mm.save_pretrained(model, tmp_path / "hf", format="qwen3_moe")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["norm_topk_prob"] is False
    torch.testing.assert_close(mm.load_pretrained(tmp_path / "hf")(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)
