"""Adapters that are more than plain LoRA, on their base, on another, and merged twice; several end ids; null tokens."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import minimind_fast as mm
from minimind_fast.commands import convert
from minimind_fast.data import samples
from minimind_fast.infer.generate import complete, stream
from minimind_fast.weights import lora
from minimind_fast.weights.lora import LoRA

IDS = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(5))


def base_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    model = mm.MiniMind(mm.ModelConfig(**{"generation": 3, **shape, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def trained(model, spec=None):
    lora.apply(model, spec or LoRA(rank=3, alpha=6.0))
    with torch.no_grad():
        for _, b in lora.adapters(model).values():
            b.normal_(std=0.3)
    return model


def saved(model, path, spec=None):
    lora.save_adapters(lora.adapters(model), spec or LoRA(rank=3, alpha=6.0), path, fingerprint=model.base_fingerprint)
    return path


# ------------------------------------------------------------------------------------------------ adapters and their base


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("alpha", [4, 8])
def test_what_pissa_and_olora_took_out_of_the_base_is_taken_out(start, alpha, tmp_path):
    """Oracle: PEFT's own model, with its A and B moved away from where they began."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = base_model()
    mm.save_pretrained(model, tmp_path / "base", format="qwen3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, init_lora_weights=start)
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02)
    theirs.save_pretrained(tmp_path / "adapter")
    plain = model(IDS).logits
    spec = lora.load_adapters(model, tmp_path / "adapter")
    want = theirs(IDS).logits
    assert spec.init == start and (want - plain).abs().max() > 0.05
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-4, rtol=1e-4)
    lora.merge(model)
    torch.testing.assert_close(model(IDS).logits, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"{start} adapters also change their base"):
        convert.main_lora(["convert", str(tmp_path / "adapter"), str(tmp_path / "a.pth")])
    assert convert.main_lora(["convert", str(tmp_path / "adapter"), str(tmp_path / "copy")]) == 0
    assert lora.read_adapters(tmp_path / "copy")[1].init == start


@pytest.mark.parametrize("case", ["ad_pissa", "ad_olora"])
def test_adapters_that_peft_wrote_itself(case, shared, tmp_path):
    found, spec = lora.read_adapters(shared / "cases" / case)
    assert spec.init == case.removeprefix("ad_") and (spec.rank, spec.scale) == (4, 2.0) and found


