"""GRPO: rollouts as batches, and the real command: ranks and ZeRO stages agree, a resume is bitwise."""

import json
import runpy
import shutil

import pytest
import torch
from launching import ROOT, finish, read_log, start
from stand_ins import Engine, Operators

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.minimind.variety import SYSTEM_PROMPTS, Variety
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError
from minimind_fast.infer.decode import Workspace
from minimind_fast.infer.generate import complete
from minimind_fast.infer.sampling import Sampling
from minimind_fast.rl.rewards import Rewards
from minimind_fast.rl.rollout import Rollouts, pack, read_prompts
from minimind_fast.training.cli import parse
from minimind_fast.training.losses import group_advantages
from minimind_fast.training.resume import checkpoints

SHAPE = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=6400)
QUESTIONS = ["hi", "What is 2 + 3?", "bye", "Who are you?", "why"]
LETTERS = (
    "def letters(prompts, answers, rows):\n    return [sum(c.isascii() for c in a) / max(len(a), 1) for a in answers]\n"
)


def ask(question, **fields):
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": ""}], **fields}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(samples.path("tokenizer"))


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """A folder with an untrained model, prompts and a reward."""
    folder = tmp_path_factory.mktemp("grpo")
    torch.manual_seed(0)
    mm.save_pretrained(mm.MiniMind(mm.ModelConfig.preset("minimind3", **SHAPE)), folder / "base", tokenizer=tokenizer)
    write(folder / "prompts.jsonl", [ask(q) for q in QUESTIONS])
    (folder / "mine.py").write_text(LETTERS)
    return folder


def rollouts(model, work, tokenizer, **changes):
    options = dict(batch_size=2, generations=3, max_new_tokens=9, seed=1, sampling=Sampling(0.8), thinking_ratio=0.5)
    prompts = read_prompts([work / "prompts.jsonl"], tokenizer, 64)
    made = Rollouts(prompts, tokenizer, Rewards([f"{work / 'mine.py'}:letters"]), **(options | changes))
    return made.written_by(Engine(model))


@pytest.fixture
def model(work):
    return mm.load_pretrained(work / "base").train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["minimind3", "minimind2-moe"])
def test_the_ratio_of_the_first_update_is_exactly_one(work, tokenizer, preset, dtype):
    """The old log-probabilities come from a separate pass before the update; the rollout ran without autograd."""
    torch.manual_seed(0)
    model = mm.MiniMind(mm.ModelConfig.preset(preset, **SHAPE)).to(dtype).train()
    data = rollouts(model, work, tokenizer, updates=2)
    first = next(iter(data))
    assert model.training and first.num_docs == 6 and first.old_logprobs is not None
    new = data.run(model, first)[0]
    assert new.requires_grad and torch.equal(new, first.old_logprobs)
    assert (new[first.targets != mm.IGNORE_INDEX] < 0).all()


def test_packed_answers_have_the_log_probabilities_that_they_were_drawn_with(model, work, tokenizer):
    contexts = [tokenizer.encode(q) for q in ("What is it?", "hi")]
    done = complete(model, contexts, Sampling(0.8), max_new_tokens=7, seed=3, logprobs=True)
    batch = pack(contexts, [c.ids for c in done], [0.5, -0.5], {})
    assert batch.input_ids.tolist() == [*contexts[0], *done[0].ids[:-1], *contexts[1], *done[1].ids[:-1]]
    counted = batch.targets != mm.IGNORE_INDEX
    assert batch.targets[counted].tolist() == done[0].ids + done[1].ids
    got = rollouts(model, work, tokenizer).run(model, batch)[0]
    torch.testing.assert_close(got[counted], torch.tensor(done[0].logprobs + done[1].logprobs), atol=1e-4, rtol=0)
    assert batch.advantages[counted].tolist() == [0.5] * 7 + [-0.5] * 7 and not batch.advantages[~counted].any()
    assert batch.weights.sum() == pytest.approx(2) and not batch.weights[~counted].any()


def test_rollouts_draw_from_what_the_filters_leave_and_log_probabilities_have_their_own_temperature(
    model, work, tokenizer
):
    model.model.embed_tokens.weight.data.mul_(4)  # a new model is nearly uniform
    data = rollouts(model, work, tokenizer, sampling=Sampling(0.8, top_p=0.85, top_k=3), logprob_temperature=1.0)
    batch = next(iter(data))
    got = data.run(model, batch)[0]
    for begin, end in zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False):
        logits = model(batch.input_ids[None, begin:end]).logits[0]
        targets = batch.targets[begin:end]
        counted = targets >= 0
        chosen = targets[counted, None]
        assert (logits[counted].topk(3).indices == chosen).any(-1).all()
        want = logits[counted].log_softmax(-1).gather(-1, chosen).squeeze(-1)
        torch.testing.assert_close(got[begin:end][counted], want, atol=1e-4, rtol=0)


