"""Every stage on two ranks under ZeRO 0 to 3 against one rank with the same global batch.

Starting a process takes longer than training a tiny model, so one process a rank runs all of them in turn: this file is
both the test and the script that the ranks run.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import finish, load_script, read_log, start

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.ops import cards
from minimind_fast.training import log as progress

# The weights that each starts from; the adapters' base is frozen, and the teacher is not part of the student.
STAGES = {"sft": "tied", "lora": "tied", "dpo": "tied", "distill": "tied", "reason": "untied"}
EXTRA = {"lora": ["--no_merge"], "distill": ["--teacher_path", "untied"]}


def run_all(folder: Path, zero_stages: list[int], accumulation_steps: int) -> None:
    """Train two steps of each stage under each ZeRO stage, as the command does."""
    # Plots and measuring the machine would take longer than the training.
    progress.draw_loss, cards.peak_flops = lambda *_: None, lambda *_: (1.0, "not measured")
    common = ["--max_steps", "2", "--batch_size", "1", "--accumulation_steps", str(accumulation_steps)]
    common += ["--max_seq_len", "64", "--dtype", "float32", "--learning_rate", "1e-3", "--log_interval", "1"]
    common += ["--num_threads", "1", "--sample_tokens", "0", "--save_dir", str(folder), "--lr_schedule", "constant"]
    common += ["--val_interval", "1"]
    for stage, weights in STAGES.items():
        module = load_script(stage)
        data, val_data = (
            str(folder / f"{kind}{'pairs' if stage == 'dpo' else 'chats'}.jsonl") for kind in ("", "val_")
        )
        for zero_stage in zero_stages:
            own = ["--save_weight", f"{stage}-{zero_stage}-{accumulation_steps}", "--zero_stage", str(zero_stage)]
            own += ["--data_path", data, "--val_data_path", val_data, "--from_weight", weights]
            if stage == "dpo" and zero_stage % 2:  # must agree with the single rank's cached reference
                own += ["--reference", "alongside"]
            sys.argv = [f"{stage}.py", *common, *own, *EXTRA.get(stage, [])]
            module.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs on one and on two ranks, started side by side."""
    folder = tmp_path_factory.mktemp("zero")
    tokenizer = Tokenizer.load(samples.path("tokenizer"))
    for name, size in (("tied", 32), ("untied", 48)):
        torch.manual_seed(size)
        shape = dict(hidden_size=size, num_hidden_layers=2, vocab_size=6400, tie_word_embeddings=name == "tied")
        model = mm.MiniMind(mm.ModelConfig.preset("tiny", **shape))
        mm.save_pretrained(model, folder / name / "weights", tokenizer=tokenizer)
    words = [
        "<think>\nsmall\n</think>\n<answer>\nyes\n</answer>",
        "no",
        "the moon and the stars",
        "水",
        "I do not know.",
    ]
    chats, pairs = [], []
    for number in range(12):
        question = {"role": "user", "content": f"What is {number}?" * (1 + number % 3)}
        good, bad = ({"role": "assistant", "content": words[(number * k) % 5]} for k in (1, 2))
        chats.append({"conversations": [question, good]})
        if good != bad:
            pairs.append({"chosen": [question, good], "rejected": [question, bad]})
    for name, rows in (("chats", chats), ("pairs", pairs), ("val_chats", chats[:3]), ("val_pairs", pairs[:3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    script = str(Path(__file__))
    one = start(script, [folder, "0", 4])
    two = start(script, [folder, "0123", 2], ranks=2)
    finish(one)
    finish(two)
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_lose_what_one_rank_loses(runs, stage, zero_stage):
    """The losses of both steps, and the weights' losses on other batches after each."""

    def losses(name):
        log = read_log(runs / name)
        return [log[step][loss] for loss in ("val_loss", "loss") for step in (1, 2)]

    want = losses(f"{stage}-0-4")
    assert want[1] < want[0] - 1e-3  # a step shows in the loss
    assert losses(f"{stage}-{zero_stage}-2") == pytest.approx(want, abs=1e-5)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), [int(digit) for digit in sys.argv[2]], int(sys.argv[3]))