@pytest.mark.parametrize(("field", "value"), [
    ("alora_invocation_tokens", [1, 2]), ("use_dora", True), ("use_rslora", True), ("rank_pattern", {"q": 2}),
    ("alpha_pattern", {"q": 2}), ("modules_to_save", ["lm_head"]), ("fan_in_fan_out", True), ("lora_bias", True),
    ("layer_replication", [[0, 1]]), ("trainable_token_indices", [3]), ("target_parameters", ["experts"]),
    ("use_qalora", True), ("use_bdlora", {"nblocks": 2}), ("arrow_config", {"top_k": 2}), ("a_kind_of_tomorrow", True),
    ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("init_lora_weights", "pissa_niter_4"),
    ("init_lora_weights", "lora_ga"), ("bias", "all"),
])  # fmt: skip
def test_every_other_kind_is_refused_by_its_name(field, value, tmp_path):
    folder = saved(trained(base_model()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"not those with .*{field}"):
        lora.read_adapters(folder)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("lora_alpha", float("nan"), "LoRA's alpha must be a finite number, not nan"),
        ("lora_alpha", float("inf"), "LoRA's alpha"),
        ("lora_alpha", "16", "LoRA's alpha must be a finite number, not '16'"),
        ("lora_alpha", None, "lacks lora_alpha"),
        ("lora_dropout", float("nan"), "a dropout in"),
        ("r", 8, "says r=8, the adapters have rank 3"),
    ],
)
def test_a_number_that_is_none_is_refused(field, value, problem, tmp_path):
    folder = saved(trained(base_model()), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"adapter_config.json.*{problem}"):
        lora.read_adapters(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", ["adapter", "adapter.pth"])
def test_adapters_that_hold_no_numbers_are_named(file, value, tmp_path):
    model = trained(base_model())
    with torch.no_grad():
        next(iter(lora.adapters(model).values()))[1][0, 0] = value
    saved(model, tmp_path / file)
    with pytest.raises(ValueError, match=r"lora.*B.*holds NaN or infinity"):
        lora.read_adapters(tmp_path / file)


def test_a_wrong_base_is_told(tmp_path):
    folder = saved(trained(base_model()), tmp_path / "adapter")
    lora.load_adapters(base_model(), folder)
    for dtype in (torch.bfloat16, torch.float16):  # the same base, exported in half precision
        lora.load_adapters(base_model().to(dtype).float(), folder)
    other = base_model(seed=1)
    with pytest.raises(ValueError, match="were trained on other weights"):
        lora.load_adapters(other, folder)
    lora.load_adapters(other, folder, any_base=True)
    further = base_model()
    with torch.no_grad():
        further.model.layers[1].mlp.down_proj.weight[3, 5] += 0.1
    with pytest.raises(ValueError, match="one trained further"):
        lora.load_adapters(further, folder)


@pytest.mark.parametrize("file", ["adapter", "adapter.pth"])
def test_a_second_merge_is_told(file, tmp_path, capsys):
    """A .pth says nothing of its base, but the merged model knows what is in it."""
    tokenizer = mm.Tokenizer.load(samples.path("tokenizer"))
    model = base_model(vocab_size=6400)
    mm.save_pretrained(model, tmp_path / "base", tokenizer=tokenizer)
    adapter = str(saved(trained(model), tmp_path / file))
    assert convert.main_lora(["merge", str(tmp_path / "base"), adapter, str(tmp_path / "once")]) == 0
    unknown = f"{file} does not record the weights that it was trained on" in capsys.readouterr().err
    assert unknown == (file == "adapter.pth"), "said of what nothing can check, and only of that"
    argv = ["merge", str(tmp_path / "once"), adapter, str(tmp_path / "twice")]
    with pytest.raises(ValueError, match="merged into this model already"):
        convert.main_lora(argv)
    assert convert.main_lora([*argv, "--any_base"]) == 0
    assert len(mm.load_pretrained(tmp_path / "twice").merged_adapters) == 2


def test_adapters_that_minimind_would_pass_over_are_refused_on_demand(tmp_path):
    folder = saved(trained(base_model()), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"would pass over 4 of 8, such as model.layers.0.self_attn.k_proj"):
        convert.main_lora(["convert", str(folder), str(tmp_path / "a.pth"), "--for_minimind"])
    spec = LoRA(rank=2, targets=("square",))
    square = saved(trained(base_model(), spec), tmp_path / "square", spec)
    assert convert.main_lora(["convert", str(square), str(tmp_path / "a.pth"), "--for_minimind"]) == 0


# --------------------------------------------------------------------------------------------------------------- end ids


def test_an_answer_ends_at_any_of_several_ids(tmp_path):
    """[0, 2] in generation_config.json: whichever comes first ends it, in whatever way it is asked for."""
    model = base_model(vocab_size=6400)
    prompt = [5, 6, 7]
    first = int(model.generate(torch.tensor([prompt]), max_new_tokens=1, stop_ids=())[0, -1])
    tokenizer = mm.Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(model, tmp_path / "m", format="qwen3", tokenizer=tokenizer)
    file = tmp_path / "m" / "generation_config.json"
    for ends in ([4000, first], [first, 4000]):
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
        again = mm.load_pretrained(tmp_path / "m")
        assert again.config.stop_ids == {4000, first}
        assert again.generate(torch.tensor([prompt]), max_new_tokens=9).shape == (1, 4)
        assert [(c.ids, c.finish_reason) for c in complete(again, [prompt])] == [([first], "stop")]
        answer = stream(again, tokenizer, prompt)
        assert "".join(answer) == "" and answer.finish_reason == "stop" and answer.ids == [first]
    for format in ("minimind", "qwen3"):  # and they travel on
        mm.save_pretrained(again, tmp_path / format, format=format)
        assert mm.load_pretrained(tmp_path / format).config.stop_ids == {4000, first}


def test_a_tokenizer_without_bos_and_pad_opens(tmp_path):
    """As Qwen's and Llama's: null is none; a field that is not there is still an error."""
    model = base_model(vocab_size=6400)
    plain = mm.Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(model, tmp_path / "m", format="qwen3", tokenizer=plain)
    file = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "bos_token": None, "pad_token": None}), encoding="utf-8")
    assert convert.main_import([str(tmp_path / "m"), str(tmp_path / "own")]) == 0
    tokenizer = mm.Tokenizer.load(tmp_path / "own")
    assert (tokenizer.bos_id, tokenizer.pad_id) == (tokenizer.eos_id, tokenizer.eos_id)
    assert not tokenizer.has("bos_token") and tokenizer.fingerprint == plain.fingerprint
    assert convert.main_export([str(tmp_path / "own"), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["bos_token_id"] is None
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text(encoding="utf-8"))["bos_token"] is None
    for gone in ({"bos_token"}, {"eos_token"}):
        file.write_text(json.dumps({k: v for k, v in config.items() if k not in gone}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"lacks the field '{gone.pop()}'"):
            mm.Tokenizer.load(tmp_path / "m")


def test_the_fingerprint_stands_where_peft_does_not_mind(tmp_path):
    peft = pytest.importorskip("peft")
    folder = saved(trained(base_model()), tmp_path / "adapter")
    assert peft.LoraConfig.from_pretrained(folder).r == 3
    shutil.copytree(folder, tmp_path / "copy")
    assert set(load_file(tmp_path / "copy" / "adapter_model.safetensors")) == {
        f"base_model.model.{name}.lora_{half}.weight" for name in lora.read_adapters(folder)[0] for half in "AB"
    }
