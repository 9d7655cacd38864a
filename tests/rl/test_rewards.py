"""Rewards: what each gives for answers in hand, plug-ins, and models as judges."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import minimind_fast as mm
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import UserError
from minimind_fast.rl import rewards
from minimind_fast.rl.judge import open_judge
from minimind_fast.rl.rewards import ModelReward, Rewards

OPENED, PLAIN = "user: 2 + 3?\nassistant\n<think>\n", "user: 2 + 3?\nassistant\n<think>\n\n</think>\n\n"


def row(**fields):
    return {"conversations": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": ""}], **fields}


def one(reward, text, prompt=OPENED, **fields):
    return reward([prompt], [text], [row(**fields)])[0]


@pytest.mark.parametrize(
    ("answer", "expected", "want"),
    [
        ("2 + 3 = 5</think>\n\n<answer>\n5\n</answer>", "5", 1.0),
        ("so 5</think>It is 5.", "5", 1.0),
        ("5</think>6", "5", 0.0),  # the thought does not count
        ("</think>from 2 and 3 comes 5.0", "5", 1.0),  # the last number, as a number
        ("</think>1,234", "1234", 1.0),
        ("</think>-5", "5", 0.0),
        ("</think>15", "5", 0.0),
        ("</think>", "5", 0.0),
        ("</think>  North\nPole ", "north pole", 1.0),
        ("</think>the north pole", "north pole", 0.0),
    ],
)
def test_correct(answer, expected, want):
    assert one(rewards.correct, answer, answer=expected) == want


def test_where_the_expected_answer_stands():
    assert rewards.expected_answer(row(answer=42, gt="1")) == "42"
    assert rewards.expected_answer(row(gt=["7", "8"])) == "7"
    told = {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>9</think>8"}]}
    assert rewards.expected_answer(told) == "8"
    assert rewards.expected_answer(row()) is None
    with pytest.raises(ValueError, match="the row says no answer"):
        one(rewards.correct, "5")


@pytest.mark.parametrize("empty", ["", "  ", [""], [" "], [], [None]])
@pytest.mark.parametrize("key", ["answer", "gt"])
def test_an_empty_answer_is_none_and_no_reward_for_silence(key, empty):
    assert rewards.expected_answer(row(**{key: empty})) is None
    with pytest.raises(UserError, match="the row says no answer"):
        one(rewards.correct, "", **{key: empty})


MINE = """
import json

def value_error(prompts, answers, rows):
    return [float(json.loads(a)["score"]) for a in answers]

def key_error(prompts, answers, rows):
    return [rows[0]["nothing"] for a in answers]

def one(prompts, answers, rows):
    return 1.0

def text(prompts, answers, rows):
    return ["good" for _ in answers]

def fewer(answers, **rest):
    return []
