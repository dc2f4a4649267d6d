"""grpo4d.py: Eqs. 9 and 10, replay, the shared prompt; a step does not depend on devices, batches, kills."""

import json
import math
import os
import runpy
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, forget_last, imaginative, make_world, refused, run_script, two_processes
from safetensors.torch import load_file

import evaluate
import model as model_py
from grpo4d import REWARD_WEIGHTS, Group, advantages, answer_generator, answer_sample, draw_questions
from grpo4d import grpo_loss, log_line, pack, reward, sample_answers, token_sums, total_rewards
from lib import distributed
from lib.checkpoints import newest_checkpoint, save_checkpoint
from lib.fast import TargetLogProbs
from lib.images import load_patches
from lib.log import weighted_terms
from lib.rows import Row, read_rows, rows_of_step
from model import Completion, Sample, VisionCache, encode_row, generate, load_model

G, MAX_NEW, HOT = 4, 30, 2.0  # answers to a question, their limit, the temperature that mixes their states
TIMES = ("seconds", "rollout", "update")
UNLIKE = (*TIMES, "padding")  # of two runs whose steps are the same


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """dift/: a network that often imagines and sometimes ends; other/: one near it; rl.jsonl, held.jsonl."""
    folder = tmp_path_factory.mktemp("grpo4d")
    model = imaginative(tiny)
    save_checkpoint(folder / "dift", 1, model, {})
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.qwen.model.language_model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    save_checkpoint(folder / "other", 1, model, {})
    lines = [json.dumps(raw) + "\n" for raw in raw_rows(tiny)]
    (folder / "rl.jsonl").write_text("".join(lines[:6]))
    (folder / "held.jsonl").write_text("".join(lines[6:]))
    return folder


def raw_rows(tiny):
    """Eight 4DRL rows about the clips: questions of different length, four options, three or four frames."""
    raws = []
    for index, row in enumerate(read_rows(tiny / "data" / "train_imagery.jsonl")):
        frames = 3 + index % 2
        raw = {"Type": f"turn_{index % 2}", "Question": "Where is the box" + ", seen from here" * index + "?"}
        raw |= {"A": "Left", "B": "Right", "C": "Up", "D": "Down", "Correct": "ABCD"[index % 4]}
        raws.append(raw | {"frame_paths": row.image_input[:frames], "times": row.times[:frames]})
    return raws


@pytest.fixture(scope="module")
def rows(world):
    return read_rows(world / "rl.jsonl")


@pytest.fixture(scope="module")
def policy(world):
    return load_model(world / "dift")


@pytest.fixture(scope="module")
def reference(world):
    return load_model(world / "other").requires_grad_(False)


@pytest.fixture(scope="module")
def vision(policy):
    return VisionCache(policy)


def generators_of(question, numbers=range(G)):
    """The random numbers of some answers to a question of the rollout."""
    return [answer_generator(1, 0, question, number) for number in numbers]


@pytest.fixture(scope="module")
def groups(policy, vision, rows):
    """Four questions with G answers to each, sampled together. Tests do not change them."""
    prompts = [encode_row(policy, row, answer=False) for row in rows[:4]]
    generators = sum((generators_of(question) for question in range(4)), [])
    answers = generate(policy, prompts, MAX_NEW, vision, temperature=HOT, generators=generators)
    return [Group(n, prompt, answers[n * G : (n + 1) * G]) for n, prompt in enumerate(prompts)]


def all_answers(groups):
    return [completion for group in groups for completion in group.completions]


def with_answers(group, completions):
    """The question with other answers."""
    return replace(group, completions=completions)


def cut_off(group):
    """The question with all of its answers cut off."""
    return with_answers(group, [replace(completion, truncated=True) for completion in group.completions])


def scored_places(model, completion):
    """T_i from the ids alone: all but the K + 1 places after a start; nothing without the end of turn."""
    ids, places, t = completion.ids, [], 0
    while t < len(ids):
        places.append(t)
        t += model.K + 2 if ids[t] == model.token_id["latent_start"] else 1
    return places if ids[-1] == model.token_id["im_end"] else []


def naive_log_probs(model, prompt, completion, latents=None):
    """Log-probabilities (n, V) at each place of an answer: one row, no cache, no padding, no shared code.

    Inside a block it reads its own hidden state as it is recomputed (Eq. 8), or the given latents.
    """
    qwen, given = model.qwen, iter(() if latents is None else latents)
    x, positions = qwen.get_input_embeddings()(prompt.ids), prompt.positions
    with torch.no_grad():
        pixels, grid = load_patches(prompt.video, model.config)
        features = qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    x = x.masked_scatter(prompt.is_visual[:, None], features)

    def hidden():
        inputs = {"inputs_embeds": x[None], "position_ids": positions[:, None]}
        return qwen.model.language_model(**inputs).last_hidden_state[0]

    for token in completion.ids:
        z = qwen.get_input_embeddings().weight[token]
        if token == model.token_id["latent_pad"]:
            z = model.feedback(hidden()[-1]) if latents is None else next(given)
        x = torch.cat([x, z[None]])
        positions = torch.cat([positions, positions.max().expand(3, 1) + 1], dim=1)
    logits = qwen.lm_head(hidden()[len(prompt.ids) - 1 : -1])
    for name in ("latent_pad", "latent_end", "image_pad", "video_pad"):
        logits[:, model.token_id[name]] = -math.inf
    return (logits / HOT).log_softmax(dim=-1)


@pytest.fixture(scope="module")
def tables(policy, groups):
    """naive_log_probs of all answers to each question, with latents of its own."""
    with torch.no_grad():
        return [
            [naive_log_probs(policy, group.prompt, completion) for completion in group.completions]
            for group in groups
        ]


def at_scored(model, table, completion):
    """A table (n, V) at the tokens of T_i."""
    places = scored_places(model, completion)
    return table[places, [completion.ids[t] for t in places]]


