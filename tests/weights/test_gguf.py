"""GGUF files: llama.cpp itself opens them, and gives our tokens, log-probabilities, text and chats."""

import itertools
import json
import random
import sys
import urllib.request

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, trainers

import minimind_fast as mm
from minimind_fast.commands import convert
from minimind_fast.config import YARN, ModelConfig
from minimind_fast.data import bpe, samples
from minimind_fast.weights.gguf import GGUF_DTYPES, architecture, save_gguf
from minimind_fast.weights.gguf_tokenizer import _RULES, pre_tokenizer

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("xllamacpp")
SAMPLE = mm.Tokenizer.load(samples.path("tokenizer"))
SHORT_YARN = {**YARN, "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.2}
MIXTURE = dict(use_moe=True, moe_intermediate_size=96)
# Each with the architecture that llama.cpp has for it.
MODELS = {
    "2": ("llama", dict(generation=2)),
    "2-untied": ("llama", dict(generation=2, tie_word_embeddings=False)),
    "2-wide-heads": ("llama", dict(generation=2, head_dim=32)),
    "2-yarn": ("llama", dict(generation=2, rope_scaling=SHORT_YARN)),
    "3": ("qwen3", dict(generation=3)),
    "3-untied": ("qwen3", dict(generation=3, tie_word_embeddings=False)),
    "3-wide-heads": ("qwen3", dict(generation=3, head_dim=24)),
    "3-yarn": ("qwen3", dict(generation=3, rope_scaling={**SHORT_YARN, "attention_factor": 1.0})),
    "3-yarn-within-its-length": (
        "qwen3",
        dict(generation=3, rope_scaling={**SHORT_YARN, "factor": 16.0}, max_position_embeddings=64),
    ),
    "2-moe": ("bailingmoe", dict(generation=2, **MIXTURE)),
    "2-moe-raw": ("bailingmoe", dict(generation=2, **MIXTURE, norm_topk_prob=False, num_shared_experts=2)),
    "2-moe-not-shared": (
        "bailingmoe",
        dict(generation=2, **MIXTURE, num_shared_experts=0, num_experts=5, num_experts_per_tok=3),
    ),
    "2-moe-wide-heads": ("bailingmoe", dict(generation=2, **MIXTURE, head_dim=32, tie_word_embeddings=False)),
    "2-moe-yarn": ("bailingmoe", dict(generation=2, **MIXTURE, rope_scaling=SHORT_YARN)),
    "3-moe": ("qwen3moe", dict(generation=3, **MIXTURE)),
    "3-moe-top3": ("qwen3moe", dict(generation=3, **MIXTURE, num_experts=6, num_experts_per_tok=3)),
    "3-moe-wide-heads": ("qwen3moe", dict(generation=3, **MIXTURE, head_dim=32)),
    "3-moe-raw": ("bailingmoe2", dict(generation=3, **MIXTURE, norm_topk_prob=False)),
    "3-moe-raw-shared": (
        "bailingmoe2",
        dict(generation=3, **MIXTURE, norm_topk_prob=False, num_experts_per_tok=2, num_shared_experts=2),
    ),
    "3-moe-shared": ("bailingmoe2", dict(generation=3, **MIXTURE, num_experts_per_tok=2, num_shared_experts=1)),
    "3-moe-raw-yarn": ("bailingmoe2", dict(generation=3, **MIXTURE, norm_topk_prob=False, rope_scaling=SHORT_YARN)),
}
PIECES = [
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "1",
        "23",
        "456",
        "a",
        "It's",
        "we'LL",
        "'re",
        "你好",
        "。",
        "١٢",
        "²",
        "½",
        "Ⅷ",
    ),
    *(
        "é",
        "e\u0301",
        "🙂",
        "👩‍👧",
        "\u00a0",
        "\u3000",
        "\u200b",
        "_",
        "--",
        "ß",
        "İ",
        "ा",
        "한국어",
        "ไทย",
        "\u0085",
        "\u2028",
    ),
]
TAGS = ["<think>", "</think>", "<tool_call>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"]