"""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("value_error", r'failed in .*mine\.py, line 5: "return \[float.*JSONDecodeError: Expecting value'),
        ("key_error", r"failed in .*mine\.py, line 8: .*KeyError: 'nothing'"),
        ("one", r"must give a list of numbers, one an answer, not 1\.0"),
        ("text", r"must give numbers, not \['good'\]"),
        ("fewer", r"failed before its first line: TypeError"),
    ],
)
def test_a_reward_of_the_users_that_fails_is_named_with_its_line(name, problem, tmp_path):
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    spec = f"{tmp_path / 'mine.py'}:{name}"
    with pytest.raises(UserError, match=f"--reward .*mine.py:{name} {problem}"):
        rewards.Rewards([spec])(["p"], ["a"], [row()])


@pytest.mark.parametrize(
    ("answer", "prompt", "want"),
    [
        ("easy\n</think>\n\n5", OPENED, 1.0),
        ("easy</think><answer>5</answer>", OPENED, 1.0),
        ("<think>easy</think>5", PLAIN[: PLAIN.index("<think>")], 1.0),
        ("easy, 5", OPENED, 0.0),  # never closed
        ("</think>5", OPENED, 0.0),  # no thought
        ("easy</think>", OPENED, 0.0),  # no answer
        ("easy</think>5</think>", OPENED, 0.0),
        ("ea<think>sy</think>5", OPENED, 0.0),
        ("easy</think><answer>5", OPENED, 0.0),
        ("easy</think><answer></answer>", OPENED, 0.0),
        ("easy</think><answer>5</answer><answer>6</answer>", OPENED, 0.0),
        ("easy<answer>4</answer></think>5", OPENED, 0.0),
    ],
)
def test_format(answer, prompt, want):
    assert one(rewards.format, answer, prompt) == want


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        ("easy\n</think>\n<answer>\n5\n</answer>", 1.0),
        ("easy</think>5", 0.0),  # no tags
        ("easy</think>answer>", 0.0),  # what a model finds out when half a tag is enough
        ("easy</think><answer> </answer>", 0.0),
        ("easy</think><answer>5</answer> or so", 0.0),
        ("<answer>5</answer>", 0.0),  # the thought was never closed
    ],
)
def test_tagged(answer, want):
    assert one(rewards.tagged, answer, OPENED) == want


def test_minimind_rules():
    assert [one(rewards.length, "x" * n) for n in (19, 20, 800, 801)] == [-0.5, 0.5, 0.5, -0.5]
    thought = "x" * 20
    assert one(rewards.thinking, thought) == 0
    assert one(rewards.thinking, f"{thought}</think>5") == 1.25
    assert one(rewards.thinking, f"{thought}</think>5</think>") == 0.75
    assert one(rewards.thinking, "x</think>5") == -0.25
    assert one(rewards.repetition, "a b c d") == 0
    assert one(rewards.repetition, "</think>a b c a b c") == pytest.approx(-1 / 4)
    assert one(rewards.repetition, "a b c a b c</think>a b c d") == 0
    assert one(rewards.repetition, "a " * 50) == -0.5
    assert one(rewards.repetition, "天天天天天天") == -0.5  # no spaces, and yet words


@pytest.mark.parametrize(
    ("text", "ours", "theirs"),
    [
        ("我喜欢你我喜欢你我喜欢你我喜欢你", -0.5, 0.0),  # no punctuation: one word there, characters here
        ("天天 天天 天天 天天", -0.5, -0.5),
        ("a b c a b c</think>x y z</think>a b c a b c", -0.25, -1 / 11),  # after the last thought; after the first
        ("a b c a b c", -0.25, -0.25),
    ],
)
def test_minimind_s_own_repetition_differs_where_its_rule_does(text, ours, theirs):
    assert one(rewards.repetition, text) == pytest.approx(ours)
    assert one(rewards.minimind_repetition, text) == pytest.approx(theirs)


def test_weights_and_plug_ins(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def shorter(prompts, answers, rows):\n    return [-len(a) for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    both = Rewards(["correct*2", "mine.py:shorter*0.5"])
    total, each = both([OPENED] * 2, ["</think>5", "6"], [row(answer="5")] * 2)
    assert total == [2 * 1 - 0.5 * 9, -0.5] and each == {"correct": [1, 0], "shorter": [-9, -1]}
    assert Rewards(["mine:shorter"])([OPENED], ["xy"], [row()])[0] == [-2]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one"),
        (["corect"], "built in are length, thinking"),
        (["correct*x"], "'x' is not a number"),
        (["correct*nan"], "'nan' is not a number"),
        (["correct", "correct*2"], "two rewards are called the same"),
        (["nowhere.py:f"], "nowhere.py cannot be imported"),
        (["no_such_module:f"], "no_such_module cannot be imported"),
        (["json:nothing"], "json has no nothing"),
        (["json:__name__"], "is no function"),
    ],
)
def test_a_reward_that_cannot_be_found_is_named(specs, message):
    with pytest.raises(ValueError, match=message):
        Rewards(specs)


@pytest.mark.parametrize(
    ("gives", "message"),
    [([1.0], "gave 1 values for 2"), ([1.0, float("nan")], "must be finite"), (["good", "bad"], "must give numbers")],
)
def test_a_reward_that_gives_no_numbers_is_named(tmp_path, gives, message):
    file = tmp_path / "mine.py"
    file.write_text(f"nan = float('nan')\ndef f(prompts, answers, rows):\n    return {gives!r}\n")
    with pytest.raises(ValueError, match=f"mine.py:f.*{message}"):
        Rewards([f"{file}:f"])([OPENED] * 2, ["a", "b"], [row()] * 2)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=6400)
    model = mm.MiniMind(mm.ModelConfig.preset("minimind3", **shape)).eval()
    for p in model.parameters():  # opinions far enough apart to tell them from rounding
        p.data *= 4 if p.dim() > 1 else 1
    mm.save_pretrained(model, folder, format="qwen3", tokenizer=Tokenizer.load(samples.path("tokenizer")))
    return folder, model


def test_a_language_model_gives_the_mean_log_probability_of_what_follows_the_thought(judge):
    folder, model = judge
    tokenizer = Tokenizer.load(folder)
    got = ModelReward(folder)([OPENED] * 3, ["hm</think>five", "5 5 5", ""], [row()] * 3)
    prompt = tokenizer.encode(tokenizer.render_chat(row()["conversations"][:1], add_generation_prompt=True))
    for value, text in zip(got[:2], ["five", "5 5 5"], strict=True):
        said = tokenizer.encode(text)
        logprobs = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        want = torch.stack([logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(said)]).mean()
        assert value == pytest.approx(want.item(), abs=1e-4)
    assert got[2] == 0


def test_a_sequence_classifier_gives_transformers_score(judge, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, _ = judge
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["Qwen3ForSequenceClassification"], num_labels=1, id2label={"0": "LABEL_0"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    scorer = transformers.Qwen3ForSequenceClassification.from_pretrained(tmp_path)
    torch.nn.init.normal_(scorer.score.weight, std=0.1)
    scorer.save_pretrained(tmp_path)
    answers = ["five", "it is 5, as everybody knows"]
    got = ModelReward(tmp_path)([OPENED] * 2, [f"hm</think>{a}" for a in answers], [row()] * 2)
    tokenizer = Tokenizer.load(tmp_path)
    for value, answer in zip(got, answers, strict=True):
        chat = [row()["conversations"][0], {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer.encode(tokenizer.render_chat(chat))])
        assert value == pytest.approx(scorer(ids).logits.item(), abs=1e-4) and abs(value) > 1e-3
    with torch.no_grad():
        scorer.score.weight.mul_(1e4)
    scorer.save_pretrained(tmp_path)
    assert all(abs(value) == 3 for value in ModelReward(tmp_path)([OPENED], ["x"], [row()]))


SCORER = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "scorer"

class Scorer(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.v_head = torch.nn.Linear(1, 1, bias=False)
        self.post_init()

    def get_score(self, tokenizer, messages):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        return self.v_head(torch.tensor([float(len(ids))])).item()
"""


