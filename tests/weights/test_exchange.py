"""Llama, Qwen3 and Qwen3-MoE folders, both ways: Transformers opens ours, we open theirs, and both compute the same."""

import json
import os
from pathlib import Path

import pytest
import torch

import minimind_fast as mm
from minimind_fast.commands import convert
from minimind_fast.config import YARN, ModelConfig
from minimind_fast.data import samples
from minimind_fast.model import rope_tables
from minimind_fast.weights.hf import fitting_format, from_hf_config, to_hf_config

GOLDEN = Path(__file__).parents[1] / "golden"
SAMPLE_TOKENIZER = samples.path("tokenizer")
SHORT_YARN = {**YARN, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
# Each format with the models that it holds.
MODELS = {
    "llama": ("llama", dict(generation=2)),
    "llama-untied": ("llama", dict(generation=2, tie_word_embeddings=False)),
    "llama-wide-heads": ("llama", dict(generation=2, head_dim=16)),
    "llama-yarn": ("llama", dict(generation=2, rope_scaling=SHORT_YARN)),
    "qwen3": ("qwen3", dict(generation=3)),
    "qwen3-untied": ("qwen3", dict(generation=3, tie_word_embeddings=False)),
    "qwen3-wide-heads": ("qwen3", dict(generation=3, head_dim=24)),
    "qwen3-yarn": ("qwen3", dict(generation=3, rope_scaling=SHORT_YARN)),
    "qwen3_moe": ("qwen3_moe", dict(generation=3, use_moe=True, moe_intermediate_size=24)),
    "qwen3_moe-top2": ("qwen3_moe", dict(generation=3, use_moe=True, num_experts=6, num_experts_per_tok=2)),
    "qwen3_moe-raw": (
        "qwen3_moe",
        dict(generation=3, use_moe=True, num_experts_per_tok=2, norm_topk_prob=False, tie_word_embeddings=False),
    ),
}


def tiny(changes: dict, **more) -> mm.MiniMind:
    torch.manual_seed(0)
    size = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = mm.MiniMind(ModelConfig(**{**size, "max_position_embeddings": 256, "rope_theta": 1e4, **changes, **more}))
    return shaken(model).eval()


def shaken(model):
    """Weights that make logits of several units, norms and attention that matter."""
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.2)
    return model


def ids(length: int, rows: int = 2, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hf():
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def open_in_hf(hf, folder, **options):
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=options.pop("dtype", torch.float32), output_loading_info=True, local_files_only=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def compare(ours: mm.MiniMind, theirs, lengths=(1, 40, 256)) -> None:
    with torch.no_grad():
        for length in lengths:
            x = ids(length, vocab=ours.config.vocab_size)
            a, b = ours(x).logits, theirs(x).logits
            assert a.std() > 0.3  # logits that differ from one another at all
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------- ours to theirs


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name, hf, tmp_path):
    format, changes = MODELS[name]
    model = tiny(changes)
    mm.save_pretrained(model, tmp_path / "m", format=format)
    theirs = open_in_hf(hf, tmp_path / "m")
    assert type(theirs).__name__ == to_hf_config(model.config, format)["architectures"][0]
    compare(model, theirs)  # 256 positions: four times YaRN's original length
    prompt = ids(8)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt))
    assert torch.equal(theirs.generate(prompt, **options), greedy(model, prompt, 20))
    # and what was written comes back
    again = mm.load_pretrained(tmp_path / "m")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    x = ids(256)
    assert torch.equal(again(x).logits, model(x).logits)


def greedy(model: mm.MiniMind, x: torch.Tensor, new: int) -> torch.Tensor:
    return model.generate(x, max_new_tokens=new, temperature=0.0, stop_ids=())


