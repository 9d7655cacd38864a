"""Adapters: the arithmetic on fused projections, what is frozen, files of PEFT and MiniMind, merging."""

import argparse
import json

import pytest
import torch
import torch.nn.functional as F

import minimind_fast as mm
from minimind_fast import cli
from minimind_fast.commands import convert, options
from minimind_fast.data import samples
from minimind_fast.training.zero.engine import param_groups
from minimind_fast.weights import lora
from minimind_fast.weights.checkpoint import to_disk_names
from minimind_fast.weights.lora import ATTENTION, TARGETS, LoRA


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    return mm.MiniMind(mm.ModelConfig.preset("minimind3", **{**shape, **changes})).eval()


def adapted(spec, **changes):
    """A model with adapters that do something."""
    model = tiny(**changes)
    names = lora.apply(model, spec)
    with torch.no_grad():
        for _, b in lora.adapters(model).values():
            b.normal_(std=0.3)
    return model, names


IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [ATTENTION, TARGETS, ("q_proj", "v_proj"), ("k_proj", "up_proj"), ("square",)])
def test_the_model_is_the_one_with_w_plus_scaled_ba(targets):
    """Oracle: MiniMind's separate weights on disk, each with its own alpha / rank * B A added."""
    model, names = adapted(LoRA(rank=3, alpha=6.0, targets=targets))
    if targets == ("square",):
        assert {name.rpartition(".")[2] for name in names} == {"q_proj", "o_proj"}
    else:
        assert len(names) == 2 * len(targets)
    plain = tiny()
    disk = to_disk_names(plain.state_dict(), plain.config)
    with torch.no_grad():
        for name, (a, b) in lora.adapters(model).items():
            disk[f"{name}.weight"] += 6.0 / 3 * b @ a  # a view of the fused weight
    want = plain(IDS).logits
    torch.testing.assert_close(model(IDS).logits, want, atol=2e-5, rtol=1e-5)
    assert (tiny()(IDS).logits - want).abs().max() > 0.05
    lora.merge(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=2e-5, rtol=1e-5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_fresh_adapters_change_nothing_and_keep_the_names_of_weights():
    model, plain = tiny(), tiny()
    lora.apply(model, LoRA())
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert plain.state_dict().keys() < model.state_dict().keys()


@pytest.mark.parametrize("preset", ["minimind3", "minimind3-moe", "minimind2-moe"])
def test_only_adapters_are_trained_and_held_by_the_optimizer(preset):
    torch.manual_seed(0)
    model = mm.MiniMind(mm.ModelConfig.preset(preset, hidden_size=64, num_hidden_layers=2, vocab_size=97))
    before = {name: p.clone() for name, p in model.named_parameters()}
    lora.apply(model, LoRA(rank=4))
    own = {id(t) for pair in lora.adapters(model).values() for t in pair}
    groups = param_groups(model, 0.1)
    assert {id(p) for g in groups for p in g["params"]} == own and len(own) == 2 * 2 * 4
    out = model(IDS, targets=IDS)
    (-out.logprobs.sum() + out.aux_loss).backward()
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(b.abs().max() > 0 for _, b in lora.adapters(model).values())
    # as many bytes as two moments of A and B
    assert sum(t.numel() for s in optimizer.state.values() for k, t in s.items() if k != "step") == 2 * sum(
        p.numel() for g in groups for p in g["params"]
    )


def test_dropout_acts_in_training_only():
    model, _ = adapted(LoRA(dropout=0.5))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 7, bias=False)
    parts = [lora.Projection("x.q_proj", 0, 4), lora.Projection("x.k_proj", 4, 5), lora.Projection("x.v_proj", 5, 7)]
    layer = lora.AdaptedLinear(base, parts, {"x.q_proj", "x.v_proj"}, LoRA(rank=2, alpha=3.0)).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (qa, qb), (va, vb) = [
        (a.A.weight.detach().clone().requires_grad_(), torch.randn_like(a.B.weight).requires_grad_())
        for a in (layer.lora["q_proj"], layer.lora["v_proj"])
    ]
    with torch.no_grad():
        layer.lora["q_proj"].B.weight.copy_(qb)
        layer.lora["v_proj"].B.weight.copy_(vb)
    weight = base.weight.detach().double()
    want = x @ weight.T + 1.5 * F.pad(x @ qa.T @ qb.T, (0, 3)) + 1.5 * F.pad(x @ va.T @ vb.T, (5, 0))
    got = layer(x)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [x, qa, qb, va, vb], upstream)
    mine = [layer.lora[n].get_submodule(m).weight for n in ("q_proj", "v_proj") for m in "AB"]
    for g, w in zip(torch.autograd.grad(got, [x, *mine], upstream), wanted, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("kind", ["adapter", "adapter.pth"])
def test_files_come_back(tmp_path, kind):
    spec = LoRA(rank=3, alpha=6.0, targets=("q_proj", "k_proj", "down_proj"))
    model, _ = adapted(spec)
    lora.save_adapters(lora.adapters(model), spec, tmp_path / kind)
    again = tiny()
    got = lora.load_adapters(again, tmp_path / kind)
    assert got.targets == spec.targets and got.rank == 3
    # MiniMind's .pth is half precision
    tolerance = dict(atol=2e-2, rtol=0) if kind.endswith("pth") else dict(atol=0, rtol=0)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, **tolerance)
    assert (model(IDS).logits - tiny()(IDS).logits).abs().max() > 0.2