def test_a_model_with_code_of_its_own_scores_as_minimind_asks_it(judge, tmp_path):
    """As internlm2-1_8b-reward: AutoModel by auto_map, get_score(tokenizer, messages) with the history in the question."""
    pytest.importorskip("transformers")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((judge[0] / file).read_bytes())
    (tmp_path / "scorer.py").write_text(SCORER)
    auto = {"AutoConfig": "scorer.Config", "AutoModel": "scorer.Scorer"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "scorer", "architectures": ["Scorer"], "auto_map": auto})
    )
    save_file({"v_head.weight": torch.tensor([[0.01]])}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"brings Python code of its own \(scorer.py\): read it, then add --trust_remote"
    ):
        open_judge(tmp_path)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, *row()["conversations"]]
    got = open_judge(tmp_path, trust_remote_code=True)(
        [OPENED] * 2, ["hm</think>five"] * 2, [row(), {"conversations": turns}]
    )
    tokenizer = Tokenizer.load(tmp_path)
    history = "user: hi\nassistant: hello\n以上是对话历史。我的新问题是：\n2 + 3?"
    for value, question in zip(got, ["2 + 3?", history], strict=True):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "five"}]
        assert value == pytest.approx(len(tokenizer.encode(tokenizer.render_chat(chat))) / 100)
    save_file({"v_head.weight": torch.tensor([[9.0]])}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert open_judge(tmp_path, trust_remote_code=True)([OPENED], ["x"], [row()]) == [3.0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "scorer.py").write_text(SCORER.replace("get_score", "other"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Scorer gives no score"):
        open_judge(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize("labels", [1, 2])
def test_any_sequence_classifier_of_transformers_is_a_judge(tmp_path, labels):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "2", "+", "3", "?", "five", "six"])}
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    shape = dict(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**shape, num_labels=labels)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    if labels == 2:
        with pytest.raises(UserError, match="has 2 labels: a reward model has one"):
            open_judge(tmp_path)
        return
    got = open_judge(tmp_path)([OPENED] * 2, ["hm</think>five", "six"], [row()] * 2)
    for value, answer in zip(got, ["five", "six"], strict=True):
        want = model(**tokenizer("2 + 3?", answer, return_tensors="pt")).logits.item()
        assert value == pytest.approx(max(-3, min(3, want)), abs=1e-5)
    assert got[0] != got[1]


def test_without_transformers_the_judge_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internlm2"}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"--reward_model_path: .*pip install transformers"):
        open_judge(tmp_path)