def test_the_yarn_of_the_tests_matters():
    for name in ("llama-yarn", "qwen3-yarn"):
        with_yarn, without = tiny(MODELS[name][1]), tiny(MODELS[name][1], rope_scaling=None)
        assert (with_yarn(ids(256)).logits - without(ids(256)).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("minimind2_dense", "llama"),
        ("minimind3_dense", "qwen3"),
        ("minimind3_dense_yarn", "qwen3"),
        ("minimind3_moe", "qwen3_moe"),
    ],
)
def test_minimind_itself_answers_the_same_in_transformers(name, format, hf, tmp_path):
    from safetensors.torch import load_file

    model = mm.load_pretrained(GOLDEN / name)
    assert fitting_format(model.config) == format
    mm.save_pretrained(model, tmp_path / "m", format=format)
    golden = load_file(GOLDEN / name / "golden.safetensors")
    theirs = open_in_hf(hf, tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(theirs(golden["input_ids"]).logits, golden["eval_logits"], atol=2e-5, rtol=0)
    prompt = golden["input_ids"][:1, :8]
    written = theirs.generate(
        prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(prompt)
    )
    assert torch.equal(written, golden["greedy_ids"])


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe-top2"])
def test_shards_and_half_precision(name, hf, tmp_path):
    format, changes = MODELS[name]
    model = tiny(changes)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        mm.save_pretrained(model, folder, format=format, dtype=dtype, max_shard_size="10KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
        assert open_in_hf(hf, folder, dtype="auto").dtype == dtype
        rounded = mm.load_pretrained(folder)
        assert rounded.lm_head.weight.dtype == dtype
        compare(rounded.float(), open_in_hf(hf, folder))  # the same rounded weights on both sides


@pytest.mark.parametrize("generation", ["minimind2", "minimind3", "sample"])
def test_chat_template_and_tokens_are_the_same(generation, hf, tmp_path, request):
    folder = SAMPLE_TOKENIZER if generation == "sample" else request.getfixturevalue("shared") / "minimind" / generation
    tokenizer = mm.Tokenizer.load(folder)
    name = "llama" if generation == "minimind2" else "qwen3"
    format, changes = MODELS[name]
    model = tiny(changes, vocab_size=6400, eos_token_id=5)
    mm.save_pretrained(model, tmp_path / "m", format=format, tokenizer=tokenizer)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "m", local_files_only=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    chat = [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "Hello,  世界! <b>1 & 2</b>\n"},
        {"role": "assistant", "content": "Hi. 🙂"},
        {"role": "user", "content": "再见"},
    ]
    for messages in (chat, chat[1:]):
        for prompt in (True, False):
            text = tokenizer.render_chat(messages, add_generation_prompt=prompt)
            assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == text
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)) == text
    # greedy text, with the tokenizer's end token for the model's
    generated = hf.GenerationConfig.from_pretrained(tmp_path / "m", local_files_only=True)
    assert (generated.bos_token_id, generated.eos_token_id, generated.pad_token_id) == (1, 2, 0)
    other = open_in_hf(hf, tmp_path / "m")
    inputs = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = other.generate(**inputs, max_new_tokens=16, do_sample=False)[0]
    ours = mm.load_pretrained(tmp_path / "m").generate(inputs["input_ids"], max_new_tokens=16, temperature=0.0)[0]
    assert theirs.decode(answer) == tokenizer.decode(ours.tolist())