def assert_same(mine, theirs):
    """Two answers: tokens and masks equal, latents to 3e-4 (each is made from the one before)."""
    for name in ("ids", "is_latent", "is_sampled", "truncated", "text"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.allclose(mine.latents, theirs.latents, atol=3e-4)


# ---------------------------------------------------------------- reward, Eq. 9

ROW = Row(id="q7", text_input="Where?", options={"A": "Left", "B": "Right", "C": "Up"}, key="B")
BLOCK = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"
GOOD = f"\n<think>It {BLOCK} turns.</think>\n<answer>B. Right</answer><|im_end|>"


def completion_of(text, ids=(), **changes):
    """An answer of which the test sets what it is about."""
    ids, fed = list(ids), torch.zeros(text.count("<|latent_pad|>"), 1)
    given = {"is_latent": [False] * len(ids), "is_sampled": [True] * len(ids), "latents": fed} | changes
    return Completion(ids=ids, text=text, **{"truncated": False, **given})


@pytest.mark.parametrize(
    "text, acc, fmt, fmt_without_imagery",
    [
        (GOOD, 1, 1, 1),
        (GOOD.replace("B. Right", "A. Left"), 0, 1, 1),  # the format is not the answer
        (GOOD.replace("\n", ""), 1, 1, 1),
        (GOOD.replace(BLOCK, BLOCK + " so " + BLOCK), 1, 1, 1),
        (GOOD.replace(BLOCK, ""), 1, 0, 1),
        (GOOD.replace(BLOCK, "").replace("<answer>", "<answer>" + BLOCK), 0, 0, 1),  # outside <think>
        (BLOCK + GOOD.replace(BLOCK, ""), 1, 0, 0),
        (GOOD.replace("<|latent_end|>", ""), 1, 0, 1),  # half a block
        (GOOD.replace("<|latent_pad|>", ""), 1, 0, 1),
        (GOOD.replace("<|im_end|>", ""), 1, 0, 0),  # cut off after the answer
        (GOOD.replace("<|im_end|>", " Yes.<|im_end|>"), 1, 0, 0),
        ("Well. " + GOOD, 1, 0, 0),
        (GOOD.replace("</answer>", "</answer><answer>C</answer>"), 0, 0, 0),
        (GOOD.replace("</answer>", "</answer></answer>"), 0, 0, 0),
        (GOOD.replace("<think>", ""), 1, 0, 0),
        (GOOD.replace("</think>", "</think></think>"), 1, 0, 0),
        (GOOD.replace("<think>", "<think><think>"), 1, 0, 0),
        (GOOD.replace("</think>\n<answer>", "<answer>").replace("<|im_end|>", "</think><|im_end|>"), 1, 0, 0),
        (GOOD.replace("B. Right", "Because"), 0, 1, 1),
        (GOOD.replace("B. Right", "b"), 0, 1, 1),
        (GOOD.replace("B. Right", ""), 0, 1, 1),
        (GOOD.replace("B. Right", "(B)"), 1, 1, 1),
        ("", 0, 0, 0),
    ],
)
def test_the_reward_by_table(text, acc, fmt, fmt_without_imagery):
    answer = completion_of(text)
    assert reward(ROW, answer, True) == {"acc": acc, "fmt": fmt}
    assert reward(ROW, answer, False) == {"acc": acc, "fmt": fmt_without_imagery}
    assert all(type(value) is float for value in reward(ROW, answer, True).values())


def test_tokens_that_spell_a_block_are_no_imagery():
    spelled = completion_of(GOOD, latents=torch.zeros(0, 1))
    assert reward(ROW, spelled, True) == {"acc": 1, "fmt": 0}


def test_a_word_and_a_letter_outside_the_options_earn_nothing():
    """ "Analyzing" is no A; E is no answer to a question with options A to C, even if it were the key."""
    analysing = completion_of(GOOD.replace("B. Right", "Analyzing"))
    assert reward(replace(ROW, key="A"), analysing, True) == {"acc": 0, "fmt": 1}
    outside = completion_of(GOOD.replace("B. Right", "E"))
    assert reward(replace(ROW, key="E"), outside, True)["acc"] == 0
    assert reward(replace(ROW, options=dict.fromkeys("ABCDE", ""), key="E"), outside, True)["acc"] == 1


def test_the_total_weighs_each_part_by_its_name():
    """R = 1 · acc + 0.2 · fmt; the order of the parts does not matter, a part without a weight is refused."""
    assert REWARD_WEIGHTS == {"acc": 1.0, "fmt": 0.2}
    scores = [[{"acc": 1.0, "fmt": 1.0}, {"fmt": 1.0, "acc": 0.0}], [{"acc": 1.0, "fmt": 0.0}] * 2]
    groups = [Group(n, None, scores=parts) for n, parts in enumerate(scores)]
    total = total_rewards(groups, REWARD_WEIGHTS)
    assert torch.allclose(total, torch.tensor([[1.2, 0.2], [1.0, 1.0]])) and total.dtype == torch.float32
    other = total_rewards(groups, {"fmt": 0.5, "acc": 2.0})
    assert torch.allclose(other, torch.tensor([[2.5, 0.5], [2.0, 2.0]]))
    refused(lambda: total_rewards(groups, {"acc": 1.0}), "acc, fmt", "REWARD_WEIGHTS has acc;")
    refused(lambda: total_rewards(groups, {**REWARD_WEIGHTS, "short": 1.0}), "REWARD_WEIGHTS", "short")


def test_advantages_by_hand():
    """Rewards 0, 0, 1.2, 1.2: mean 0.6, std (of 3 degrees of freedom) 0.6928."""
    got = advantages(torch.tensor([[0.0, 0.0, 1.2, 1.2], [1.0, 0.0, 0.0, 0.0]]))
    std = [statistics.stdev([0, 0, 1.2, 1.2]), statistics.stdev([1, 0, 0, 0])]
    assert got[0].tolist() == pytest.approx([x / (std[0] + 1e-4) for x in (-0.6, -0.6, 0.6, 0.6)])
    assert got[1].tolist() == pytest.approx([x / (std[1] + 1e-4) for x in (0.75, -0.25, -0.25, -0.25)])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.2, 1.2])
def test_equal_rewards_have_an_advantage_of_exactly_zero(value):
    """Their float mean may differ from each of them by a rounding, which 1 / (std + 1e-4) would enlarge."""
    for count in range(2, 12):
        assert advantages(torch.full((3, count), value)).eq(0).all()


# ---------------------------------------------------------------- Eq. 10


def numbers(sums):
    """Sums by name as numbers."""
    return {name: float(value) for name, value in sums.items()}


def random_tokens():
    """logp, old, ref (n,) of answers of 3, 0, 1, 5 and 0 tokens, their advantages, whose a token is."""
    random = torch.Generator().manual_seed(0)
    answer = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3, 3])
    logp, ref = (-2 + 0.5 * torch.randn(2, len(answer), generator=random)).unbind()
    old = logp - torch.tensor([0.5, 1.1, 1.5, 0.6, 0.7, 0.9, 1.1, 1.3, 1.6]).log()  # ratios at ε = 0.2
    return logp.requires_grad_(), old, ref, torch.tensor([0.7, -3.0, 1.1, -0.4, 9.0]), answer


@pytest.mark.parametrize("kl", ["k3", "k1"])
def test_the_loss_equals_a_naive_token_loop(kl):
    """-1/count Σ_i 1/|T_i| Σ_t min(ρA, clip(ρ)A) - β KL_t; answers of no tokens count in `count` alone."""
    logp, old, ref, A, answer = random_tokens()
    count, epsilon, beta, total, kinds = 10, 0.2, 0.3, 0.0, set()
    for i in range(len(A)):
        places = [t for t in range(len(answer)) if answer[t] == i]
        for t in places:
            rho, d = math.exp(logp[t].item() - old[t].item()), ref[t].item() - logp[t].item()
            clipped = min(max(rho, 1 - epsilon), 1 + epsilon)
            gain = min(rho * A[i].item(), clipped * A[i].item())
            total -= (gain - beta * (math.exp(d) - d - 1 if kl == "k3" else -d)) / len(places) / count
            kinds.add((rho < 1 - epsilon, rho > 1 + epsilon, A[i].item() > 0))
    assert len(kinds) == 6  # below, within and above the band, for either sign
    loss, ratio, divergence = grpo_loss(logp, old, ref, A, answer, count, epsilon, beta, kl)
    assert loss.item() == pytest.approx(total, abs=1e-6)
    assert torch.allclose(ratio, (logp - old).exp())
    loss.backward()
    assert logp.grad.isfinite().all() and logp.grad.ne(0).any()