def test_pth_has_minimind_names_and_needs_no_alpha(tmp_path):
    """Oracle: what MiniMind's own load_lora and forward do with the file: original(x) + B(A(x)) on square layers."""
    spec = LoRA(rank=3, alpha=6.0, targets=("square",))
    model, _ = adapted(spec)
    lora.save_adapters(lora.adapters(model), spec, tmp_path / "identity_64.pth")
    tensors = torch.load(tmp_path / "identity_64.pth", weights_only=True)
    assert tensors["model.layers.1.self_attn.o_proj.lora.B.weight"].shape == (64, 3)
    assert all(t.dtype == torch.float16 for t in tensors.values()) and len(tensors) == 2 * 2 * 2
    plain = tiny()
    disk = to_disk_names(plain.state_dict(), plain.config)
    with torch.no_grad():
        for name in [n for n in tensors if ".lora.A." in n]:
            a, b = tensors[name].float(), tensors[name.replace(".lora.A.", ".lora.B.")].float()
            disk[name.replace(".lora.A.", ".")] += b @ a
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("preset", "format"), [("minimind2", "llama"), ("minimind3", "qwen3"), ("minimind3-moe", "qwen3_moe")]
)
def test_peft_loads_the_adapters_on_the_exported_model(tmp_path, preset, format):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    plain = mm.MiniMind(mm.ModelConfig.preset(preset, **shape)).eval()
    mm.save_pretrained(plain, tmp_path / "base", format=format)
    spec = LoRA(rank=3, alpha=6.0, targets=ATTENTION if "moe" in preset else TARGETS)
    lora.apply(plain, spec)
    with torch.no_grad():
        for _, b in lora.adapters(plain).values():
            b.normal_(std=0.3)
    lora.save_adapters(lora.adapters(plain), spec, tmp_path / "adapter", base=str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        without = base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)
        assert (without - theirs(IDS).logits).abs().max() > 0.1
        merged = theirs.merge_and_unload()
        lora.merge(plain)
        torch.testing.assert_close(plain(IDS).logits, merged(IDS).logits, atol=1e-4, rtol=1e-4)