def test_prompts_are_given_system_prompts_and_the_log_says_how_many(work, tokenizer):
    said = []
    prompts = read_prompts([work / "prompts.jsonl"], tokenizer, 64, log=said.append, variety=Variety(system_ratio=1.0))
    assert all(any(f"system\n{p}<|im_end|>" in text for p in SYSTEM_PROMPTS) for x in prompts for text in x.texts)
    assert any("5 of 5 prompts were given a system prompt (by seed 42)" in line for line in said)


def test_advantages_are_those_of_the_rewards_within_each_prompt(model, work, tokenizer):
    data = rollouts(model, work, tokenizer)
    batch = next(iter(data))
    answers, ends = [], batch.cu_seqlens.tolist()
    for begin, end in zip(ends, ends[1:], strict=False):
        ids = batch.targets[begin:end]
        answers.append(tokenizer.decode(ids[ids >= 0].tolist()).removesuffix("<|im_end|>"))
    rewards = data.rewards([""] * 6, answers, [{}] * 6)[0]
    want = group_advantages(torch.tensor(rewards, dtype=torch.float64).view(2, 3)).flatten().float()
    got = torch.stack([part[-1] for part in batch.advantages.split(batch.cu_seqlens.diff().tolist())])
    torch.testing.assert_close(got, want)
    assert (
        batch.stats["reward"] == pytest.approx(sum(rewards)) and batch.stats["completion_length"] == batch.num_targets
    )


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("input_ids", "targets", "advantages", "weights"))


def test_an_epoch_meets_every_prompt_and_ends_with_a_whole_step(model, work, tokenizer):
    data = rollouts(model, work, tokenizer, accumulation_steps=2, updates=2)  # 5 prompts, 4 in a rollout
    assert data.num_batches(0) == data.num_left() == 8
    batches = list(data)
    assert len(batches) == 8 and data.num_left() == 8 and data.state_dict()["epoch"] == 1
    assert all(batches[i] is batches[i + 2] for i in (0, 1, 4, 5))  # the second update reuses the first one's
    text = "".join(tokenizer.decode(b.input_ids.tolist()) for b in batches)
    assert all(f"user\n{q}<|im_end|>" in text for q in QUESTIONS)
    assert len({tuple(b.targets.tolist()) for b in batches}) == 4


def test_all_rollouts_of_a_run_share_one_workspace(model, work, tokenizer, monkeypatch):
    """On a GPU it holds the cache and the graphs, so that only the first rollout captures."""
    shared = []

    def noted(*args, **how):
        shared.append(how["workspace"])
        return complete(*args, **how)

    monkeypatch.setattr("minimind_fast.rl.rollout.complete", noted)
    assert len(list(rollouts(model, work, tokenizer))) == len(shared) == 3
    assert isinstance(shared[0], Workspace) and shared[0] is shared[1] is shared[2] and shared[0].model is model


