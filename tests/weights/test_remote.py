"""Folders of format `minimind` in Transformers, by the modelling file that lies in them; and folders by MiniMind's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minimind_fast as mm
from minimind_fast.config import YARN, ModelConfig
from minimind_fast.data import samples

GOLDEN = Path(__file__).parents[1] / "golden"
SHORT_YARN = {**YARN, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
MODELS = {
    "2": dict(generation=2),
    "2-untied": dict(generation=2, tie_word_embeddings=False),
    "2-wide-heads": dict(generation=2, head_dim=16),
    "2-yarn": dict(generation=2, rope_scaling=SHORT_YARN),
    "2-moe": dict(generation=2, use_moe=True, moe_intermediate_size=24),
    "2-moe-raw": dict(generation=2, use_moe=True, norm_topk_prob=False, num_shared_experts=2, num_experts_per_tok=3),
    "3": dict(generation=3),
    "3-yarn-within-its-length": dict(generation=3, rope_scaling=SHORT_YARN, max_position_embeddings=64),
    "3-yarn": dict(generation=3, rope_scaling=SHORT_YARN, head_dim=24),
    "3-moe": dict(generation=3, use_moe=True),
    "3-moe-raw": dict(generation=3, use_moe=True, norm_topk_prob=False),
    "3-moe-shared": dict(generation=3, use_moe=True, num_experts_per_tok=2, num_shared_experts=1),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Transformers, with a cache of its own for the code that it copies out of folders."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield transformers


def tiny(changes: dict, **more) -> mm.MiniMind:
    torch.manual_seed(0)
    size = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = mm.MiniMind(ModelConfig(**{**size, "max_position_embeddings": 256, "rope_theta": 1e4, **changes, **more}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def opened(hf, folder, dtype=torch.float32):
    model, info = hf.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == "MiniMindForCausalLM"
    return model.eval()


def ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name, hf, tmp_path):
    model = tiny(MODELS[name])
    mm.save_pretrained(model, tmp_path / "m")
    theirs = opened(hf, tmp_path / "m")
    assert theirs.num_parameters() == model.num_parameters()
    with torch.no_grad():
        for length in (1, 40, model.config.max_position_embeddings):
            x = ids(length)
            want = model(x).logits
            assert want.std() > 0.3
            torch.testing.assert_close(theirs(x).logits, want, atol=2e-5, rtol=0)
            torch.testing.assert_close(theirs(x, logits_to_keep=1).logits, want[:, -1:], atol=2e-5, rtol=0)
    prompt = ids(8)
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None)
    want = model.generate(prompt, max_new_tokens=20, temperature=0.0, stop_ids=())
    assert torch.equal(theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options), want)
    # rows padded on the left, with the cache and without
    padded, mask = (torch.cat([torch.zeros_like(prompt[:, :3]), part], 1) for part in (prompt, torch.ones_like(prompt)))
    for use_cache in (True, False):
        written = theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **options)
        assert torch.equal(written[:, 3:], want)
    # saved again by Transformers, opened here
    theirs.save_pretrained(tmp_path / "again")
    again = mm.load_pretrained(tmp_path / "again")
    # in the newer generation's names; all in which the generations differ is said by fields of its own
    assert vars(again.config) == {**vars(model.config), "generation": 3}
    assert torch.equal(again(x).logits, model(x).logits)


def test_pieces_of_a_prompt_go_into_the_cache(hf, tmp_path):
    model = tiny(MODELS["3"])
    mm.save_pretrained(model, tmp_path / "m")
    theirs, x = opened(hf, tmp_path / "m"), ids(30)
    with torch.no_grad():
        first = theirs(x[:, :11], use_cache=True)
        rest = theirs(x[:, 11:], past_key_values=first.past_key_values)
        both = torch.cat([first.logits, rest.logits], 1)
        torch.testing.assert_close(both, model(x).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["2", "3-moe-shared"])
def test_loss_and_gradients(name, hf, tmp_path):
    model = tiny(MODELS[name], router_aux_loss_coef=0.0)
    mm.save_pretrained(model, tmp_path / "m")
    theirs, x = opened(hf, tmp_path / "m").train(), ids(30)
    labels = x.clone()
    labels[:, :5] = -100
    theirs(x, labels=labels).loss.backward()
    logprobs = model(x[:, :-1], targets=labels[:, 1:].contiguous()).logprobs
    loss = -logprobs.sum() / (labels[:, 1:] != -100).sum()
    loss.backward()
    ours = mm.weights.checkpoint.to_disk_names({n: p.grad for n, p in model.named_parameters()}, model.config)
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, ours[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("generation", [2, 3])
def test_half_precision(generation, hf, tmp_path):
    """In bfloat16 the order of cast and weight in the norms is each generation's own: rounding stays ours."""
    model = tiny(dict(generation=generation), num_hidden_layers=1).bfloat16()
    mm.save_pretrained(model, tmp_path / "m")
    theirs = opened(hf, tmp_path / "m", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    with torch.no_grad():
        x = ids(64, rows=8)
        want = model(x).logits.float()
        assert (theirs(x).logits.float() - want).norm() / want.norm() < 5e-3


@pytest.mark.parametrize(
    "name", ["minimind2_dense", "minimind2_moe", "minimind3_dense", "minimind3_dense_yarn", "minimind3_moe"]
)
def test_minimind_s_own_models_answer_the_same(name, hf, tmp_path):
    mm.save_pretrained(mm.load_pretrained(GOLDEN / name), tmp_path / "m")
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        found = opened(hf, tmp_path / "m")(golden["input_ids"]).logits
    torch.testing.assert_close(found, golden["eval_logits"], atol=2e-5, rtol=0)


def test_the_file_needs_nothing_of_ours(tmp_path):
    """In a process where minimind_fast cannot be imported."""
    pytest.importorskip("transformers")
    model = tiny(MODELS["3"])
    mm.save_pretrained(model, tmp_path / "m")
    program = f"""
import sys
sys.modules["minimind_fast"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r}, trust_remote_code=True)
torch.save(model.eval()(torch.arange(1, 20)[None]).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, model(torch.arange(1, 20)[None]).logits, atol=2e-5, rtol=0)


def test_files_of_a_folder(tmp_path):
    model, tokenizer = tiny(MODELS["2-moe"], vocab_size=6400), mm.Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(model, tmp_path / "m", tokenizer=tokenizer)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    assert raw["auto_map"] == {
        "AutoConfig": "modeling_minimind.MiniMindConfig",
        "AutoModelForCausalLM": "modeling_minimind.MiniMindForCausalLM",
    }
    assert (tmp_path / "m" / "modeling_minimind.py").is_file()
    mm.save_pretrained(model, tmp_path / "m", tokenizer=tokenizer)  # a folder with that file is replaced like any other
    for format in ("llama", "qwen3"):
        mm.save_pretrained(tiny(MODELS["2" if format == "llama" else "3"]), tmp_path / format, format=format)
        assert not (tmp_path / format / "modeling_minimind.py").exists()


@pytest.mark.parametrize("version", ["4.57.1", "5.23.0"])
@pytest.mark.parametrize("name", ["minimind3_dense", "minimind3_dense_yarn", "minimind3_moe"])
def test_folders_of_minimind_s_converter(name, version, tmp_path):
    """Its config.json, as recorded from running it: with max_seq_len, without what the other version leaves out."""
    config = mm.load_pretrained(GOLDEN / name).config
    raw = {
        "architectures": ["MiniMindForCausalLM"],
        "auto_map": {
            "AutoConfig": "model_minimind.MiniMindConfig",
            "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM",
        },
        **dict(bos_token_id=1, eos_token_id=2, dropout=0.0, dtype="float32", flash_attn=True, hidden_act="silu"),
        **dict(inference_rope_scaling=config.rope_scaling is not None, max_seq_len=8192, model_type="minimind"),
        **dict(transformers_version=version),
    }
    names = (
        *("head_dim", "hidden_size", "intermediate_size", "max_position_embeddings", "moe_intermediate_size"),
        *("norm_topk_prob", "num_attention_heads", "num_experts", "num_experts_per_tok", "num_hidden_layers"),
        *("num_key_value_heads", "rms_norm_eps", "rope_theta", "router_aux_loss_coef", "use_moe", "vocab_size"),
    )
    raw |= {key: getattr(config, key) for key in names}
    if version < "5":
        raw["rope_scaling"] = config.rope_scaling
    else:
        raw |= {"rope_scaling": None, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weights = load_file(GOLDEN / name / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        found = mm.load_pretrained(tmp_path)(golden["input_ids"]).logits
    torch.testing.assert_close(found, golden["eval_logits"], atol=2e-5, rtol=0)