def test_the_clip_by_hand():
    """Ratios 1.5, 1.1, 0.5, 0.9 with A = 1 and A = -2; a clipped token has no gradient, others -ρA/|T|/G."""
    ratios = torch.tensor([1.5, 1.1, 0.5, 0.9, 1.5, 1.1, 0.5, 0.9])
    old = torch.full((8,), -1.0)
    logp = (old + ratios.log()).requires_grad_()
    given = (torch.tensor([1.0, -2.0]), torch.tensor([0] * 4 + [1] * 4), 2, 0.2, 0.0)
    loss, ratio, divergence = grpo_loss(logp, old, logp.detach(), *given)
    gains = [1.2, 1.1, 0.5, 0.9, -3.0, -2.2, -1.6, -1.8]
    assert loss.item() == pytest.approx(-sum(gains) / 4 / 2)
    loss.backward()
    slopes = [0, 1.1, 0.5, 0.9, -3.0, -2.2, 0, -1.8]
    assert logp.grad.tolist() == pytest.approx([-slope / 8 for slope in slopes])
    sums = numbers(token_sums(loss, logp, ratio, divergence, 0.2))
    by_hand = {"loss": loss.item(), "ratio": 8.0, "clip": 4, "kl": 0, "entropy": -logp.sum().item()}
    by_hand["n_text"] = 8  # four of the eight are beyond 0.8 to 1.2
    assert sums == pytest.approx(by_hand, abs=1e-6)


def test_an_answer_with_an_empty_t_counts_in_one_over_g_alone():
    """T_1 and T_4 are empty: their advantages change nothing, the others are still a fifth each."""
    logp, old, ref, A, answer = random_tokens()
    loss = grpo_loss(logp, old, ref, A, answer, 5, 0.2, 0.1)[0].item()
    others = A.index_fill(0, torch.tensor([1, 4]), 77.0)
    assert loss == grpo_loss(logp, old, ref, others, answer, 5, 0.2, 0.1)[0].item()
    full = (logp, old, ref, A[[0, 2, 3]], torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2]), 3, 0.2, 0.1)
    assert loss == pytest.approx(grpo_loss(*full)[0].item() * 3 / 5)


def test_k3_is_never_negative_and_pulls_on_policy():
    logp, _, ref, _, answer = random_tokens()
    A = torch.zeros(5)  # no policy gradient at all
    loss, _, divergence = grpo_loss(logp, logp.detach(), ref, A, answer, 5, 0.2, 0.1)
    assert divergence.min() >= 0 and divergence.max() > 0.1
    loss.backward()
    lengths = torch.tensor([3, 3, 3, 1, 5, 5, 5, 5, 5])
    expected = 0.1 * (1 - (ref - logp.detach()).exp()) / lengths / 5
    assert torch.allclose(logp.grad, expected) and logp.grad.abs().min() > 1e-4
    again = logp.detach().requires_grad_()
    same, _, divergence = grpo_loss(again, again.detach(), again.detach(), A, answer, 5, 0.2, 0.1)
    same.backward()
    assert divergence.eq(0).all() and again.grad.eq(0).all()


def test_on_average_k1_does_not_pull_and_k3_does():
    """The pitfall: over all tokens an on-policy sampler may draw, the gradient of logp - logp_ref is zero."""
    random = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(7, generator=random).requires_grad_(), torch.randn(7, generator=random)
    ref = ref.log_softmax(dim=0)
    for kl in ("k1", "k3"):
        logp = logits.log_softmax(dim=0)
        given = (logp, logp.detach(), ref, torch.zeros(7), torch.arange(7), 7, 0.2, 0.1, kl)
        divergence = grpo_loss(*given)[2]
        if kl == "k1":
            assert torch.allclose(divergence, logp - ref)
        expected = (logp.exp().detach() * divergence).sum()
        pull = torch.autograd.grad(expected, logits)[0].abs().max().item()
        assert pull < 1e-6 if kl == "k1" else pull > 0.05


# ---------------------------------------------------------------- what was sampled is what is scored


def test_the_rollout_holds_what_the_tests_below_rest_on(policy, groups):
    """Prompts of other lengths, blocks at other steps, early stops, cuts within a block, no imagery."""
    answers = all_answers(groups)
    assert len({len(group.prompt.ids) for group in groups}) == 4
    for group in groups:
        assert {completion.truncated for completion in group.completions} == {True, False}
    whole = [completion for completion in answers if not completion.truncated]
    assert len({len(completion.ids) for completion in whole}) >= 5
    for step in (6, 10, 14):
        states = {one.is_latent[step] if step < len(one.ids) else None for one in answers}
        assert states == {True, False, None}  # inside a block, outside, finished
    assert {0, 4, 8} <= {len(completion.latents) for completion in whole}
    assert any(len(completion.latents) % policy.K for completion in answers)


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_replayed_log_probs_are_the_samplers(policy, vision, groups, tables, prefix):
    """To 1e-4, against one row at a time without cache, whose latents are its own hidden states."""
    batch, latents = pack(policy, vision, groups, prefix, True)
    with torch.no_grad():
        logp, imagined, _ = policy(batch, latents, True, HOT)
    pairs = zip(sum(tables, []), all_answers(groups))
    expected = torch.cat([at_scored(policy, table, completion) for table, completion in pairs])
    assert len(expected) > 60 and torch.allclose(logp, expected, atol=1e-4)
    assert torch.allclose(policy.feedback(imagined), latents, atol=3e-4)  # what is replayed was its own


def test_the_sampler_drew_from_these_log_probs(groups, tables):
    """Each sampled token is where the draw of its generator falls in the sum of the naive probabilities."""
    drawn = 0
    for question, group in enumerate(groups):
        for number, completion in enumerate(group.completions):
            generator = answer_generator(1, 0, question, number)
            uniform = torch.rand(MAX_NEW, generator=generator, dtype=torch.float64)
            for t, token in enumerate(completion.ids):
                if completion.is_sampled[t]:
                    total = tables[question][number][t].double().exp().cumsum(dim=0)
                    low = total[token - 1].item() if token else 0.0
                    assert low - 1e-4 <= uniform[t].item() <= total[token].item() + 1e-4
                    drawn += 1
    assert drawn > 150


def test_a_question_that_stands_twice_in_a_step_is_answered_anew(policy, vision, rows):
    """A GLOBAL_BATCH of three times the rows: a question's first group is as ever, the others differ."""
    c = SimpleNamespace(GLOBAL_BATCH=6, SEED=1, G=2, ROLLOUT_BATCH=6, MAX_NEW=12, TEMPERATURE=HOT)
    drawn = draw_questions(policy, rows[:2], 0, c, 0, 1)
    sample_answers(policy, vision, drawn, 0, c)
    for index in range(2):
        of_question = [group for group in drawn if group.index == index]
        assert sorted(group.repeat for group in of_question) == [0, 1, 2]
        answers = {tuple(answer.ids) for group in of_question for answer in group.completions}
        assert len(answers) == 6
        first = next(group for group in of_question if group.repeat == 0)
        alone = generate(policy, [first.prompt], 12, vision, HOT, generators=generators_of(index, range(2)))
        assert [answer.ids for answer in alone] == [answer.ids for answer in first.completions]


