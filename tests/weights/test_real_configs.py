"""Published configs of real models, as their config.json says it: what is read from them has the published size."""

import pytest
import torch

import minimind_fast as mm
from minimind_fast.model import rope_tables
from minimind_fast.weights.hf import from_hf_config, to_hf_config

COMMON = dict(attention_bias=False, attention_dropout=0.0, hidden_act="silu", torch_dtype="bfloat16", use_cache=True)
QWEN = dict(
    bos_token_id=151643, eos_token_id=151645, head_dim=128, initializer_range=0.02, max_position_embeddings=40960,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None, use_sliding_window=False,
    vocab_size=151936, transformers_version="4.51.0",
)  # fmt: skip
QWEN_ENDS = dict(bos_token_id=151643, eos_token_id=[151645, 151643], pad_token_id=151643, top_k=20, do_sample=True)
# config.json, generation_config.json, parameters (and those one token meets) counted from the published shapes
MODELS = {
    "Llama-3.2-1B": (
        dict(
            architectures=["LlamaForCausalLM"], bos_token_id=128000, eos_token_id=128001, head_dim=64, hidden_size=2048,
            initializer_range=0.02, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
            model_type="llama", num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1,
            rms_norm_eps=1e-05, rope_theta=500000.0, tie_word_embeddings=True, transformers_version="4.45.0.dev0",
            rope_scaling=dict(
                factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                rope_type="llama3",
            ), vocab_size=128256, **COMMON,
        ),
        dict(bos_token_id=128000, do_sample=True, eos_token_id=128001, temperature=0.6, top_p=0.9),
        1_235_814_400, 1_235_814_400, {128001}, (128000, 128001),
    ),
    "Qwen3-0.6B": (
        dict(
            architectures=["Qwen3ForCausalLM"], hidden_size=1024, intermediate_size=3072, max_window_layers=28,
            model_type="qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
            tie_word_embeddings=True, **QWEN, **COMMON,
        ),
        QWEN_ENDS, 596_049_920, 596_049_920, {151645, 151643}, (151643, 151643),
    ),
    "Qwen3-30B-A3B": (
        dict(
            architectures=["Qwen3MoeForCausalLM"], decoder_sparse_step=1, hidden_size=2048, intermediate_size=6144,
            max_window_layers=48, mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768,
            norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8, num_hidden_layers=48,
            num_key_value_heads=4, output_router_logits=False, router_aux_loss_coef=0.001, tie_word_embeddings=False,
            **QWEN, **COMMON,
        ),
        QWEN_ENDS, 30_532_122_624, 3_353_032_704, {151645, 151643}, (151643, 151643),
    ),
    "SmolLM2-135M": (
        dict(
            architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=0, hidden_size=576,
            initializer_range=0.041666666666666664, intermediate_size=1536, is_llama_config=True,
            max_position_embeddings=8192, mlp_bias=False, model_type="llama", num_attention_heads=9,
            num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False,
            rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, transformers_version="4.40.1",
            vocab_size=49152, **COMMON,
        ),
        dict(bos_token_id=0, eos_token_id=0), 134_515_008, 134_515_008, {0}, (0, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_is_read_and_has_the_published_size(name):
    raw, generation, parameters, active, ends, (bos, pad) = MODELS[name]
    config = from_hf_config(raw, "config.json", generation)
    with torch.device("meta"):
        model = mm.MiniMind(config)
    assert (model.num_parameters(), model.num_parameters(active=True)) == (parameters, active)
    assert config.stop_ids == ends and (config.bos_token_id, config.pad_token_id) == (bos, pad)
    # and written again it says the same
    again = to_hf_config(config, raw["model_type"])
    skipped = ("eos_token_id", "rope_scaling", "initializer_range")  # the first two below; the last is no shape
    theirs = {k: v for k, v in raw.items() if k in again and v is not None and k not in skipped}
    assert {k: again[k] for k in theirs} == theirs
    assert (again.get("rope_scaling") or None) == raw["rope_scaling"]
    assert from_hf_config(again, "config.json", generation) == config


@pytest.mark.parametrize("name", MODELS)
def test_its_rotations_are_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.models.llama.modeling_llama")
    raw = MODELS[name][0]
    config = from_hf_config(raw, "config.json")
    theirs = transformers.AutoConfig.for_model("llama", **{k: v for k, v in raw.items() if k != "model_type"})
    theirs.head_dim = config.head_dim
    cos, sin = rope.LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None])
    mine = rope_tables(config, 512)
    for got, want in zip(mine, (cos[0], sin[0]), strict=True):
        torch.testing.assert_close(got, want[:, : config.head_dim // 2], atol=1e-5, rtol=0)


def test_llama_3_s_scaling_without_all_its_fields_is_refused():
    raw = dict(MODELS["Llama-3.2-1B"][0], rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0))
    with pytest.raises(ValueError, match="'llama3' without high_freq_factor, original_max_position_embeddings"):
        from_hf_config(raw, "config.json")