def test_two_ranks_write_what_one_would(model, work, tokenizer):
    whole = [b for b in rollouts(model, work, tokenizer, batch_size=4)]
    halves = [list(rollouts(model, work, tokenizer, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 2
    for batch, parts in zip(whole, zip(*halves, strict=True), strict=True):
        pieces = sorted(tuple(p.tolist()) for p in batch.input_ids.split(batch.cu_seqlens.diff().tolist()))
        mine = [tuple(p.tolist()) for b in parts for p in b.input_ids.split(b.cu_seqlens.diff().tolist())]
        assert sorted(mine) == pieces


def test_a_position_goes_on_where_it_was_also_between_two_updates(model, work, tokenizer):
    through = list(rollouts(model, work, tokenizer, updates=3))
    data = rollouts(model, work, tokenizer, updates=3)
    batches = iter(data)
    next(batches)
    next(batches)
    state = data.state_dict()
    model.model.embed_tokens.weight.data.mul_(2)  # the policy has changed: its earlier answers must not be lost
    later = rollouts(model, work, tokenizer, updates=3)
    later.load_state_dict(state)
    assert later.num_left() == len(through) - 2
    again = next(iter(later))
    assert same(again, through[2]) and torch.equal(again.old_logprobs, through[2].old_logprobs)
    with pytest.raises(ValueError, match="generations was 3 and is 4 now"):
        rollouts(model, work, tokenizer, updates=3, generations=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, 'line 2: has no field "conversations"'),
        ({"conversations": [{"role": "assistant", "content": ""}]}, "line 2: nobody asks anything"),
        ({"conversations": [{"role": "system", "content": "x"}]}, "line 2: nobody asks anything"),
        ({"conversations": [{"role": "user", "content": "\ud83d"}]}, "line 2: .*surrogate"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "p.jsonl", [ask("hi"), row])
    with pytest.raises(DataError, match=message):
        read_prompts([path], tokenizer, 64)
    said = []
    assert len(read_prompts([path], tokenizer, 64, "skip", said.append)) == 1 and "left out 1 unusable" in said[-1]


def test_a_prompt_without_an_answer_is_named_by_its_line(tmp_path, tokenizer):
    """An empty answer would reward silence."""
    path = write(tmp_path / "p.jsonl", [{**ask("hi"), "answer": "1"}, {**ask("hi"), "answer": " "}])
    check = Rewards(["correct"]).check_row
    with pytest.raises(DataError, match="line 2: .*the row says no answer"):
        read_prompts([path], tokenizer, 64, check=check)
    assert len(read_prompts([path], tokenizer, 64, "skip", lambda _: None, check=check)) == 1


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [ask("hi"), ask("hi " * 99)])
    said = []
    assert len(read_prompts([path], tokenizer, 64, log=said.append)) == 1 and "1 of 2 prompts are left out" in said[-1]
    with pytest.raises(DataError, match="no prompt of at most --max_seq_len 4"):
        read_prompts([path], tokenizer, 4)


@pytest.mark.parametrize(
    "wrong", ["--num_generations 1", "--temperature 0", "--dropout 0.1", "--updates_per_rollout 0"]
)
def test_options_that_cannot_work_are_refused(wrong, capsys):
    config = runpy.run_path(str(ROOT / "train" / "grpo.py"))["GRPOConfig"]
    with pytest.raises(SystemExit):
        parse(config, wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["grpo", "cispo"])
def test_the_stage_objective_is_that_of_each_answer_alone_with_whole_logits(model, work, tokenizer, kind):
    """Policy, old policy and reference all differ, and some ratios are clipped; the oracle does not pack."""
    script = runpy.run_path(str(ROOT / "train" / "grpo.py"))
    wanted = ["--grpo_loss", kind, "--beta", "0.3", "--epsilon", "0.01", "--epsilon_high", "1.01"]
    config = parse(script["GRPOConfig"], wanted)
    data = rollouts(model, work, tokenizer, updates=2, reference=mm.load_pretrained(work / "base"))
    data.reference.model.embed_tokens.weight.data.mul_(1.3)
    batch = next(iter(data))
    model.model.embed_tokens.weight.data.mul_(1.05)
    with Operators() as ran:
        got = script["policy_loss"](config, data, data.engine, batch)
    assert "mul" in ran.seen and not ran.seen & {"lift_fresh", "_local_scalar_dense"}  # on a GPU both would wait
    got.total.backward()
    grad = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()

    def parts(tensor):
        return tensor.split(batch.cu_seqlens.diff().tolist())

    want = torch.zeros(())
    clipped = 0.0
    rows = (batch.input_ids, batch.targets, batch.advantages, batch.old_logprobs)
    for ids, targets, advantages, old in zip(*map(parts, rows), strict=True):
        said = targets >= 0
        new, fixed = ((m(ids[None]).logits[0] / 0.8).log_softmax(-1)[said] for m in (model, data.reference))
        new, fixed = (x.gather(-1, targets[said][:, None])[:, 0] for x in (new, fixed.detach()))
        ratio, spread = (new - old[said]).exp(), advantages[said]
        if kind == "grpo":
            policy = torch.min(ratio * spread, ratio.clamp(0.99, 1.01) * spread)
            clipped += ((ratio.clamp(0.99, 1.01) * spread) < ratio * spread).float().mean().item()
        else:
            policy = ratio.clamp(max=1.01).detach() * spread * new
            clipped += (ratio > 1.01).float().mean().item()
        kl = (fixed - new).exp() - (fixed - new) - 1
        want = want - (policy - 0.3 * kl).mean()
    want.backward()
    torch.testing.assert_close(got.total, want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grad, model.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-4)
    assert 0 < got.metrics["clip_fraction"] < 6 and got.metrics["clip_fraction"].item() == pytest.approx(
        clipped, abs=1e-4
    )
    assert got.aux is None


def test_rows_without_an_answer_are_refused_at_the_start(work, tokenizer):
    prompts = read_prompts([work / "prompts.jsonl"], tokenizer, 64)
    with pytest.raises(ValueError, match="the row says no answer"):
        Rollouts(prompts, tokenizer, Rewards(["correct"]), batch_size=1, generations=2, max_new_tokens=1, seed=0)


def test_a_model_learns_what_is_rewarded(work, tokenizer):
    """Eighteen steps towards ASCII, at first about half of the output; with the objective's sign flipped, none remains."""
    model = mm.load_pretrained(work / "base").train()
    model.model.embed_tokens.weight.data.mul_(8)  # a new model draws uniformly from 6400 tokens, few of them twice
    script = runpy.run_path(str(ROOT / "train" / "grpo.py"))
    config = parse(script["GRPOConfig"], ["--beta", "0"])
    data = rollouts(model, work, tokenizer, generations=16, sampling=Sampling(1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rewards = []
    for _ in range(6):
        for batch in data:
            script["policy_loss"](config, data, data.engine, batch).total.div(batch.num_docs).backward()
            optimizer.step()
            optimizer.zero_grad()
            rewards.append(batch.stats["reward"] / batch.num_docs)
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert len(rewards) == 18 and last > first + 0.4, rewards


# ------------------------------------------------------------------------------------------------------ the real command

# Several runs in turn in the same processes, which saves most of the launch time.
DRIVER = f"""
import json, runpy, sys
from minimind_fast.training import ranks
main = runpy.run_path({str(ROOT / "train" / "grpo.py")!r})["main"]
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["grpo.py", *arguments]
    main()
ranks.leave()
"""
SAME = ("loss", "reward", "reward_letters", "reward_std", "kl", "clip_fraction", "completion_length", "finished")


def launch(work, runs, ranks=1):
    driver = work / "driver.py"
    driver.write_text(DRIVER)
    always = ["--from_weight", work / "base", "--data_path", work / "prompts.jsonl", "--save_dir", work / "out"]
    always += ["--num_threads", 1, "--log_interval", 1, "--sample_tokens", 0, "--dtype", "float32", "--max_gen_len", 8]
    always += ["--num_generations", 4, "--updates_per_rollout", 2, "--learning_rate", 3e-3, "--lr_schedule", "constant"]
    always += ["--reward", f"{work / 'mine.py'}:letters", "--epochs", 99, "--thinking_ratio", 0.5]
    runs = [[str(x) for x in [*always, *run]] for run in runs]
    return finish(start(str(driver), [json.dumps(runs)], ranks))


def numbers(folder):
    return {step: [row[name] for name in SAME] for step, row in read_log(folder).items() if "loss" in row}


@pytest.fixture(scope="module")
def one_rank(work):
    """Ten steps with a checkpoint after each, and a resume from the seventh, in the middle of a rollout."""
    run = ["--batch_size", 4, "--save_interval", 1, "--keep_checkpoints", 99, "--max_steps", 10, "--save_weight", "one"]
    out = launch(work, [run])
    shutil.copytree(work / "out" / "one", work / "out" / "resumed")
    for saved in checkpoints(work / "out" / "resumed" / "checkpoints")[7:]:
        shutil.rmtree(saved)
    assert "Going on from step 7" in launch(work, [[*run[:-1], "resumed", "--from_resume"]])
    return out


def test_the_command_trains_and_logs_what_it_does(work, one_rank):
    log = read_log(work / "out" / "one")
    assert log[1]["reward"] == pytest.approx(log[1]["reward_letters"]) and 0 < log[1]["reward"] < 1
    assert abs(log[1]["kl"]) < 1e-9 < 1e-4 < log[10]["kl"]
    assert log[1]["clip_fraction"] == 0 and log[2]["clip_fraction"] > 0
    assert log[1]["completion_length"] == 8 and log[1]["rollout_tokens_per_s"] > 0
    assert log[1]["useful_tokens"] == 4 * 4 * 8 and (work / "out" / "one" / "reward.png").is_file()
    assert mm.load_pretrained(work / "out" / "one").num_parameters() > 0


def test_a_resume_in_the_middle_of_a_rollout_is_bitwise(work, one_rank):
    assert numbers(work / "out" / "resumed") == numbers(work / "out" / "one")
    first, second = (mm.load_pretrained(work / "out" / name).state_dict() for name in ("one", "resumed"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_two_ranks_under_every_zero_stage_do_what_one_does(work, one_rank):
    """Two rollouts: trained weights write the second, gathered under stage 3."""
    stages = [0, 1, 2, 3]
    run = ["--batch_size", 2, "--max_steps", 3]
    launch(work, [[*run, "--zero_stage", z, "--save_weight", f"zero{z}"] for z in stages], ranks=2)
    want = {step: row for step, row in numbers(work / "out" / "one").items() if step <= 3}
    for z in stages:
        got = numbers(work / "out" / f"zero{z}")
        assert got.keys() == want.keys()
        for step, row in want.items():
            assert got[step] == pytest.approx(row, abs=1e-5), (z, step)