def tiny(changes: dict, **more) -> mm.MiniMind:
    torch.manual_seed(0)
    size = dict(vocab_size=6400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = mm.MiniMind(ModelConfig(**{**size, "max_position_embeddings": 256, "rope_theta": 1e4, **changes, **more}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model.eval()


class LlamaCpp:
    """llama.cpp's server on a file, in float32 and without flash attention."""

    def __init__(self, path, context: int = 256):
        params = llama_cpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = context, 1, 0, -1
        params.cpuparams.n_threads, params.warmup = 1, False
        params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = llama_cpp.Server(params)

    def ask(self, path: str, **body) -> dict:
        data, header = json.dumps(body).encode(), {"content-type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, header)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def logprobs(self, ids: list[int], vocab: int = 6400) -> torch.Tensor:
        """(V,) of the token after these."""
        body = dict(prompt=ids, n_predict=1, n_probs=vocab, temperature=0, ignore_eos=True, cache_prompt=False)
        top = self.ask("/completion", **body)["completion_probabilities"][0]["top_logprobs"]
        out = torch.full((vocab,), float("nan"))
        out[[t["id"] for t in top]] = torch.tensor([t["logprob"] for t in top])
        return out

    def greedy(self, ids: list[int], new: int) -> list[int]:
        body = dict(prompt=ids, n_predict=new, temperature=0, ignore_eos=True, return_tokens=True, cache_prompt=False)
        return self.ask("/completion", **body)["tokens"]

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written(model, tmp_path, tokenizer=SAMPLE, dtype="f32"):
    save_gguf(model, tmp_path / "m.gguf", tokenizer, dtype)
    return tmp_path / "m.gguf"


def ours(model: mm.MiniMind, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def prompts(model: mm.MiniMind, *lengths: int) -> list[list[int]]:
    """Prompts after which the likeliest token is whole text: llama.cpp tells no probabilities of half a character."""
    ids = torch.randint(100, 6000, (300,), generator=torch.Generator().manual_seed(3)).tolist()
    out = []
    for length in lengths:
        starts = (ids[at : at + length] for at in range(300 - length + 1))
        out.append(next(p for p in starts if "\ufffd" not in SAMPLE.decode([int(ours(model, p).argmax())])))
    return out


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name, tmp_path):
    kind, changes = MODELS[name]
    model = tiny(changes)
    assert architecture(model.config) == kind
    server = LlamaCpp(written(model, tmp_path))
    last = model.config.max_position_embeddings - 8
    for prompt in prompts(model, 1, 30, last):  # YaRN is checked far beyond its original length
        want, found = ours(model, prompt), server.logprobs(prompt)
        assert want.std() > 0.5  # tokens that differ in likelihood at all
        torch.testing.assert_close(found, want, atol=5e-5, rtol=0)
    prompt = torch.tensor([prompt[:9]])
    text = model.generate(prompt, max_new_tokens=20, temperature=0.0, stop_ids=())[0, 9:].tolist()
    assert server.greedy(prompt[0].tolist(), 20) == text


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3-yarn", dict(rope_scaling=None)),
        ("3-yarn", dict(rope_scaling=SHORT_YARN)),
        ("3-moe-raw", dict(norm_topk_prob=True)),
        ("3-moe-raw-shared", dict(norm_topk_prob=True)),
        ("2-moe-raw", dict(norm_topk_prob=True)),
    ],
)
def test_what_these_models_differ_in_matters(a, b):
    model, other = tiny(MODELS[a][1]), tiny({**MODELS[a][1], **b})
    prompt = prompts(model, 248)[0]
    assert (ours(model, prompt) - ours(other, prompt)).abs().max() > 0.01


def check_rounded(found: np.ndarray, want: np.ndarray, kind: str) -> None:
    if kind == "Q8_0":  # 32 at a time: whole numbers up to 127, and a float16 scale
        largest = np.abs(want.reshape(-1, 32)).max(1, keepdims=True)
        half_a_step, of_the_scale = 0.5 / 127, 2**-11
        assert (np.abs(found - want).reshape(-1, 32) <= (half_a_step + of_the_scale) * 1.001 * largest).all()
        return
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    np.testing.assert_array_equal(found, torch.from_numpy(want).to(dtype).float().numpy())


@pytest.mark.parametrize("dtype", GGUF_DTYPES)
@pytest.mark.parametrize("name", ["2", "3-moe", "3-moe-raw", "3-wide-heads"])
def test_the_stored_numbers(name, dtype, tmp_path):
    changes = {**MODELS[name][1], "intermediate_size": 100}  # a row of 100 has no whole blocks of 32
    model = tiny(changes, vocab_size=6400)
    exact = {t.name: np.array(t.data) for t in gguf.GGUFReader(written(model, tmp_path)).tensors}
    found = gguf.GGUFReader(written(model, tmp_path, dtype=dtype)).tensors
    assert {t.name for t in found} == exact.keys()
    kinds = set()
    for tensor in found:
        want = exact[tensor.name]
        whole = want.ndim == 1 or "ffn_gate_inp" in tensor.name
        kind = "F32" if whole else "F16" if dtype == "q8_0" and want.shape[-1] % 32 else dtype.upper()
        assert tensor.tensor_type.name == kind
        check_rounded(gguf.dequantize(tensor.data, tensor.tensor_type), want, kind)
        kinds.add(kind)
    assert dtype.upper() in kinds and (dtype != "q8_0" or "moe" in name or "F16" in kinds)


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 0.02), ("bf16", 0.15), ("q8_0", 0.4)])
@pytest.mark.parametrize("name", ["2", "3", "2-moe", "3-moe", "3-moe-raw"])
def test_llama_cpp_runs_the_smaller_dtypes(name, dtype, bound, tmp_path):
    """It rounds activations too, so this only tells a file that works from one that does not; numbers are checked above."""
    model = tiny(MODELS[name][1])
    server = LlamaCpp(written(model, tmp_path, dtype=dtype))
    prompt = prompts(model, 30)[0]
    assert (server.logprobs(prompt) - ours(model, prompt)).abs().max() < bound < 0.6 * ours(model, prompt).std()