def test_peft_writes_what_we_read(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    mm.save_pretrained(tiny(), tmp_path / "base", format="qwen3")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = tiny()
    lora.load_adapters(model, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_a_user_can_get_wrong(tmp_path):
    with pytest.raises(ValueError, match="no target query; choose from q_proj"):
        LoRA(targets=("query",))
    with pytest.raises(ValueError, match="rank of at least 1"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="experts, which LoRA leaves alone"):
        lora.apply(
            mm.MiniMind(mm.ModelConfig.preset("minimind3-moe", hidden_size=64, num_hidden_layers=1, vocab_size=97)),
            LoRA(targets=("q_proj", "up_proj")),
        )
    model, _ = adapted(LoRA())
    with pytest.raises(ValueError, match="adapters already"):
        lora.apply(model, LoRA())
    lora.save_adapters(lora.adapters(model), LoRA(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="maps 64 to \\d+ features, the model's 32 to \\d+: .* another model"):
        lora.load_adapters(tiny(hidden_size=32, head_dim=8), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"the model has no model.layers.1"):
        lora.load_adapters(tiny(num_hidden_layers=1), tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds no adapters"):
        lora.read_adapters(tmp_path / "nowhere")
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.pth cannot be read"):
        lora.read_adapters(tmp_path / "bad.pth")
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="is not part of an adapter"):
        lora.read_adapters(tmp_path / "model.pth")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds other things"):
        lora.save_adapters(lora.adapters(model), LoRA(), tmp_path / "notes")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        lora.read_adapters(tmp_path / "adapter")


def test_the_command_merges_and_converts(tmp_path, capsys):
    model, _ = adapted(LoRA(rank=3, alpha=6.0))
    want = model(IDS).logits
    lora.save_adapters(lora.adapters(model), LoRA(rank=3, alpha=6.0), tmp_path / "run" / "adapter")
    base = tiny()
    from minimind_fast.data import samples
    from minimind_fast.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(base, tmp_path / "untied")
    with pytest.raises(ValueError, match="tokenizer"):  # a model without its tokenizer is no use to chat with
        convert.main_lora(["merge", str(tmp_path / "untied"), str(tmp_path / "run"), str(tmp_path / "out")])
    big = tiny(vocab_size=6400)
    mm.save_pretrained(big, tmp_path / "base", tokenizer=tokenizer)
    assert convert.main_lora(["merge", str(tmp_path / "base"), str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    merged = mm.load_pretrained(tmp_path / "out")
    lora.load_adapters(big, tmp_path / "run")
    torch.testing.assert_close(merged(IDS).logits, big(IDS).logits, atol=2e-5, rtol=1e-5)
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="add --overwrite"):
        convert.main_lora(["convert", str(tmp_path / "run"), str(tmp_path / "out")])
    assert convert.main_lora(["convert", str(tmp_path / "run"), str(tmp_path / "a.pth")]) == 0
    assert "square projections only" in capsys.readouterr().out
    assert convert.main_lora(["convert", str(tmp_path / "a.pth"), str(tmp_path / "peft")]) == 0
    lora.load_adapters(base, tmp_path / "peft")
    torch.testing.assert_close(base(IDS).logits, want, atol=2e-2, rtol=0)


def test_export_and_chat_merge_adapters_on_the_way(tmp_path, capsys):
    model = mm.MiniMind(mm.ModelConfig.preset("tiny"))
    mm.save_pretrained(model, tmp_path / "base", tokenizer=mm.Tokenizer.load(samples.path("tokenizer")))
    spec = lora.LoRA(2, None, 0.0, tuple(lora.ATTENTION))
    lora.apply(model, spec)
    for _, b in lora.adapters(model).values():
        torch.nn.init.normal_(b.data, std=0.3)
    lora.save_adapters(lora.adapters(model), spec, tmp_path / "adapter")
    lora.merge(model)
    argv = ["export", str(tmp_path / "base"), str(tmp_path / "hf"), "--lora", str(tmp_path / "adapter")]
    assert cli.main(argv) == 0
    exported = mm.load_pretrained(tmp_path / "hf")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], value, rtol=0, atol=0)
    opened = parsed(["x", "--lora", str(tmp_path / "adapter")], tmp_path / "base")
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight) and not opened.training
    assert torch.equal(
        opened.model.layers[0].self_attn.qkv_proj.weight, model.model.layers[0].self_attn.qkv_proj.weight
    )
    assert cli.main([*argv[:2], str(tmp_path / "hf2"), "--lora", str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def parsed(argv, path):
    parser = argparse.ArgumentParser()
    options.add_model_options(parser)
    args = parser.parse_args(argv)
    args.path = str(path)
    return options.open_model(args)[0]
