"""lib/log.py: samples as text, sums by name, means over a step, lines and tables, by hand."""

from types import SimpleNamespace

import pytest
import torch
from helpers import N

from grpo4d import Group
from lib.log import add_sums, answer_sums, compare_table, describe_sample, is_due, padding_sums, show_answer
from lib.log import to_means, weighted_terms
from lib.rows import Row, read_rows
from model import Completion, encode_row, load_model

BLOCK = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"


def completion_of(text, length=1, truncated=False):
    """An answer of so many tokens."""
    none = torch.zeros(0, 1)
    return Completion([0] * length, [False] * length, [True] * length, none, truncated, text)


def test_a_sample_is_described_with_its_masks(tiny):
    rows = read_rows(tiny / "data" / "train_imagery.jsonl")
    model = load_model(tiny / "base", K=4, pooling="grid")
    text = describe_sample(encode_row(model, rows[0]), model.tokenizer)
    assert text.startswith("<|im_start|>system\n") and f"<|video_pad|> x {2 * N}<|vision_end|>" in text
    assert "<|im_start|>assistant[\n<think>At 0s the red box is here <|latent_start|>]" in text
    assert "]{" + "<|latent_pad|>" * 4 + "}[<|latent_end|>, near." in text
    assert text.endswith("<answer>B. Pan Right</answer><|im_end|>]")


def test_sums_grow_by_name():
    """Numbers and tensors; a name that comes later starts at 0; no graph is kept."""
    sums, x = {}, torch.tensor(2.0, requires_grad=True)
    add_sums(sums, {"loss": 3 * x, "n": 1})
    add_sums(sums, {"loss": x, "n": 2, "late": 0.5})
    assert {name: float(value) for name, value in sums.items()} == {"loss": 8.0, "n": 3, "late": 0.5}
    assert not sums["loss"].requires_grad


def test_terms_stand_with_their_weights():
    entry = {"ce": 0.13214, "sim": 0.021, "size": 2.0}
    assert weighted_terms(entry, ["ce", "sim"], {"ce": 1.0, "sim": 0.3}) == "1 x ce 0.1321 + 0.3 x sim 0.0210"
    assert weighted_terms(entry, ["ce", "size"], {"ce": 0.1}, digits=1) == "0.1 x ce 0.1 + size 2.0"


def test_what_is_due_every_so_many_steps():
    """Steps count from 0; after the last it is always due, with 0 only then."""
    assert [step for step in range(8) if is_due(step, 3, 8)] == [2, 5, 7]
    assert [step for step in range(8) if is_due(step, 0, 8)] == [7]
    assert [step for step in range(3) if is_due(step, 1, 3)] == [0, 1, 2]


def test_sums_over_answers_by_hand():
    """Two questions with two answers; the second question's rewards are equal."""
    texts = [f"{BLOCK} so {BLOCK}", "no", BLOCK + "<|latent_start|><|latent_pad|>", ""]
    answers = [completion_of(text, n, truncated=n == 9) for n, text in zip((5, 2, 9, 1), texts)]
    scores = [{"acc": acc, "fmt": fmt} for acc, fmt in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 1.0))]
    groups = [Group(0, None, answers[:2], scores[:2]), Group(1, None, answers[2:], scores[2:])]
    rewards = torch.tensor([[1.2, 1.0], [0.2, 0.2]])
    sums = {name: float(value) for name, value in answer_sums(groups, rewards).items()}
    expected = {"reward": 2.6, "acc": 2, "fmt": 3, "length": 17, "cut": 1, "blocks": 4, "spread": 1}
    assert sums == pytest.approx(expected)


def test_sums_over_places_by_hand():
    """Two batches of 14 and 18 real tokens in 18 places, the first with prompts of 5 in 9."""
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 5:] = False
    prompts = SimpleNamespace(is_real=real[:1], prompts=None)
    whole = SimpleNamespace(is_real=torch.ones(2, 9, dtype=torch.bool), prompts=None)
    batches = [SimpleNamespace(is_real=real, prompts=prompts), whole]
    expected = {"real": 14 + 5 + 18, "places": 18 + 9 + 18}
    assert padding_sums(batches) == padding_sums(iter(batches)) == expected


def test_means_of_a_step_by_hand():
    """Two questions with three answers and two updates: over answers, over tokens, over updates."""
    c = SimpleNamespace(GLOBAL_BATCH=2, G=3, MU=2, REWARD_WEIGHTS={"acc": 1.0, "fmt": 0.2, "short": 2.0})
    sums = {"reward": 3.0, "acc": 2, "fmt": 6, "short": 1.5, "length": 60, "cut": 3, "blocks": 12}
    sums |= {"spread": 1, "ratio": 20.0, "clip": 5, "kl": 1.0, "entropy": 30.0, "n_text": 20, "loss": 0.5}
    entry = to_means({**sums, "real": 75, "places": 100}, c)
    expected = {"groups": 2, "spread": 1, "reward": 0.5, "acc": 2 / 6, "fmt": 1.0, "short": 0.25}
    expected |= {"length": 10, "cut": 0.5, "blocks": 2, "ratio": 1.0, "clip": 0.25, "kl": 0.05}
    expected |= {"entropy": 1.5, "loss": 0.25, "padding": 0.25}
    assert entry == pytest.approx(expected)
    # all answers were cut off: no token is scored
    nothing = {"ratio": 0.0, "clip": 0, "kl": 0.0, "entropy": 0.0, "n_text": 0}
    entry = to_means({**sums, **nothing, "real": 75, "places": 100}, c)
    assert [entry[name] for name in ("ratio", "clip", "kl", "entropy")] == [0, 0, 0, 0]


def test_an_answer_is_shown_with_its_imagery_and_reward():
    row = Row(id="q7", text_input="Where?", key="B")
    text = f"\n<think>It {BLOCK} and <|latent_start|><|latent_pad|> turns.</think>\n<answer>B</answer>"
    scores = [{"acc": 1.0, "fmt": 0.0}]
    lines = show_answer(row, Group(0, None, [completion_of(text, truncated=True)], scores), 1.0).splitlines()
    assert lines[0] == "--- q7 | key B | reward 1.00 (acc 1, fmt 0) | cut off"
    assert lines[1].startswith("<think>It {imagery x 2} and {imagery x 1} turns.</think>")
    assert lines[-1] == "---"
    whole = show_answer(row, Group(0, None, [completion_of(text)], scores), 1.0)
    assert "cut off" not in whole and "{imagery x 2}" in whole


def test_the_table_of_before_and_after_by_hand():
    def summary(**shares):
        scores = {n: {"n": 40, "accuracy": x, "low": x - 0.1, "high": x + 0.1} for n, x in shares.items()}
        return {"scores": scores}

    before = {"compound": summary(turn=0.25, micro=0.3), "single": summary(micro=0.5)}
    after = {"compound": summary(turn=0.5, micro=0.3), "single": summary(micro=0.4)}
    lines = [line.split() for line in compare_table(before, after).splitlines()]
    assert lines[0] == ["n", "before", "%", "after", "%", "points"]
    assert lines[1] == ["turn", "40", "25.0", "(15.0", "-", "35.0)", "50.0", "(40.0", "-", "60.0)", "+25.0"]
    assert lines[2][:3] == ["compound,", "all", "40"] and lines[2][-1] == "+0.0"
    assert lines[3][:3] == ["single,", "all", "40"] and lines[3][-1] == "-10.0"
