"""SFT, LoRA and reasoning through their real commands: each trains, ranks and ZeRO stages agree, a resume is bitwise."""

import json
import shutil

import pytest
import torch
from halves import needs_bf16
from launching import read_log, run
from stand_ins import Engine, resume_file

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.packing import Batch
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.training import setup as stage
from minimind_fast.training.resume import checkpoints
from minimind_fast.weights import lora

TINY = ["--max_seq_len", "64", "--batch_size", "4", "--num_threads", "1", "--log_interval", "1", "--sample_tokens", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run's folder with the weights of an untrained model."""
    torch.manual_seed(0)
    config = mm.ModelConfig.preset("tiny", hidden_size=64, num_hidden_layers=2, vocab_size=6400)
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    mm.save_pretrained(mm.MiniMind(config), folder / "pretrain" / "weights", tokenizer=tokenizer)
    return folder


def chats(path, rows):
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def losses(folder):
    return {step: row["loss"] for step, row in read_log(folder).items() if "loss" in row}


def test_sft_starts_from_the_run_before_and_leaves_a_model_that_answers(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    data = chats(
        tmp_path / "chats.jsonl", [chat("hi", "hello"), chat("hi " * 90, "never seen"), chat("bye", "bye " * 90)]
    )
    args = [*TINY, "--data_path", data, "--val_data_path", data, "--save_dir", tmp_path, "--epochs", 9]
    out = run("sft.py", [*args, "--max_steps", 9, "--learning_rate", 1e-3])
    assert "1 of 3 documents are left out: no token to learn within --max_seq_len 64" in out
    assert "pretrain: 0.5M parameters" in out and "The model answers" in out and "Validation loss" in out
    assert losses(tmp_path / "sft")[9] < losses(tmp_path / "sft")[1] - 0.3
    assert mm.load_pretrained(tmp_path / "sft").num_parameters() > 0


def test_a_run_of_minimind_s_goes_on_with_its_optimizer(base, tmp_path):
    """From its *_resume.pth: at AdamW's step, with an older run of the name moved aside and a log of its own."""
    file = tmp_path / "full_sft_64_resume.pth"
    resume_file(mm.load_pretrained(base / "pretrain"), file, steps=5)
    (tmp_path / "sft" / "checkpoints" / "step_00000001").mkdir(parents=True)
    data = chats(tmp_path / "chats.jsonl", [chat(f"hi {i}", f"hello {i}") for i in range(12)])
    args = [*TINY, "--from_weight", file, "--with_optimizer", "--tokenizer_path", base / "pretrain" / "weights"]
    args += ["--data_path", data, "--save_dir", tmp_path, "--no_packing", "--epochs", 3, "--dtype", "float32"]
    args += ["--save_interval", 7, "--keep_checkpoints", 9]
    out = run("sft.py", args)
    assert f"Going on from step 5 of {file}, with its optimizer" in out and "An older run was moved" in out
    before = losses(tmp_path / "sft")
    assert sorted(before) == [*range(6, 5 + 2 * 3 + 1)], "three steps an epoch; the file is in the second of three"
    shutil.rmtree(checkpoints(tmp_path / "sft" / "checkpoints")[-1])
    assert "Going on from step 7 (" in run("sft.py", [*args, "--from_resume"])
    assert losses(tmp_path / "sft") == before


def test_without_weights_the_command_to_run_first_is_named(tmp_path):
    out = run("lora.py", [*TINY, "--save_dir", tmp_path], expect=1)
    assert "run `deepspeed train/sft.py` first" in out and "Traceback" not in out


def test_reason_weighs_tags(base, tmp_path):
    """The first step's loss by hand: the same batch, tags weighted ten times, divided by the number of tokens."""
    data = chats(tmp_path / "chats.jsonl", [chat("2?", "<think>\none more\n</think>\n<answer>\n3\n</answer>")])
    args = [
        *TINY,
        "--from_weight",
        base / "pretrain",
        "--data_path",
        data,
        "--save_dir",
        tmp_path,
        "--dtype",
        "float32",
    ]
    run("reason.py", [*args, "--max_steps", 2, "--epochs", 2])
    row = read_log(tmp_path / "reason")[1]
    tokenizer = Tokenizer.load(base / "pretrain" / "weights")
    heavy = {"</think>": 10.0, "<answer>": 10.0, "</answer>": 10.0}  # <think> is in the prompt
    parts = ["one more\n", "</think>", "\n\n", "<answer>", "\n3\n", "</answer>", "<|im_end|>"]
    prompt = "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    ids, weights = tokenizer.encode(prompt), [0.0] * len(tokenizer.encode(prompt))
    for part in parts:
        ids += tokenizer.encode(part)
        weights += [heavy.get(part, 1.0)] * len(tokenizer.encode(part))
    with torch.no_grad():
        logits = mm.load_pretrained(base / "pretrain")(torch.tensor([ids])).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    weight = torch.tensor(weights[1:])
    assert row["loss"] == pytest.approx((nll * weight).sum().item() / weight.count_nonzero().item(), abs=1e-4)
    assert row["nll"] == pytest.approx((nll * (weight > 0)).sum().item() / weight.count_nonzero().item(), abs=1e-4)


def test_a_bad_line_and_weights_without_tokenizer_stop_before_training(base, tmp_path):
    data = chats(tmp_path / "chats.jsonl", [chat("2?", "3"), [{"role": "robot", "content": "x"}]])
    args = [*TINY, "--data_path", data, "--save_dir", tmp_path, "--from_weight"]
    out = run("sft.py", [*args, base / "pretrain"], expect=1)
    assert "chats.jsonl, line 2: message 1: role must be one of" in out and "Traceback" not in out
    model = mm.load_pretrained(base / "pretrain")
    mm.save_pretrained(model, tmp_path / "full_sft_64.pth", format="pth")
    args.append(tmp_path / "full_sft_64.pth")
    assert "no tokenizer with it: give --tokenizer_path" in run("sft.py", args, expect=1)
    args += ["--tokenizer_path", base / "pretrain" / "weights"]
    args += ["--on_bad_line", "skip", "--max_steps", 1]  # the shape is read from the file
    assert "left out 1 unusable lines" in run("sft.py", args)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("preset", ["minimind3", "minimind2-moe"])
def test_the_loss_and_its_gradients_are_those_of_plain_cross_entropy(preset, packed, weighted):
    """Rows of a prompt, an answer and padding; the oracle runs each row alone, with full logits."""
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)
    model = mm.MiniMind(mm.ModelConfig.preset(preset, **shape))
    rows = [(torch.randint(1, 97, (n,)), begin) for n, begin in ((9, 4), (7, 2))]
    inputs, targets, weights = [], [], []
    for ids, begin in rows:
        target = ids[1:].clone()
        target[: begin - 1] = mm.IGNORE_INDEX
        inputs.append(ids[:-1])
        targets.append(target)
        weights.append(torch.rand(target.shape) * 10 * (target != mm.IGNORE_INDEX))
    count = sum(int((t != mm.IGNORE_INDEX).sum()) for t in targets)
    if packed:
        cu = torch.tensor([0, 8, 14], dtype=torch.int32)
        parts = (torch.cat(inputs), torch.cat(targets), cu, 8, count, 2, torch.cat(weights) if weighted else None)
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        stacked = pad(weights, batch_first=True) if weighted else None
        parts = (
            pad(inputs, batch_first=True),
            pad(targets, batch_first=True, padding_value=-100),
            None,
            8,
            count,
            2,
            stacked,
        )

    got = stage.next_token_loss(Engine(model), Batch(*parts))
    model.zero_grad()
    got.total.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = torch.zeros(())
    for ids, target, weight in zip(inputs, targets, weights, strict=True):
        nll = torch.nn.functional.cross_entropy(model(ids[None]).logits[0], target, reduction="none", ignore_index=-100)
        want = want + (nll * weight if weighted else nll).sum()
    want.backward()
    torch.testing.assert_close(got.total, want)
    assert ("nll" in got.metrics) == weighted and (got.aux is not None) == ("moe" in preset)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


# ------------------------------------------------------------------------------------------------------------------ LoRA


@pytest.fixture(scope="module")
def lora_args(base):
    return [
        *TINY,
        "--from_weight",
        base / "pretrain",
        "--dtype",
        "float32",
        "--batch_size",
        2,
        "--max_minutes",
        0,
        "--learning_rate",
        2e-3,
    ]


def adapters(folder):
    return lora.read_adapters(folder / "lora")[0]


@pytest.fixture(scope="module")
def one_rank(lora_args, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    out = run(
        "lora.py", [*lora_args, "--save_dir", folder, "--zero_stage", 0, "--accumulation_steps", 4, "--max_steps", 4]
    )
    assert "The adapters alone are in" in out
    return folder


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_left_to_multiply_the_heads_gradients_by_is_a_power_of_two(weighted):
    class Spy(torch.nn.Module):
        module = mm.MiniMind(mm.ModelConfig.preset("tiny"))
        config = module.config

        def forward(self, _ids, targets, grad_weights, **_):
            self.promised, self.logprobs = grad_weights, torch.randn(targets.shape, requires_grad=True)
            return mm.model.ModelOutput(logprobs=self.logprobs)

    ids = torch.arange(5, 45)
    weights = torch.tensor([1.0, 10.0]).repeat(20) if weighted else None
    batch = Batch(ids, ids, torch.tensor([0, 40], dtype=torch.int32), 40, 40, 1, weights, factor=1 / 51234)
    spy = Spy()
    (stage.next_token_loss(spy, batch).total * batch.factor).backward()
    left = spy.logprobs.grad / spy.promised
    assert torch.equal(left, left[:1].expand(40)) and left[0].abs().log2().frac() == 0


def test_lora_moves_adapters_only_and_merges_them(base, one_rank):
    found = adapters(one_rank)
    assert len(found) == 2 * 4 and all(b.abs().max() > 0 for _, b in found.values())
    before = mm.load_pretrained(base / "pretrain")
    merged = mm.load_pretrained(one_rank / "lora")
    lora.load_adapters(before, one_rank / "lora")
    lora.merge(before)
    for (name, want), got in zip(before.state_dict().items(), merged.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_lora_on_two_ranks_trains_the_same_adapters(lora_args, one_rank, tmp_path, zero_stage):
    """Frozen base, tied head: a rank that trained alone, or lost its part, would end with other weights.

    At stage 3 also: a resume is bitwise, and another base is rejected.
    """
    args = [*lora_args, "--save_dir", tmp_path, "--zero_stage", zero_stage, "--accumulation_steps", 2, "--max_steps", 4]
    args += ["--save_interval", 2, "--keep_checkpoints", 9, "--no_merge"]
    out = run("lora.py", args, ranks=2)
    assert "minimind-fast lora merge" in out and "0.5M parameters (0.01M of them trained)" in out
    before = losses(tmp_path / "lora")
    assert before == pytest.approx(losses(one_rank / "lora"), abs=1e-5)
    whole = adapters(tmp_path)
    for name, pair in adapters(one_rank).items():
        for mine, want in zip(whole[name], pair, strict=True):
            # By norm: where a gradient is only rounding noise, Adam still takes a full step, in any direction.
            assert (mine - want).norm() <= 1e-3 * want.norm(), name
    if zero_stage == 3:
        shutil.rmtree(checkpoints(tmp_path / "lora" / "checkpoints")[-1])
        resume = [*args, "--from_resume"]
        assert "Going on from step 2" in run("lora.py", resume, ranks=2)
        assert losses(tmp_path / "lora") == before
        for name, pair in adapters(tmp_path).items():
            assert all(torch.equal(x, y) for x, y in zip(pair, whole[name], strict=True)), name
        out = run("lora.py", [*resume, "--from_weight", "none", "--preset", "tiny"], ranks=2, expect=1)
        assert "the frozen weights (none) are not those that this run began with" in out


@needs_bf16
def test_a_resume_in_bf16_restores_the_adapters_masters(lora_args, tmp_path):
    """The default on one rank; the frozen base is not in the checkpoint."""
    args = [*lora_args, "--dtype", "bfloat16", "--save_dir", tmp_path, "--lora_dropout", 0.1, "--max_steps", 4]
    args += ["--save_interval", 2, "--keep_checkpoints", 9, "--no_merge"]
    run("lora.py", args)
    before, saved = losses(tmp_path / "lora"), checkpoints(tmp_path / "lora" / "checkpoints")
    state = torch.load(saved[-1] / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert not [name for name in state if name.startswith("model.layers") and ".lora." not in name]
    shutil.rmtree(saved[-1])
    run("lora.py", [*args, "--from_resume"])
    assert losses(tmp_path / "lora") == before