def test_an_answer_does_not_depend_on_its_batch(policy, vision, groups):
    """One prefill for all questions, for its own, for itself alone: the same answer to the same numbers."""

    def answers_to(questions, generators):
        prompts = [groups[question].prompt for question in questions]
        return generate(policy, prompts, MAX_NEW, vision, temperature=HOT, generators=generators)

    for question in (0, 3):
        expected = groups[question].completions
        for mine, theirs in zip(answers_to([question], generators_of(question)), expected):
            assert_same(mine, theirs)
        for number in range(G):
            alone = answers_to([question], generators_of(question, [number]))
            assert_same(alone[0], expected[number])
    backwards = [generators_of(question, reversed(range(G))) for question in (3, 1)]
    answers = answers_to([3, 1], sum(backwards, []))
    expected = groups[3].completions[::-1] + groups[1].completions[::-1]
    assert len(answers) == len(expected)
    for mine, theirs in zip(answers, expected):
        assert_same(mine, theirs)


def test_random_numbers_are_a_function_of_seed_step_question_and_answer():
    def draws(*key):
        return tuple(torch.rand(3, generator=answer_generator(*key)).tolist())

    keys = [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (0, 1, 11, 1),
        (0, 11, 1, 1),
    ]
    assert len({draws(*key) for key in keys}) == len(keys)
    assert [draws(*key) for key in keys] == [draws(*key) for key in keys]


def test_an_answer_as_a_sample_by_hand():
    """The docstring's example; a cut-off answer has an empty T_i; positions go on after the largest one."""
    is_latent = [False] * 3 + [True] * 2 + [False] * 3
    is_sampled = [True] * 3 + [False] * 3 + [True] * 2
    ids = [5, 6, 90, 91, 91, 92, 7, 99]
    answer = completion_of("", ids, is_latent=is_latent, is_sampled=is_sampled)
    four = torch.zeros(4, dtype=torch.bool)
    positions = torch.tensor([[0, 4, 4, 9], [0, 4, 5, 6], [0, 4, 11, 6]])
    prompt = Sample(torch.arange(4), positions, four, four, four, ~four, source="rl.jsonl:3")
    sample = answer_sample(prompt, answer)
    assert sample.ids.tolist() == ids
    assert sample.is_latent.int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert sample.is_text.int().tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert sample.positions.tolist() == [list(range(12, 20))] * 3
    assert sample.is_real.all() and not sample.is_visual.any() and sample.source == "rl.jsonl:3"
    assert sample.video == sample.overlays == ()
    assert not answer_sample(prompt, replace(answer, truncated=True)).is_text.any()