# ----------------------------------------------------------------------------------------------------------- tokenizers


def awkward_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    alphabet = [c for c in map(chr, range(32, 0x3000)) if c.isprintable()]
    out = ["".join(draw.choice(PIECES + TAGS) for _ in range(draw.randint(1, 14))) for _ in range(count)]
    return out + ["".join(draw.choice(alphabet) for _ in range(draw.randint(1, 24))) for _ in range(count // 3)]


def check_tokens(tokenizer: mm.Tokenizer, texts: list[str], tmp_path) -> None:
    size = max(tokenizer.vocab_size, 300)
    server = LlamaCpp(written(tiny(MODELS["3"][1], vocab_size=size, num_hidden_layers=1), tmp_path, tokenizer, "f16"))
    wrong = [text for text in texts if server.tokens(text) != tokenizer.encode(text)]
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("name", ["sample", "minimind2", "minimind3"])
def test_tokens_are_the_same(name, tmp_path, request):
    texts, tokenizer = awkward_texts(600), SAMPLE
    if name != "sample":
        shared = request.getfixturevalue("shared")
        tokenizer = mm.Tokenizer.load(shared / "minimind" / name)
        with open(shared / "data" / "sft_real.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, 150)]
        texts += [message["content"] or "" for row in rows for message in row["conversations"]]
    assert pre_tokenizer(tokenizer) == "gpt-2"
    check_tokens(tokenizer, texts, tmp_path)


CORPUS = [
    f"It's {i} times {i * i}, we'll see 你好 {'x' * (i % 7)}\n\n  and   {i:05d}.\r\nÉté  1{i}" for i in range(200)
]
with open(samples.path("pretrain_val.jsonl"), encoding="utf-8") as lines:
    CORPUS += [json.loads(line)["text"] for line in itertools.islice(lines, 200)]


@pytest.mark.parametrize("split_digits", [True, False])
def test_tokens_of_a_tokenizer_trained_here(split_digits, tmp_path):
    """That digits stand alone is in the merges; the rule is GPT-2's either way."""
    tokenizer = bpe.train_bpe(CORPUS, vocab_size=500, split_digits=split_digits)
    assert (len(tokenizer.encode("x 00123")) == 7) == split_digits
    assert pre_tokenizer(tokenizer) == "gpt-2"
    check_tokens(tokenizer, CORPUS + awkward_texts(600, seed=1), tmp_path)


def trained_by(rule: list[dict], **model) -> mm.Tokenizer:
    """A tokenizer with other pre-tokenizers, as other folders have them."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainer=trainer)
    state = json.loads(backend.to_str())
    steps = [{**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step for step in rule]
    state["pre_tokenizer"] = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    state["model"].update(model)
    return mm.Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), SAMPLE.config, source="another")


@pytest.mark.parametrize("name", _RULES)
def test_tokens_by_other_rules(name, tmp_path):
    tokenizer = trained_by(_RULES[name], ignore_merges=name == "llama-bpe")
    assert pre_tokenizer(tokenizer) == name
    check_tokens(tokenizer, CORPUS + awkward_texts(900, seed=2), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(rule=[{"type": "Whitespace"}]), "a rule without a name"),
        (dict(rule=[{**_RULES["gpt-2"][0], "add_prefix_space": True}]), "a rule without a name"),
        (dict(ignore_merges=True), "ignore_merges is not"),
        (dict(dropout=0.1), "its model sets dropout"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(change, reason, tmp_path):
    tokenizer = trained_by(change.pop("rule", _RULES["gpt-2"]), **change)
    with pytest.raises(ValueError, match=reason):
        save_gguf(tiny(MODELS["3"][1]), tmp_path / "m.gguf", tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_normalizer_is_refused(tmp_path):
    tokenizer = trained_by(_RULES["gpt-2"])
    tokenizer.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="normalises text first"):
        pre_tokenizer(tokenizer)


# ---------------------------------------------------------------------------------------------------------------- chats

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "查天气 <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CHAT = [
    {"role": "system", "content": "你是助手。"},
    {"role": "user", "content": "How warm is Paris?  <b>1 & 2</b>"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "1"},
    {"role": "assistant", "content": "It is 21 degrees in Paris."},
]


@pytest.mark.parametrize("name", ["sample", "minimind2", "minimind3"])
def test_prompts_are_the_same(name, tmp_path, request):
    tokenizer = SAMPLE if name == "sample" else mm.Tokenizer.load(request.getfixturevalue("shared") / "minimind" / name)
    server = LlamaCpp(written(tiny(MODELS["3"][1]), tmp_path, tokenizer))
    plain = [CHAT[1], CHAT[4], {"role": "user", "content": "Hello,  世界!\n"}]
    cases = [([CHAT[0], *plain], None), (plain, None), (CHAT[:4], TOOLS), (CHAT[1:2], TOOLS)]
    for messages, tools in cases[: 2 if name == "minimind2" else 4]:
        for thinking in (False, True):
            switches = {"enable_thinking": thinking, "open_thinking": thinking}
            body = {"messages": messages, "chat_template_kwargs": switches, **({"tools": tools} if tools else {})}
            want = tokenizer.render_chat(messages, tools=tools, add_generation_prompt=True, **switches)
            assert server.ask("/apply-template", **body)["prompt"] == want


def test_a_chat_with_tools(tmp_path):
    """A model that knows one chat by heart calls the tool and answers with its result, in llama.cpp as here."""
    torch.manual_seed(0)
    model = mm.MiniMind(ModelConfig.preset("tiny", hidden_size=64, num_hidden_layers=2, num_attention_heads=4)).train()
    ids = torch.tensor([SAMPLE.encode(SAMPLE.render_chat(CHAT, tools=TOOLS))])
    targets = ids[:, 1:].clone()
    for begin, end in ((0, 2), (3, 4)):  # only what the assistant says is learned
        start = SAMPLE.encode(SAMPLE.render_chat(CHAT[:begin], tools=TOOLS)) if begin else []
        upto = SAMPLE.encode(SAMPLE.render_chat(CHAT[:end], tools=TOOLS, add_generation_prompt=True))
        targets[:, max(len(start) - 1, 0) : len(upto) - 1] = mm.IGNORE_INDEX
    assert 20 < (targets != mm.IGNORE_INDEX).sum() < 80
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        loss = -model(ids[:, :-1], targets=targets).logprobs.sum() / (targets != mm.IGNORE_INDEX).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    assert loss < 0.02
    server = LlamaCpp(written(model.eval(), tmp_path), context=1024)
    options = dict(tools=TOOLS, temperature=0, max_tokens=100, chat_template_kwargs={"enable_thinking": False})
    first = server.ask("/v1/chat/completions", messages=CHAT[:2], **options)["choices"][0]
    assert first["finish_reason"] == "tool_calls"
    (made,) = first["message"]["tool_calls"]
    assert made["function"]["name"] == "weather" and json.loads(made["function"]["arguments"]) == {"city": "Paris"}
    second = server.ask("/v1/chat/completions", messages=CHAT[:4], **options)["choices"][0]
    assert (second["finish_reason"], second["message"]["content"]) == ("stop", CHAT[4]["content"])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(generation=3, **MIXTURE, norm_topk_prob=False, head_dim=32), "no GGUF holds this mixture.*hidden_size"),
        (
            dict(generation=3, rope_scaling=YARN, rope_theta=100.0, max_position_embeddings=4096),
            "cuts YaRN off at another frequency",
        ),
        (dict(generation=3, vocab_size=6000), "the tokenizer has 6400 tokens, the model 6000"),
    ],
)
def test_models_that_a_file_cannot_hold(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        save_gguf(tiny(changes), tmp_path / "m.gguf", SAMPLE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dtype", "value", "refused"), [("f16", 7e4, True), ("q8_0", 7e4, False), ("q8_0", 9e6, True)])
def test_values_beyond_float16(dtype, value, refused, tmp_path):
    model = tiny(MODELS["3"][1])
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = value
    if refused:
        with pytest.raises(ValueError, match=r"blk\.0\.ffn_down\.weight holds values beyond float16's 65504"):
            written(model, tmp_path, dtype=dtype)
        return
    (found,) = (t for t in gguf.GGUFReader(written(model, tmp_path, dtype=dtype)).tensors if "0.ffn_down" in t.name)
    assert gguf.dequantize(found.data, found.tensor_type)[0, 0] == pytest.approx(value, rel=1e-3)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'minimind_fast\[gguf\]'"):
        written(tiny(MODELS["3"][1]), tmp_path)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(tmp_path):
    mm.save_pretrained(tiny(MODELS["3-moe-raw"][1]).bfloat16(), tmp_path / "run" / "weights", tokenizer=SAMPLE)
    return tmp_path / "run"


@pytest.mark.parametrize(("option", "stored"), [("auto", "BF16"), ("f16", "F16"), ("float32", "F32"), ("q8_0", "Q8_0")])
def test_export(option, stored, run, tmp_path, capsys):
    for out, file, beside in [
        ("a.gguf", "a.gguf", "a.Modelfile"),
        ("folder", "folder/model.gguf", "folder/Modelfile"),
    ][:: 1 if option == "auto" else 2]:
        arguments = [str(run), str(tmp_path / out), "--format", "gguf", "--dtype", option]
        assert convert.main_export(arguments) == 0
        assert f"{tmp_path / file}: gguf, {stored.lower()}" in capsys.readouterr().out
        (head,) = (t for t in gguf.GGUFReader(tmp_path / file).tensors if t.name == "token_embd.weight")
        assert head.tensor_type.name == stored
        assert (tmp_path / beside).read_text().startswith(f"FROM ./{(tmp_path / file).name}\n")
        with pytest.raises(ValueError, match="add --overwrite"):
            convert.main_export(arguments)
        assert convert.main_export([*arguments, "--overwrite"]) == 0


def test_exports_that_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="q8_0 is for --format gguf only"):
        convert.main_export([str(run), str(tmp_path / "m"), "--format", "minimind", "--dtype", "q8_0"])
    mm.save_pretrained(tiny(MODELS["3"][1]), tmp_path / "bare")
    with pytest.raises(ValueError, match="a GGUF file holds its tokenizer"):
        convert.main_export([str(tmp_path / "bare"), str(tmp_path / "m.gguf"), "--format", "gguf"])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "bare"}