def test_files_of_an_export(tmp_path):
    tokenizer = mm.Tokenizer.load(SAMPLE_TOKENIZER)
    mm.save_pretrained(tiny(dict(generation=3), vocab_size=6400), tmp_path / "m", format="qwen3", tokenizer=tokenizer)
    written = {p.name for p in (tmp_path / "m").iterdir()}
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert written == model_files | {"tokenizer.json", "tokenizer_config.json"}
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["minimind_fast"]["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert raw["dtype"] == raw["torch_dtype"] == "float32"


# --------------------------------------------------------------------------------------------------------- theirs to ours

SIZE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
HF_YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64)
THEIRS = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True, head_dim=16, rms_norm_eps=1e-5)),
    "llama-all-heads": ("Llama", dict(num_key_value_heads=None)),
    "llama-yarn": ("Llama", dict(rope_parameters=HF_YARN)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3-tied": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "qwen3-default-head-dim": ("Qwen3", {}),
    "qwen3-yarn": ("Qwen3", dict(head_dim=16, rope_parameters={**HF_YARN, "beta_fast": 16, "beta_slow": 2})),
    "qwen3-yarn-mscale": (
        "Qwen3",
        dict(head_dim=16, rope_parameters={**HF_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
    ),
    # no room beyond the original length is named: there, YaRN applies all the same
    "qwen3-yarn-unnamed-length": (
        "Qwen3",
        dict(head_dim=16, max_position_embeddings=64, rope_parameters={**HF_YARN, "attention_factor": 1.0}),
    ),
    "qwen3_moe": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    "qwen3_moe-normalised": (
        "Qwen3Moe",
        dict(
            num_experts=6,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            head_dim=16,
            tie_word_embeddings=True,
        ),
    ),
}


def made_by_hf(hf, kind: str, **changes):
    torch.manual_seed(1)
    config = getattr(hf, f"{kind}Config")(**{**SIZE, **changes})
    return shaken(getattr(hf, f"{kind}ForCausalLM")(config)).eval()


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_as_their_model(name, hf, tmp_path):
    kind, changes = THEIRS[name]
    theirs = made_by_hf(hf, kind, **changes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if name == "qwen3_moe" else "1GB")
    ours = mm.load_pretrained(tmp_path / "theirs")
    compare(ours, theirs)
    # through our own folder, and back to theirs
    mm.save_pretrained(ours, tmp_path / "ours")
    compare(mm.load_pretrained(tmp_path / "ours"), theirs, lengths=(40,))
    mm.save_pretrained(ours, tmp_path / "back", format=ours_format(kind))
    compare(ours, open_in_hf(hf, tmp_path / "back"))


def ours_format(kind: str) -> str:
    return {"Llama": "llama", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}[kind]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_the_cast_order_of_theirs_is_kept_in_bfloat16(kind, hf, tmp_path):
    """Our norm in their order gives bfloat16 logits closer to theirs than in MiniMind3's order."""
    theirs = made_by_hf(hf, kind, head_dim=8, num_hidden_layers=1).bfloat16()
    theirs.save_pretrained(tmp_path / "m")
    ours = mm.load_pretrained(tmp_path / "m")
    assert ours.config.norm_cast_first and ours.lm_head.weight.dtype == torch.bfloat16
    x = ids(64, rows=8)
    with torch.no_grad():
        wanted = theirs(x).logits.float()
        kept = (ours(x).logits.float() - wanted).norm() / wanted.norm()
        for module in ours.modules():
            if isinstance(module, mm.model.RMSNorm):
                module.cast_first = False
        turned = (ours(x).logits.float() - wanted).norm() / wanted.norm()
    assert kept < turned < 0.02, (kept, turned)


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("format", "changes", "reasons"),
    [
        ("llama", dict(generation=3), ["no q/k norm, and this model has; 'qwen3' can"]),
        ("llama", dict(generation=2, use_moe=True), ["Llama has no experts", "shared experts", "only 'minimind' and"]),
        ("qwen3", dict(generation=2), ["Qwen3 always has q/k norm", "'llama' can"]),
        ("qwen3", dict(generation=3, use_moe=True), ["Qwen3 has no experts", "'qwen3_moe' can"]),
        ("qwen3_moe", dict(generation=3), ["has experts in every layer", "'qwen3' can"]),
        ("qwen3_moe", dict(generation=2, use_moe=True), ["always has q/k norm", "shared experts"]),
        ("qwen3_moe", dict(generation=3, use_moe=True, num_shared_experts=1), ["shared experts", "only 'minimind'"]),
        (
            "llama",
            dict(generation=2, hidden_size=30, head_dim=8),
            ["hidden_size (30) to be a multiple of the heads (4)"],
        ),
        (
            "qwen3",
            dict(generation=3, rope_scaling={**YARN, "original_max_position_embeddings": 16384}, rope_theta=100.0),
            ["cut off at another frequency"],
        ),
    ],
)
def test_what_a_format_cannot_say_is_refused_before_anything_is_written(format, changes, reasons, tmp_path):
    model = tiny(changes, max_position_embeddings=32768)
    with pytest.raises(ValueError, match=f"cannot be written as '{format}'") as error:
        mm.save_pretrained(model, tmp_path / "sub" / "m", format=format)
    assert all(reason in str(error.value) for reason in reasons), error.value
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer has 6400 tokens, the model 97"):
        mm.save_pretrained(
            tiny(dict(generation=3)), tmp_path / "m", format="qwen3", tokenizer=mm.Tokenizer.load(SAMPLE_TOKENIZER)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", dict(attention_bias=True), r"biases \(attention_bias\)"),
        ("llama", dict(attention_bias=True, mlp_bias=True), r"biases \(attention_bias, mlp_bias\)"),
        ("qwen3", dict(attention_bias=True), r"biases \(attention_bias\)"),
        ("llama", dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "RoPE scaling of type 'llama3'"),
        ("llama", dict(rope_scaling=dict(type="linear", factor=2.0)), "RoPE scaling of type 'linear'"),
        ("qwen3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "a part of each head"),
        ("qwen3", dict(rope_parameters={**HF_YARN, "truncate": False}), "truncate=false"),
        ("qwen3", dict(use_sliding_window=True, sliding_window=64), "sliding-window"),
        ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sliding-window"),
        ("qwen3_moe", dict(decoder_sparse_step=2), "layers without experts"),
        ("qwen3_moe", dict(mlp_only_layers=[0]), "layers without experts"),
        ("qwen3_moe", dict(num_experts=0), "no experts"),
        ("llama", dict(quantization_config=dict(bits=4)), "quantized"),
        ("llama", dict(hidden_act="gelu"), "hidden_act must be 'silu'"),
        ("llama", dict(hidden_size=None), "llama without hidden_size"),
        ("llama", dict(rope_parameters={**HF_YARN, "rope_theta": 10.0}), "cut off elsewhere"),
    ],
)
def test_what_minimind_does_not_compute_is_refused_with_the_reason(kind, changes, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **SIZE, **changes}))
    with pytest.raises(ValueError, match=reason) as error:
        mm.load_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json"))


