"""Distillation: the loss against full logits, rejected teachers, and the real command."""

import json

import pytest
import torch
import torch.nn.functional as F
from launching import load_script, read_log, run
from stand_ins import Engine

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.packing import Batch
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.ops import precision
from minimind_fast.training.resume import checkpoints
from minimind_fast.training.run import resolve


@pytest.fixture(scope="module")
def distill():
    """The script as a module."""
    return load_script("distill")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(samples.path("tokenizer"))


def make_model(hidden_size, seed=0, preset="tiny", **shape):
    torch.manual_seed(seed)
    shape = dict(num_hidden_layers=2, vocab_size=6400) | shape
    return mm.MiniMind(mm.ModelConfig.preset(preset, hidden_size=hidden_size, **shape))


@pytest.fixture(scope="module")
def teacher(tokenizer, tmp_path_factory):
    """A run's folder; its model is wider, deeper and untied."""
    folder = tmp_path_factory.mktemp("teacher") / "dpo"
    model = make_model(64, 1, num_hidden_layers=3, tie_word_embeddings=False)
    mm.save_pretrained(model, folder / "weights", tokenizer=tokenizer)
    return folder


def settled(distill, teacher, **changes):
    options = distill.DistillConfig(
        **{"teacher_path": str(teacher), "from_weight": "none", "dtype": "float32"} | changes
    )
    return resolve(options, distill.STAGE)


@pytest.mark.parametrize("preset", ["tiny", "minimind2-moe"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(distill, teacher, tokenizer, preset, alpha):
    """Two packed chats; the oracle runs each alone, with both models' full logits."""
    student = make_model(32, preset=preset).train()
    loss = distill.make_loss(settled(distill, teacher, alpha=alpha, temperature=2.0), student, tokenizer)
    documents = [(torch.randint(3, 6400, (n,)), begin) for n, begin in ((9, 4), (6, 2))]
    targets = []
    for ids, begin in documents:
        targets.append(ids[1:].clone())
        targets[-1][: begin - 1] = mm.IGNORE_INDEX
    cu = torch.tensor([0, 8, 13], dtype=torch.int32)
    count = sum(int((t >= 0).sum()) for t in targets)
    batch = Batch(torch.cat([ids[:-1] for ids, _ in documents]), torch.cat(targets), cu, 8, count, 2)
    got = loss(Engine(student), batch)
    got.total.backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert (got.aux is not None) == ("moe" in preset)

    student.zero_grad()
    frozen = mm.load_pretrained(teacher)
    nll = kl = torch.zeros(())
    for (ids, _), target in zip(documents, targets, strict=True):
        keep = target >= 0
        logits, theirs = student(ids[None, :-1]).logits[0][keep], frozen(ids[None, :-1]).logits[0][keep].detach()
        nll = nll + F.cross_entropy(logits, target[keep], reduction="sum")
        soft, ours = (theirs / 2).softmax(-1), (logits / 2).log_softmax(-1)
        kl = kl + F.kl_div(ours, soft, reduction="sum")
    want = alpha * nll + (1 - alpha) * 4 * kl
    want.backward()
    torch.testing.assert_close(got.total, want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(got.metrics["kl"], kl.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.metrics["nll"], nll.detach(), atol=1e-4, rtol=1e-5)
    for name, p in student.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_alpha_weighs_the_balance_too_where_asked(distill, teacher, tokenizer):
    student = make_model(32, preset="minimind2-moe").train()
    ids = torch.randint(3, 6400, (9,))
    batch = Batch(ids[:-1], ids[1:], torch.tensor([0, 8], dtype=torch.int32), 8, 8, 1)
    given = [dict(alpha=0.25), dict(alpha=0.25, alpha_weighs_aux=True), dict(alpha=0.25, recipe="minimind3")]
    aux = [
        distill.make_loss(settled(distill, teacher, **more), student, tokenizer)(Engine(student), batch).aux
        for more in given
    ]
    assert aux[0] > 0 and torch.equal(aux[1], 0.25 * aux[0]) and torch.equal(aux[2], aux[1])


def test_the_teacher_is_frozen_in_the_students_precision_and_no_part_of_it(distill, teacher, tokenizer):
    student = make_model(32)
    before = [name for name, _ in student.named_modules()]
    for dtype in ("auto", "bfloat16"):
        got = distill.load_teacher(settled(distill, teacher, dtype=dtype), student, tokenizer)
        assert not got.training and not any(p.requires_grad for p in got.parameters())
        assert {p.dtype for p in got.parameters()} == {precision.of(dtype)}
    assert [name for name, _ in student.named_modules()] == before


def test_a_teacher_that_speaks_another_language_is_refused(distill, teacher, tokenizer, tmp_path):
    student = make_model(32)
    mm.save_pretrained(make_model(32, vocab_size=6399), tmp_path / "small")
    with pytest.raises(ValueError, match="has 6399 ids and the student 6400"):
        distill.load_teacher(settled(distill, tmp_path / "small"), student, tokenizer)
    mm.save_pretrained(make_model(32), tmp_path / "foreign")
    for file in ("tokenizer.json", "tokenizer_config.json"):  # as from another program, without a fingerprint
        text = (samples.path("tokenizer") / file).read_text(encoding="utf-8")
        (tmp_path / "foreign" / file).write_text(text, encoding="utf-8")
    distill.load_teacher(settled(distill, tmp_path / "foreign"), student, tokenizer)
    raw = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="its ids would mean other words"):
        distill.load_teacher(settled(distill, tmp_path / "foreign"), student, tokenizer)
    mm.save_pretrained(make_model(32), tmp_path / "teacher.pth", format="pth")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        distill.load_teacher(settled(distill, tmp_path / "teacher.pth"), student, tokenizer)


def test_the_command_makes_a_new_student_that_nears_its_teacher(teacher, tmp_path):
    """The student has the teacher's tokenizer, and its checkpoint holds the student alone."""
    args = ["--save_dir", teacher.parent, "--cache_dir", tmp_path / "cache", "--max_steps", 4, "--batch_size", 2]
    args += ["--from_weight", "none", "--preset", "tiny", "--hidden_size", 32, "--num_hidden_layers", 2, "--alpha", 0]
    args += [
        "--num_threads",
        1,
        "--log_interval",
        1,
        "--sample_tokens",
        2,
        "--learning_rate",
        3e-3,
        "--warmup_steps",
        0,
    ]
    out = run("distill.py", args)
    assert "tiny: 0.2M parameters" in out and "The model answers" in out
    log = read_log(teacher.parent / "distill")
    assert log[4]["kl"] < log[1]["kl"] * 0.9 and log[4]["loss"] < log[1]["loss"]
    assert log[1]["loss"] == pytest.approx(1.5**2 * log[1]["kl"], rel=1e-4)
    student = mm.load_pretrained(teacher.parent / "distill")
    saved = checkpoints(teacher.parent / "distill" / "checkpoints")[-1]
    state = torch.load(saved / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert {name: t.shape for name, t in state.items()} == {n: t.shape for n, t in student.state_dict().items()}


def test_without_a_teacher_the_command_to_run_first_is_named(tokenizer, tmp_path):
    mm.save_pretrained(make_model(32), tmp_path / "pretrain" / "weights", tokenizer=tokenizer)
    out = run("distill.py", ["--save_dir", tmp_path, "--num_threads", 1], expect=1)
    assert "--teacher_path dpo" in out and "run `deepspeed train/dpo.py` first" in out and "Traceback" not in out