def test_a_packed_batch_holds_the_answers_in_order(policy, vision, groups):
    """Rows: answers of the first question, then of the second; latents in that order; T_i as the ids say."""
    answers = all_answers(groups)
    for prefix in ("shared", "rows"):
        batch, latents = pack(policy, vision, groups, prefix, True)
        assert batch.is_text.shape == batch.ids.shape and len(batch.ids) == 4 * G
        assert torch.equal(latents, torch.cat([completion.latents for completion in answers]))
        for row, completion in enumerate(answers):
            first = 0 if prefix == "shared" else len(groups[row // G].prompt.ids)
            places = [first + t for t in scored_places(policy, completion)]
            assert batch.is_text[row].nonzero()[:, 0].tolist() == places
            assert batch.ids[row, first : first + len(completion.ids)].tolist() == completion.ids
            assert batch.is_latent[row].sum() == len(completion.latents)
        assert (batch.prompts is not None) is (prefix == "shared")
        assert (batch.video_features is None) is (prefix == "shared")  # of the prompts, there and here


def test_without_replay_the_log_probs_are_others(policy, vision, groups):
    """The pitfall: pad embeddings at latent positions change all that follows an image, nothing before it."""
    log_probs = []
    for replay in (True, False):
        batch, latents = pack(policy, vision, groups, "shared", replay)
        with torch.no_grad():
            log_probs.append(policy(batch, latents, True, HOT)[0])
    pad = policy.qwen.get_input_embeddings().weight[policy.token_id["latent_pad"]]
    assert latents.eq(pad).all() and not latents.requires_grad
    changes, moved = iter((log_probs[1] - log_probs[0]).abs().tolist()), []
    for completion in all_answers(groups):
        for t in scored_places(policy, completion):
            change = next(changes)
            if any(completion.is_latent[:t]):
                moved.append(change)
            else:
                assert change < 1e-5
    assert len(moved) > 20 and statistics.median(moved) > 0.01 and max(moved) > 0.1


# ---------------------------------------------------------------- the gradient


def update(policy, reference, vision, groups, prefix="shared", advantage=None, beta=0.5):
    """One pass of Eq. 10 as the script makes it -> loss, gradients by name."""
    batch, latents = pack(policy, vision, groups, prefix, True)
    with torch.no_grad():
        ref = reference(batch, latents, True, HOT)[0]
    logp = policy(batch, latents, True, HOT)[0]
    count = len(all_answers(groups))
    advantage = torch.linspace(-1.5, 2, count) if advantage is None else advantage
    given = (advantage, batch.is_text.nonzero()[:, 0], count, 0.2, beta)
    loss = grpo_loss(logp, logp.detach(), ref, *given)[0]
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def largest(gradients):
    return max(gradient.abs().max() for gradient in gradients.values())


@pytest.mark.parametrize("questions", [[0, 1, 2, 3], [2, 0], [1]], ids=str)
def test_a_shared_prompt_gives_the_loss_and_gradients_of_rows(policy, reference, vision, groups, questions):
    """To 1e-5, with prompts of other lengths (or one), and cut-off answers among them."""
    some = [groups[question] for question in questions]
    assert {completion.truncated for completion in all_answers(some)} == {True, False}
    loss, mine = update(policy, reference, vision, some, "shared")
    other, theirs = update(policy, reference, vision, some, "rows")
    assert loss == pytest.approx(other, abs=1e-5) and abs(loss) > 0.01
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for name, gradient in mine.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5), name
    assert largest(mine) > 0.01


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_only_logits_of_scored_tokens_have_a_gradient(policy, reference, vision, groups, prefix, monkeypatch):
    """The state before token t has one if t is in T_i, exactly none otherwise; forbidden ids none."""
    groups = [*groups[:3], cut_off(groups[3])]
    states, logits = [], []

    def keep_states(module, inputs, kwargs, output):
        output.last_hidden_state.retain_grad()
        states.append((kwargs["inputs_embeds"].shape[:2], kwargs["read"], output.last_hidden_state))

    real = TargetLogProbs.backward

    def keep_gradient(ctx, g):
        memory = ctx.saved_tensors[2]  # in which the logits' gradient is made
        result = real(ctx, g)
        logits.append(memory)
        return result

    monkeypatch.setattr(TargetLogProbs, "backward", staticmethod(keep_gradient))
    hook = policy.qwen.model.language_model.register_forward_hook(keep_states, with_kwargs=True)
    update(policy, reference, vision, groups, prefix)
    hook.remove()
    places = [[] if one.truncated else scored_places(policy, one) for one in all_answers(groups)]
    expected = [torch.zeros(shape, dtype=torch.bool) for shape, _, _ in states]
    for row, scored in enumerate(places):
        for t in scored:
            if prefix == "rows":
                expected[0][row, len(groups[row // G].prompt.ids) + t - 1] = True
            elif t:
                expected[1][row, t - 1] = True
            else:  # the prompt's last state predicts the first token of all its answers
                expected[0][row // G, -1] = True
    assert len(states) == (2 if prefix == "shared" else 1)
    for (_, read, state), mask in zip(states, expected):
        moved, everywhere = state.grad.ne(0).any(dim=-1).flatten(), torch.arange(mask.numel())
        read = everywhere if read is None else read  # where the last layer made a state at all
        assert torch.equal(everywhere[mask.flatten()], read[moved])
    assert sum(map(len, logits)) == sum(map(len, places)) > 50
    for one in logits:
        assert one.ne(0).any(dim=-1).all() and one[:, policy.forbidden_ids].eq(0).all()


def test_equal_rewards_leave_the_kl_term_alone(policy, reference, vision, groups):
    """A group without spread: no gradient at β = 0; with β that of the KL term, the same for any reward."""
    zero = advantages(torch.full((4, G), 0.2)).flatten()
    _, nothing = update(policy, reference, vision, groups, advantage=zero, beta=0.0)
    assert all(gradient.eq(0).all() for gradient in nothing.values()) and len(nothing) > 20
    loss, pull = update(policy, reference, vision, groups, advantage=zero, beta=0.5)
    assert loss > 0.01 and largest(pull) > 0.01
    _, none = update(policy, policy, vision, groups, advantage=zero, beta=0.5)  # its own reference
    assert largest(none) < 1e-6


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_a_batch_of_cut_off_answers_has_a_zero_gradient(policy, reference, vision, groups, prefix):
    """Zeros and not None, which two processes would wait for; no nan of a division by |T_i| = 0."""
    loss, gradients = update(policy, reference, vision, [cut_off(group) for group in groups], prefix)
    assert loss == 0 and len(gradients) > 20
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_a_cut_off_answer_gives_no_gradient(policy, reference, vision, groups):
    """Neither what it says nor its advantage matters."""
    answers, advantage = list(groups[0].completions), torch.linspace(-1, 1, G)
    number = next(n for n in range(G) if answers[n].truncated)
    loss, gradients = update(policy, reference, vision, groups[:1], advantage=advantage)
    start, changed = policy.token_id["latent_start"], []
    for token, is_sampled in zip(answers[number].ids, answers[number].is_sampled):
        changed.append(9 if is_sampled and token != start else token)
    assert changed != answers[number].ids and largest(gradients) > 0.01
    answers[number] = replace(answers[number], ids=changed)
    advantage[number] = 50.0
    other_groups = [with_answers(groups[0], answers)]
    other, same = update(policy, reference, vision, other_groups, advantage=advantage)
    assert loss == other
    assert all(torch.allclose(gradient, same[name], atol=1e-7) for name, gradient in gradients.items())


def test_answers_without_imagery_can_be_scored(policy, reference, vision, groups):
    plain = [one for one in all_answers(groups) if not one.truncated and not len(one.latents)]
    some = [with_answers(groups[0], [plain[0]] * G)]
    losses = [update(policy, reference, vision, some, prefix)[0] for prefix in ("shared", "rows")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != 0


# ---------------------------------------------------------------- the log


def test_sums_over_tokens_by_hand():
    """Ratios 1, 1.25, 0.7, 0.85 and ε = 0.2: two of four are beyond the band."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    ratio, divergence = torch.tensor([1.0, 1.25, 0.7, 0.85]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    sums = token_sums(logp.sum(), logp, ratio, divergence, 0.2)
    expected = {"loss": -10, "ratio": 3.8, "clip": 2, "kl": 1.0, "entropy": 10, "n_text": 4}
    assert numbers(sums) == pytest.approx(expected, abs=1e-6)
    for name in ("loss", "ratio", "kl", "entropy"):
        assert sums[name].dtype == torch.float64 and not sums[name].requires_grad


def test_a_line_of_the_log_puts_the_reward_first():
    entry = {"step": 12, "reward": 0.65, "acc": 0.6, "fmt": 0.25, "spread": 5.0, "groups": 8, "length": 80.4}
    entry |= {"cut": 0.125, "blocks": 2.0, "ratio": 1.0, "clip": 0.0, "kl": 0.01, "entropy": 1.5}
    entry |= {"loss": -0.02, "gnorm": 0.9, "lr": 1e-5, "seconds": 2.0, "rollout": 3.5, "update": 7.0}
    parts = weighted_terms(entry, REWARD_WEIGHTS, REWARD_WEIGHTS, digits=2)
    line = log_line.format(**entry, holdout=0.5, steps=200, parts=parts)
    assert line.startswith("step    12/200 | reward 0.650 = 1 x acc 0.60 + 0.2 x fmt 0.25 | spread 5/8 |")
    for part in ("length 80", "cut 0.12", "imagery 2.0", "ratio 1.000", "clip 0.000", "kl 0.0100"):
        assert f" {part} |" in line
    for part in ("entropy 1.500 ", "lr 1.0e-05", "rollout 3.50k tok/s", "update 7.00k tok/s"):
        assert part in line


# ---------------------------------------------------------------- runs

# a random network writes no <answer>: its letter is read off the length of what it wrote
FAKE = """
import evaluate
evaluate.parse_answer = lambda text, letters="ABCDEF": letters[len(text) % len(letters)]
"""


def words(world, out, *more):
    """The command of a small run; later words win."""
    base = [f"MODEL={world / 'dift'}", f"REFERENCE={world / 'other'}", f"DATA={world / 'rl.jsonl'}"]
    base += [f"OUT={out}", "HOLDOUT=", "SINGLES=", "STEPS=2", "GLOBAL_BATCH=4", "G=3", "MAX_NEW=20"]
    base += [f"TEMPERATURE={HOT}", "BETA=0.5", "LR=2e-5", "WARMUP=1", "CLIP=100", "SEED=2", "SAMPLE_EVERY=0"]
    return [*base, *more]


def train(world, out, *more):
    """A run in this process -> log entries, weights by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "parse_answer", evaluate.parse_answer)  # put back after the run
        exec(FAKE, {})
        run_script(patch, "grpo4d.py", *words(world, out, *more))
    return result_of(out)


def result_of(out):
    log = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return log, load_file(newest_checkpoint(out) / "model.safetensors")


def assert_equal_logs(mine, theirs, relative=1e-5):
    """To 1e-5, times and padding aside.

    The norm of the gradient is a root of a sum over all weights of products of other shapes: on one processor
    its rounding is under 1e-5, on another of the same kind 1.2e-5, so it gets 5e-5.
    """
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs):
        assert one.keys() == other.keys()
        for name in one.keys() - set(UNLIKE):
            limit = max(relative, 5e-5) if name == "gnorm" else relative
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=limit), name


def assert_equal_runs(mine, theirs):
    """Logs and weights to 1e-5, times and padding aside."""
    assert_equal_logs(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    for name, weight in mine[1].items():
        assert torch.allclose(weight, theirs[1][name], atol=1e-5), name
        assert (weight - theirs[1][name]).abs().mean() < 1e-6, name  # two steps of 2e-5


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """Two steps of one process, one micro-batch a step."""
    return train(world, tmp_path_factory.mktemp("plain") / "run")


def test_a_step_trains_the_text_and_leaves_vision_alone(world, plain):
    log, weights = plain
    before = load_file(newest_checkpoint(world / "dift") / "model.safetensors")
    assert before.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]) is ("visual" in name), name
    assert [entry["step"] for entry in log] == [1, 2] and log[0]["lr"] == log[1]["lr"] == 2e-5
    assert log[0]["spread"] >= 2 and sum(entry["spread"] for entry in log) >= 4
    for entry in log:
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["reward"] == pytest.approx(entry["acc"] + 0.2 * entry["fmt"]) and entry["acc"] > 0
        assert entry["ratio"] == pytest.approx(1, abs=1e-6) and entry["clip"] == 0
        assert entry["spread"] >= 1 and 0 < entry["cut"] < 1 and entry["blocks"] > 0
        assert entry["kl"] > 0.001 and entry["entropy"] > 0.1 and entry["gnorm"] > 0.01
        assert abs(entry["loss"]) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        ["MICRO_BATCH=3", "ROLLOUT_BATCH=1"],
        ["PREFIX=rows", "CACHE_FEATURES=False"],
        ["PREFIX=rows", "CHECKPOINTING=True", "MICRO_BATCH=1", "ROLLOUT_BATCH=3"],
    ],
    ids=" ".join,
)
def test_a_step_does_not_depend_on(world, tmp_path, plain, change):
    assert_equal_runs(train(world, tmp_path / "run", *change), plain)