def test_biases_in_the_weights_alone_are_refused_too(hf, tmp_path):
    made_by_hf(hf, "Llama", attention_bias=True).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(file.read_text().replace('"attention_bias": true', '"attention_bias": false'))
    with pytest.raises(ValueError, match=r"not part of this model: model\.layers\.0\.self_attn\.k_proj\.bias"):
        mm.load_pretrained(tmp_path / "m")


# ---------------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_what_a_config_leaves_out_means_what_it_means_there(kind, hf):
    """Only what Transformers itself cannot guess is given."""
    raw = dict(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=32)
    ours = from_hf_config({"model_type": kind, **raw}, "config.json")
    theirs = hf.AutoConfig.for_model(kind, **raw)
    names = ["num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]
    if kind == "qwen3_moe":
        names += [
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "router_aux_loss_coef",
        ]
    assert {n: getattr(ours, n) for n in names} == {n: getattr(theirs, n) for n in names}
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


def test_yarn_fields_of_transformers_4_and_5_mean_the_same():
    config = tiny(dict(generation=3, rope_scaling=SHORT_YARN, rope_theta=5e4)).config
    raw = to_hf_config(config, "qwen3")
    assert raw["rope_parameters"] == {**raw["rope_scaling"], "rope_theta": 5e4} and raw["rope_theta"] == 5e4
    for gone in (("rope_parameters",), ("rope_scaling", "rope_theta")):
        part = {name: value for name, value in raw.items() if name not in gone}
        read = from_hf_config(part, "config.json")
        assert torch.equal(rope_tables(read)[0], rope_tables(config)[0]), gone


def test_yarn_within_the_original_length_keeps_its_frequencies():
    inside = dict(generation=3, rope_scaling={**SHORT_YARN, "original_max_position_embeddings": 256})
    config = tiny(inside).config
    read = from_hf_config(to_hf_config(config, "qwen3"), "config.json")
    assert torch.equal(rope_tables(read)[0], rope_tables(config)[0])
    config.rope_scaling["attention_factor"] = 1.0
    assert "rope_scaling" not in to_hf_config(config, "qwen3")


def test_special_ids_of_several_kinds():
    raw = {"model_type": "llama", **SIZE}

    def read(generation=None, **changes):
        config = from_hf_config({**raw, **changes}, "config.json", generation)
        return config.bos_token_id, config.eos_token_id, config.pad_token_id

    assert read(bos_token_id=5, eos_token_id=[7, 8], pad_token_id=9) == (5, 7, 9)
    several = from_hf_config({**raw, "eos_token_id": [7, 8]}, "config.json")
    assert several.stop_ids == {7, 8} and to_hf_config(several, "llama")["eos_token_id"] == [7, 8]
    assert ModelConfig.from_dict(several.to_dict()).stop_ids == {7, 8}
    assert read(bos_token_id=None, eos_token_id=7) == (-1, 7, 7)
    assert read(eos_token_id=7, generation={"eos_token_id": [11, 7], "bos_token_id": None}) == (-1, 11, 11)
    assert read() == (-1, -1, 0)
    config = from_hf_config(raw, "config.json")
    assert to_hf_config(config, "llama")["eos_token_id"] is None


def test_moe_fields_keep_their_meaning():
    config = tiny(MODELS["qwen3_moe-raw"][1], router_aux_loss_coef=0.25, moe_intermediate_size=24).config
    raw = to_hf_config(config, "qwen3_moe")
    assert (raw["decoder_sparse_step"], raw["mlp_only_layers"]) == (1, [])
    for names in (raw, {**{k: v for k, v in raw.items() if k != "num_experts"}, "num_local_experts": 4}):
        read = from_hf_config(names, "config.json")
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"):
            assert getattr(read, name) == getattr(config, name)
        assert (read.router_aux_loss_coef, read.num_shared_experts, read.use_moe) == (0.25, 0, True)


# ----------------------------------------------------------------------------------------------------------- command line


def run_folder(tmp_path: Path, changes: dict, tokenizer: bool = True) -> Path:
    model = tiny(changes, vocab_size=6400)
    mm.save_pretrained(
        model, tmp_path / "run" / "weights", tokenizer=mm.Tokenizer.load(SAMPLE_TOKENIZER) if tokenizer else None
    )
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_export_then_import_gives_the_same_model(name, tmp_path, capsys):
    run = run_folder(tmp_path, MODELS[name][1])
    assert convert.main_export([str(run), str(tmp_path / "hf"), "--max_shard_size", "300KB"]) == 0
    assert f"{tmp_path / 'hf'}: {name}, float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == name
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert convert.main_import([str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "minimind"
    assert mm.Tokenizer.load(tmp_path / "back").fingerprint == mm.Tokenizer.load(SAMPLE_TOKENIZER).fingerprint
    a, b = mm.load_pretrained(run), mm.load_pretrained(tmp_path / "back")
    x = ids(40, vocab=6400)
    assert torch.equal(a(x).logits, b(x).logits)


def test_dtype_of_an_export(tmp_path):
    run = run_folder(tmp_path, MODELS["llama"][1])
    for dtype in ("bfloat16", "float16", "float32"):
        assert convert.main_export([str(run), str(tmp_path / dtype), "--dtype", dtype, "--format", "llama"]) == 0
        assert mm.load_pretrained(tmp_path / dtype).lm_head.weight.dtype == getattr(torch, dtype)
        # As stored, also where this machine would answer in float32.
        assert convert.main_import([str(tmp_path / dtype), str(tmp_path / f"again_{dtype}")]) == 0
        assert mm.load_pretrained(tmp_path / f"again_{dtype}").lm_head.weight.dtype == getattr(torch, dtype)


def test_a_pth_goes_through_the_command_line(tmp_path, capsys, monkeypatch):
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=8, max_position_embeddings=64)
    monkeypatch.setitem(mm.config.PRESETS, "small", dict(generation=2, **small))
    config = ModelConfig.preset("small")
    model = mm.MiniMind(config)
    mm.save_pretrained(model, tmp_path / "m.pth", format="pth")
    assert convert.main_import([str(tmp_path / "m.pth"), str(tmp_path / "untold")]) == 0
    assert convert.main_import([str(tmp_path / "m.pth"), str(tmp_path / "a"), "--preset", "small"]) == 0
    a, b = (mm.load_pretrained(tmp_path / name).state_dict() for name in ("untold", "a"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "without one (name it with --tokenizer)" in capsys.readouterr().err
    options = ["--preset", "small", "--tokenizer", str(SAMPLE_TOKENIZER)]
    assert convert.main_export([str(tmp_path / "m.pth"), str(tmp_path / "b"), *options]) == 0
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert convert.main_export([str(tmp_path / "a"), str(tmp_path / "c.pth"), "--format", "pth"]) == 0
    again = mm.load_pretrained(tmp_path / "c.pth", config=config)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.half().float())


def test_exports_that_are_refused_leave_everything_as_it_was(tmp_path):
    run = run_folder(tmp_path, dict(generation=2, use_moe=True))
    for options, reason in [
        (["--format", "llama"], "shared experts"),
        ([], "no other format holds this model.*--format minimind and pth do"),
    ]:
        with pytest.raises(ValueError, match=reason):
            convert.main_export([str(run), str(tmp_path / "out"), *options])
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").touch()
    for out, reason in [
        (run / "weights", "lies inside the other"),
        (run / "weights" / "hf", "lies inside the other"),
        (run, "holds other things than a model"),
        (tmp_path / "own", r"thesis\.tex"),
    ]:
        with pytest.raises(ValueError, match=reason):
            convert.main_export([str(run), str(out), "--format", "minimind", "--overwrite"])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "own"}
    assert convert.main_export([str(run), str(tmp_path / "out"), "--format", "minimind"]) == 0
    with pytest.raises(ValueError, match="add --overwrite"):
        convert.main_export([str(run), str(tmp_path / "out"), "--format", "minimind"])
    assert convert.main_export([str(run), str(tmp_path / "out"), "--format", "minimind", "--overwrite"]) == 0


def test_a_tokenizer_of_another_model_is_refused(tmp_path, shared):
    run = run_folder(tmp_path, MODELS["qwen3"][1])
    with pytest.raises(ValueError, match="was trained with tokenizer"):
        convert.main_export([str(run), str(tmp_path / "hf"), "--tokenizer", str(shared / "minimind" / "minimind2")])
    assert not (tmp_path / "hf").exists()


def test_an_export_lets_a_tool_ask_for_bos(hf, tmp_path):
    """lm-eval scores choices as MiniMind's pretraining saw texts, with bos in front, by `add_bos_token=True`."""
    tokenizer = mm.Tokenizer.load(SAMPLE_TOKENIZER)
    assert convert.main_export([str(run_folder(tmp_path, MODELS["qwen3"][1])), str(tmp_path / "hf")]) == 0
    for asked, first in ((False, []), (True, [tokenizer.bos_id])):
        theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "hf", add_bos_token=asked)
        assert theirs.encode("What is 2 + 3? 天空") == first + tokenizer.encode("What is 2 + 3? 天空")
        assert theirs.bos_token_id == tokenizer.bos_id