def test_the_plain_methods_make_the_same_steps(world, tmp_path, plain):
    """FAST=False; the log to 1e-4 of each number, for the two round the large logits differently.

    The gradient's norm of the first step differs by 3.2e-5; an update in float64 agrees in all digits.
    """
    log, weights = train(world, tmp_path / "run", "FAST=False")
    assert_equal_logs(log, plain[0], relative=1e-4)
    for name, weight in weights.items():  # where a gradient is next to nothing, AdamW makes much of it
        assert (weight - plain[1][name]).abs().mean() < 1e-6, name


def naive_loss(policy, reference, prompts, answers, A, old, ratios):
    """Eq. 10 answer by answer and token by token; ε = 0.15, β = 0.5, G = 3; fills `old` if it is empty."""
    loss = torch.zeros(())
    for i, answer in enumerate(answers):
        if answer.truncated:
            continue
        given = (prompts[i // 3], answer, answer.latents)
        logp = at_scored(policy, naive_log_probs(policy, *given), answer)
        ref = at_scored(reference, naive_log_probs(reference, *given), answer)
        old.setdefault(i, logp.tolist())
        for t in range(len(logp)):
            rho, d = (logp[t] - old[i][t]).exp(), ref[t] - logp[t]
            gain = torch.minimum(rho * A[i], rho.clamp(0.85, 1.15) * A[i])
            loss = loss - (gain - 0.5 * (d.exp() - d - 1)) / len(logp) / len(answers)
            ratios.append(rho.item())
    return loss


def test_two_updates_of_a_rollout_equal_a_naive_loop(world, tmp_path, monkeypatch):
    """MU = 2: one rollout, whose old log-probs stay those of the first update."""
    rollouts, real = [], model_py.generate

    def recorded(*args, **kwargs):
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(model_py, "generate", recorded)
    more = ["MU=2", "STEPS=1", "MICRO_BATCH=3", "EPSILON=0.15", "LR=3e-4"]
    more.append('REWARD_WEIGHTS={"acc": 2.0, "fmt": 0.2}')
    (entry,), _ = train(world, tmp_path / "run", *more)
    assert len(rollouts) == 1

    # the answers are those that the generators give at this temperature, from the full softmax
    policy, reference = load_model(world / "dift"), load_model(world / "other").requires_grad_(False)
    rows = read_rows(world / "rl.jsonl")
    drawn = rows_of_step(0, len(rows), 4, seed=2)
    prompt_of = {index: encode_row(policy, rows[index], answer=False) for index in drawn}
    chosen = sorted(prompt_of, key=lambda index: len(prompt_of[index].ids))
    answers, prompts = rollouts[0], [prompt_of[index] for index in chosen]
    kinds = {(answer.truncated, len(answer.latents) > 0) for answer in answers}
    assert kinds >= {(True, True), (False, True)}
    generators = [answer_generator(2, 0, index, number) for index in chosen for number in range(3)]
    same = real(policy, prompts, 20, temperature=HOT, generators=generators)
    assert [answer.ids for answer in same] == [answer.ids for answer in answers]

    # rewards of FAKE's letters; answers that were cut off count in the mean and the std
    keys, A = [rows[index].key for index in chosen for _ in range(3)], []
    rewards = [2.0 * ("ABCD"[len(answer.text) % 4] == key) for answer, key in zip(answers, keys)]
    for group in (rewards[start : start + 3] for start in range(0, 12, 3)):
        A += [(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4) for r in group]

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer, old, ratios, losses = torch.optim.AdamW(trained, 3e-4, weight_decay=0.0), {}, [], []
    for _ in range(2):
        loss = naive_loss(policy, reference, prompts, answers, A, old, ratios)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    clipped = sum(abs(ratio - 1) > 0.15 for ratio in ratios)
    assert entry["reward"] == pytest.approx(statistics.mean(rewards)) and len(set(A)) >= 3
    assert entry["loss"] == pytest.approx(statistics.mean(losses), abs=1e-4)
    assert entry["ratio"] == pytest.approx(statistics.mean(ratios), abs=1e-4)
    assert entry["clip"] == pytest.approx(clipped / len(ratios)) and clipped > 0
    start, end = (load_model(path).qwen.state_dict() for path in (world / "dift", tmp_path / "run"))
    for name, weight in policy.qwen.state_dict().items():
        if "visual" not in name:  # where a gradient is next to nothing, AdamW makes much of its rounding
            assert (weight - end[name]).abs().mean() < 1e-6 < 1e-4 < (weight - start[name]).abs().mean()


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_questions_that_cost_as_much_are_read_together(world, tmp_path, monkeypatch, prefix):
    """Longest answers of 40, 4, 41, 5 tokens: behind shared prompts 4 stands with 5 and 40 with 41."""
    lengths = [[40, 9, 2], [3, 4, 2], [41, 40, 3], [5, 5, 5]]  # in order of the prompts' lengths

    def given_answers(model, prompts, *args, **kwargs):
        none = torch.zeros(0, model.config.text_config.hidden_size)
        end = model.token_id["im_end"]
        return [completion_of("", [30] * (n - 1) + [end], latents=none) for n in sum(lengths, [])]

    monkeypatch.setattr(model_py, "generate", given_answers)
    (entry,), _ = train(world, tmp_path / "run", "STEPS=1", "MICRO_BATCH=2", f"PREFIX={prefix}")

    policy, rows = load_model(world / "dift"), read_rows(world / "rl.jsonl")
    drawn = [encode_row(policy, rows[index], answer=False) for index in rows_of_step(0, len(rows), 4, seed=2)]
    prompts = sorted(len(prompt.ids) for prompt in drawn)

    def padding(*pairs):
        read = places = 0
        for pair in pairs:
            before, answers = [prompts[i] for i in pair], [lengths[i] for i in pair]
            if prefix == "shared":
                read += sum(before) + sum(map(sum, answers))
                places += 2 * max(before) + 6 * max(map(max, answers))
            else:
                read += 3 * sum(before) + sum(map(sum, answers))
                places += 6 * max(p + max(some) for p, some in zip(before, answers))
        return 1 - read / places

    pairs = [((0, 1), (2, 3)), ((1, 3), (0, 2)), ((0, 3), (1, 2))]
    best = min(pairs, key=lambda two: padding(*two))
    assert entry["padding"] == pytest.approx(padding(*best))
    assert best == pairs[1] or prefix == "rows"  # where prompts are read with each answer, they decide


@pytest.mark.parametrize("change, other", [("LATENT_REPLAY=False", "entropy"), ("KL=k1", "kl")])
def test_ablations_change_the_update_alone(world, tmp_path, plain, change, other):
    """The same answers and rewards; without replay what is scored reads another input."""
    (entry,), _ = train(world, tmp_path / "run", change, "STEPS=1")
    for name in ("reward", "length", "blocks", "cut"):
        assert entry[name] == plain[0][0][name]
    assert abs(entry[other] - plain[0][0][other]) > 0.01 and abs(entry["loss"] - plain[0][0]["loss"]) > 1e-3
    assert (entry["entropy"] == pytest.approx(plain[0][0]["entropy"])) is (other == "kl")


def test_a_run_ends_with_scores_before_and_after(world, tiny, tmp_path, monkeypatch, capsys):
    """And one that is stopped while it writes a checkpoint goes on to the same log, weights and scores."""
    single = f"SINGLES={tiny / 'data' / 'test_imagery.jsonl'}"
    more = [f"HOLDOUT={world / 'held.jsonl'}", single, "HOLDOUT_ROWS=2", "STEPS=3", "EVAL_EVERY=2"]
    more += ["SAVE_EVERY=1", "LR=1e-3", "SAMPLE_EVERY=1", "GLOBAL_BATCH=2"]
    whole, weights = train(world, tmp_path / "whole", *more)
    printed = capsys.readouterr().out
    assert "LR=0.001" in printed and f"torch {torch.__version__}" in printed and "first question:" in printed
    assert "1 x cpu" in printed and "M trained weights" in printed
    assert printed.count("\nstep ") == 3 and printed.count("\n--- ") == 3 and "{imagery x 4}" in printed
    assert "HOLDOUT after 2 steps: " in printed
    assert [entry["step"] for entry in whole if "holdout" in entry] == [2]
    table = printed[printed.index("before %") :]
    assert all(name in table for name in ("compound, all", "single, all", "turn_0", "camera_single"))
    for part in ("compound", "single"):
        for moment in ("before", "after"):
            summary = json.loads((tmp_path / "whole" / moment / part / "summary.json").read_text())
            assert summary["scores"]["micro"]["n"] == 2 and summary["settings"]["max_new"] == 20
        for name in ("picture.png", "report.html"):
            assert (tmp_path / "whole" / "after" / part / name).stat().st_size > 1000
    run = json.loads((newest_checkpoint(tmp_path / "whole") / "config.json").read_text())["run"]
    assert (run["step"], run["LR"], run["MODEL"]) == (3, 1e-3, str(world / "dift"))
    assert run["reference_path"] == str(world / "other" / "step_000001")

    real = os.replace

    def killed(source, target):
        if str(target).endswith("step_000002"):
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        train(world, tmp_path / "killed", *more)
    assert newest_checkpoint(tmp_path / "killed").name == "step_000001"
    assert len((tmp_path / "killed" / "log.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    again, resumed = train(world, tmp_path / "killed", *more)
    assert capsys.readouterr().out.count("before/compound: 2 answers are there already") == 1
    for entry in (*whole, *again):
        assert all(entry.pop(name) > 0 for name in TIMES)
    assert again == whole
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.items())
    names = [f"step_000003/{name}.safetensors" for name in ("model", "optimizer")]
    names += [f"{moment}/compound/results.jsonl" for moment in ("before", "after")]
    for name in names:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_scores_before_are_the_policys(world, tmp_path):
    """Not the reference's; a run that starts afresh in the same folder scores its own policy again."""
    rows, texts = read_rows(world / "held.jsonl"), []
    for name, other in (("dift", "other"), ("other", "dift")):
        more = [f"MODEL={world / name}", f"REFERENCE={world / other}", f"HOLDOUT={world / 'held.jsonl'}"]
        train(world, tmp_path / "run", *more, "STEPS=1", "GLOBAL_BATCH=1", "RESUME=never")
        lines = (tmp_path / "run" / "before" / "compound" / "results.jsonl").read_text().splitlines()
        model = load_model(world / name)
        greedy = generate(model, [encode_row(model, row, answer=False) for row in rows], 20)
        assert [json.loads(line)["text"] for line in lines] == [answer.text for answer in greedy]
        texts.append([answer.text for answer in greedy])
    assert texts[0] != texts[1]


PAIR = """
import runpy
{fake}
runpy.run_path("grpo4d.py", run_name="__main__")
"""


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_equal_one(world, plain, tmp_path, layout):
    """The same answers, logs and weights; then a step on one and a step on two in the same folder."""
    (tmp_path / "pair.py").write_text(PAIR.format(fake=FAKE))
    out, more = tmp_path / "run", ["MICRO_BATCH=1", "SAVE_EVERY=1", f"PARALLEL={layout}"]
    scored = [f"HOLDOUT={world / 'held.jsonl'}", "EVAL_EVERY=0"]
    printed = two_processes(tmp_path / "pair.py", *words(world, out, *more, *scored))
    assert printed.count("2 x cpu") == 1
    assert printed.count("| reward ") == printed.count("compound, all") + 1 == 2
    assert_equal_runs(result_of(out), plain)
    kept = load_file(newest_checkpoint(out) / "optimizer.safetensors")
    forget_last(out)
    assert_equal_runs(train(world, out, *more), plain)
    alone = load_file(newest_checkpoint(out) / "optimizer.safetensors")
    assert kept.keys() == alone.keys() and all(torch.allclose(kept[x], alone[x], atol=1e-6) for x in kept)
    forget_last(out)
    two_processes(tmp_path / "pair.py", *words(world, out, *more))
    assert_equal_runs(result_of(out), plain)


def test_an_ablation_runs_cut_up_too(world, tmp_path):
    """Pads come from the table of words, which no process holds as a whole."""
    (tmp_path / "pair.py").write_text(PAIR.format(fake=FAKE))
    more = ["LATENT_REPLAY=False", "PREFIX=rows", "CHECKPOINTING=True", "STEPS=1"]
    alone = train(world, tmp_path / "alone", *more)
    two_processes(tmp_path / "pair.py", *words(world, tmp_path / "run", *more, "PARALLEL=fsdp"))
    assert_equal_runs(result_of(tmp_path / "run"), alone)


REWARD_2 = 'REWARD_WEIGHTS={"acc": 2.0, "fmt": 0.5}'
# the constants of a run in the config.json of a checkpoint from before REWARD_WEIGHTS and FAST
FORMER = "MODEL REFERENCE DATA VIDEOS HOLDOUT SINGLES OUT FPS MAX_FRAMES HOLDOUT_ROWS TEST_BATCH"
FORMER += " LATENT_REPLAY PREFIX STEPS GLOBAL_BATCH MICRO_BATCH MU LR WARMUP WEIGHT_DECAY CLIP G"
FORMER += " ROLLOUT_BATCH MAX_NEW TEMPERATURE EPSILON BETA KL W_ACC W_FMT FORMAT_NEEDS_IMAGERY LOG_EVERY"
FORMER += " SAMPLE_EVERY EVAL_EVERY SAVE_EVERY RESUME CACHE_FEATURES PARALLEL CHECKPOINTING SEED"


def make_former(out):
    """Gives the newest checkpoint of a run the record that the code wrote before."""
    file = newest_checkpoint(out) / "config.json"
    config = json.loads(file.read_text())
    values, weights = config["run"], config["run"]["REWARD_WEIGHTS"]
    values |= {"W_ACC": weights["acc"], "W_FMT": weights["fmt"]}
    names = [*FORMER.split(), "start_path", "reference_path", "step"]
    config["run"] = {name: values[name] for name in names}
    file.write_text(json.dumps(config, indent=1))


def test_a_run_of_the_former_code_goes_on(world, tmp_path, plain):
    """Its record has W_ACC and W_FMT; the rest of the run is the same to the bit."""
    out = tmp_path / "run"
    train(world, out, "SAVE_EVERY=1")
    forget_last(out)
    make_former(out)
    refused(lambda: train(world, out, "LR=0.5"), "LR=2e-05", "RESUME=never")
    refused(lambda: train(world, out, REWARD_2), "REWARD_WEIGHTS=", "RESUME=never")
    log, weights = train(world, out, "SAVE_EVERY=1")
    assert_equal_runs((log, weights), plain)
    assert [entry["loss"] for entry in log] == [entry["loss"] for entry in plain[0]]
    assert all(torch.equal(weight, plain[1][name]) for name, weight in weights.items())
    run = json.loads((newest_checkpoint(out) / "config.json").read_text())["run"]
    assert run["step"] == 2 and run["REWARD_WEIGHTS"] == {"acc": 1.0, "fmt": 0.2}
    assert run["reference_path"] == str(world / "other" / "step_000001")


def test_a_run_of_the_former_code_keeps_its_weights(world, tmp_path):
    """It goes on with the weights that W_ACC and W_FMT had, and with no others."""
    out, more = tmp_path / "run", ["STEPS=1", "GLOBAL_BATCH=2"]
    train(world, out, *more, REWARD_2)
    make_former(out)
    refused(lambda: train(world, out, *more), f"{out}", "REWARD_WEIGHTS=", "2.0", "RESUME=never")
    train(world, out, *more, REWARD_2)


def test_the_folder_of_another_run_is_refused(world, tmp_path):
    out = tmp_path / "run"
    train(world, out, "STEPS=1", "GLOBAL_BATCH=2")
    changes = ["LR=0.5", "SEED=3", "G=4", "MU=2", "GLOBAL_BATCH=4", "MAX_NEW=8", "LATENT_REPLAY=False"]
    changes += [REWARD_2, "BETA=0.25", "KL=k1", "EPSILON=0.1", "FORMAT_NEEDS_IMAGERY=False"]
    for word in changes:
        parts = (f"{out}", f"{word.split('=')[0]}=", "RESUME=never")
        refused(lambda word=word: train(world, out, "GLOBAL_BATCH=2", word), *parts)
    log, _ = train(world, out, "STEPS=1", "GLOBAL_BATCH=2", "RESUME=never", "LR=0.5")
    assert len(log) == 1 and log[0]["lr"] == 0.5


# ---------------------------------------------------------------- bad input: one sentence each


@pytest.mark.parametrize(
    "change, part",
    [
        (["G=1"], "G=1"),
        (["TEMPERATURE=0"], "TEMPERATURE=0"),
        (["PREFIX=share"], "PREFIX=share"),
        (["KL=k2"], "KL=k2"),
        (["RESUME=yes"], "RESUME=yes"),
        (["PARALLEL=zero"], "PARALLEL=zero"),
        (["CHECKPOINTING=True"], "PREFIX=rows"),
        (["MODEL=none"], "none"),
        (["REFERENCE=none"], "none"),
        (["DATA=none.jsonl"], "none.jsonl"),
        (["HOLDOUT=none.jsonl"], "none.jsonl"),
        (["REWARD_WEIGHTS=2"], "REWARD_WEIGHTS=2"),
        (["REWARD_WEIGHTS={'acc': 1.0}"], "acc, fmt"),
        (["REWARD_WEIGHTS={'acc': 1.0, 'form': 0.2}"], "acc, fmt"),
        (["REWARD_WEIGHTS={'acc': 'ten', 'fmt': 0.2}"], "REWARD_WEIGHTS"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_constants_are_one_sentence(world, tmp_path, change, part):
    refused(lambda: train(world, tmp_path / "run", *change), part)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word, near", [("STEP=3", "STEPS"), ("W_ACC=2", "")])
def test_unknown_constants_are_one_sentence(world, tmp_path, word, near):
    """The weights of the reward are one constant now."""
    with pytest.raises(SystemExit, match=f"^Unknown constant {word.split('=')[0]}. Did you mean {near}"):
        train(world, tmp_path / "run", word)
    assert not (tmp_path / "run").exists()


def test_a_global_batch_that_cannot_be_shared_is_one_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "init_distributed", lambda: (0, 3, torch.device("cpu")))
    refused(lambda: train(world, tmp_path / "run"), "GLOBAL_BATCH=4", "3 processes")


@pytest.mark.parametrize("field", ["DATA", "HOLDOUT"])
@pytest.mark.parametrize("change", [{"Correct": None}, {"Correct": "E"}, {"text_input": "What?\n\nA. x"}])
def test_a_question_without_a_key_is_one_sentence(world, tiny, tmp_path, field, change):
    """No key, a key outside the options, and a row of DIFT's schema with neither."""
    raws = raw_rows(tiny)[:3]
    raws[2] |= change
    if "text_input" in change:
        raws[2] = {**change, "text_output": "", "image_input": [], "image_output": []}
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    bad = tmp_path / "bad.jsonl"
    refused(lambda: train(world, tmp_path / "run", f"{field}={bad}"), f"{bad}:3: ", "key")


def test_a_policy_without_imagery_is_one_sentence(world, tiny, tmp_path):
    """The plain base, whose config says nothing, and a checkpoint of K = 0."""
    start = ["REFERENCE=", f"MODEL={tiny / 'base'}"]
    refused(lambda: train(world, tmp_path / "run", *start), f"{tiny / 'base'}", "latent_size")
    save_checkpoint(tmp_path / "none", 1, load_model(tiny / "base", K=0), {})
    start[1] = f"MODEL={tmp_path / 'none'}"
    refused(lambda: train(world, tmp_path / "run", *start), "latent_size 0")


@pytest.mark.parametrize("K, width", [(4, 64), (2, 96)], ids=["width", "K"])
def test_a_reference_of_another_shape_is_one_sentence(world, tmp_path, K, width):
    make_world(tmp_path, text={"intermediate_size": width})
    save_checkpoint(tmp_path / "odd", 1, load_model(tmp_path / "base", K=K, pooling="grid"), {})
    parts = (f"REFERENCE={tmp_path / 'odd' / 'step_000001'}", "in shape")
    refused(lambda: train(world, tmp_path / "run", f"REFERENCE={tmp_path / 'odd'}"), *parts)


def test_the_script_can_be_imported_without_running():
    assert "kept_on_resume" in runpy.run_path(str(ROOT / "grpo4d.py"), run_name="grpo4d")
