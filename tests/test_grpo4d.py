"""grpo4d.py: Eqs. 9 and 10, replay, the shared prompt; a step does not depend on devices, batches, kills."""

import json
import math
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from helpers import ROOT, forget_last, lively, make_world, refused, run_script, two_processes
from safetensors.torch import load_file

import evaluate
import model as model_py
from grpo4d import advantages, answer_sample, answer_sums, compare_table, dice, grpo_loss, log_line, pack
from grpo4d import reward, shown, token_sums
from model import Images, encode_row, generate, load_images, load_model, newest_checkpoint, read_rows
from model import TargetLogps, rows_of_step, save_checkpoint

G, MAX_NEW, HOT = 4, 30, 2.0  # answers to a question, their limit, the temperature that mixes their states
TIMES = ("seconds", "rollout", "update")
UNLIKE = (*TIMES, "padding")  # of two runs whose steps are the same


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """dift/: a network that often imagines and sometimes ends; other/: one near it; rl.jsonl, held.jsonl."""
    folder = tmp_path_factory.mktemp("grpo4d")
    model = lively(tiny)
    model.net.config.latent_norm = 6.0
    with torch.no_grad():
        for name in ("latent_start", "im_end"):  # longer rows of the tied table: likelier at some places
            model.net.get_input_embeddings().weight[model.ids[name]] *= 4
    save_checkpoint(folder / "dift", 1, model, {})
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.net.model.language_model.parameters():
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
        raws.append(raw | {"frame_paths": row["image_input"][:frames], "times": row["times"][:frames]})
    return raws


@pytest.fixture(scope="module")
def rows(world):
    return read_rows(world / "rl.jsonl")


@pytest.fixture(scope="module")
def policy(world):
    model = load_model(world / "dift")
    model.net.model.visual.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def reference(world):
    return load_model(world / "other").requires_grad_(False)


@pytest.fixture(scope="module")
def images(policy):
    return Images(policy, cache=True)


@pytest.fixture(scope="module")
def rollout(policy, images, rows):
    """(prompts, G answers to each), sampled together."""
    prompts = [encode_row(policy, row, answer=False) for row in rows[:4]]
    generators = [dice(1, 0, question, number) for question in range(4) for number in range(G)]
    made = generate(policy, prompts, MAX_NEW, images, temperature=HOT, generators=generators)
    return prompts, [made[at : at + G] for at in range(0, len(made), G)]


def scored_places(model, made):
    """T_i from the ids alone: all but the K + 1 places after a start; nothing without the end of turn."""
    places, t = [], 0
    while t < len(made["ids"]):
        places.append(t)
        t += model.K + 2 if made["ids"][t] == model.ids["latent_start"] else 1
    return places if made["ids"][-1] == model.ids["im_end"] else []


def naive_logps(model, prompt, made, latents=None):
    """Log-probabilities (n, V) at each place of an answer: one row, no cache, no padding, no shared code.

    Inside a block it reads its own hidden state as it is recomputed (Eq. 8), or the given latents.
    """
    net, given = model.net, iter(() if latents is None else latents)
    x, positions = net.get_input_embeddings()(prompt["ids"]), prompt["positions"]
    with torch.no_grad():
        pixels, grid = load_images(prompt["video"], net.config)
        features = net.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    x = x.masked_scatter(prompt["is_visual"][:, None], features)

    def hidden():
        inputs = {"inputs_embeds": x[None], "position_ids": positions[:, None]}
        return net.model.language_model(**inputs).last_hidden_state[0]

    for token in made["ids"]:
        z = net.get_input_embeddings().weight[token]
        if token == model.ids["latent_pad"]:
            z = model.feedback(hidden()[-1]) if latents is None else next(given)
        x = torch.cat([x, z[None]])
        positions = torch.cat([positions, positions.max().expand(3, 1) + 1], dim=1)
    logits = net.lm_head(hidden()[len(prompt["ids"]) - 1 : -1])
    for name in ("latent_pad", "latent_end", "image_pad", "video_pad"):
        logits[:, model.ids[name]] = -math.inf
    return (logits / HOT).log_softmax(dim=-1)


@pytest.fixture(scope="module")
def tables(policy, rollout):
    """naive_logps of all answers, with latents of its own."""
    with torch.no_grad():
        return [[naive_logps(policy, p, made) for made in group] for p, group in zip(*rollout)]


def at_scored(model, table, made):
    """A table (n, V) at the tokens of T_i."""
    places = scored_places(model, made)
    return table[places, [made["ids"][t] for t in places]]


def assert_same(mine, theirs):
    """Two answers: tokens and masks equal, latents to 3e-4 (each is made from the one before)."""
    for name in ("ids", "is_latent", "is_sampled", "cut", "text"):
        assert mine[name] == theirs[name], name
    assert torch.allclose(mine["latents"], theirs["latents"], atol=3e-4)


# ---------------------------------------------------------------- reward, Eq. 9

ROW = {"options": {"A": "Left", "B": "Right", "C": "Up"}, "key": "B", "id": "q7"}
BLOCK = "<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>"
GOOD = f"\n<think>It {BLOCK} turns.</think>\n<answer>B. Right</answer><|im_end|>"


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
    assert reward(ROW, {"text": text}, True) == (acc, fmt)
    assert reward(ROW, {"text": text}, False) == (acc, fmt_without_imagery)


def test_a_word_and_a_letter_outside_the_options_earn_nothing():
    """ "Analyzing" is no A; E is no answer to a question with options A to C, even if it were the key."""
    analysing = {"text": GOOD.replace("B. Right", "Analyzing")}
    assert reward(ROW | {"key": "A"}, analysing, True) == (0, 1)
    outside = {"text": GOOD.replace("B. Right", "E")}
    assert reward(ROW | {"key": "E"}, outside, True)[0] == 0
    assert reward(ROW | {"options": dict.fromkeys("ABCDE", ""), "key": "E"}, outside, True)[0] == 1


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
    sums = token_sums(loss, logp, ratio, divergence, 0.2).tolist()
    by_hand = [loss.item(), 8.0, 4, 0, -logp.sum().item(), 8]  # four of the eight are beyond 0.8 to 1.2
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


def test_the_rollout_holds_what_the_tests_below_rest_on(policy, rollout):
    """Prompts of other lengths, blocks at other steps, early stops, cuts within a block, no imagery."""
    prompts, groups = rollout
    answers = [made for group in groups for made in group]
    assert len({len(prompt["ids"]) for prompt in prompts}) == 4
    assert all({made["cut"] for made in group} == {True, False} for group in groups)
    assert len({len(made["ids"]) for made in answers if not made["cut"]}) >= 5
    for step in (6, 10, 14):
        states = {made["is_latent"][step] if step < len(made["ids"]) else None for made in answers}
        assert states == {True, False, None}  # inside a block, outside, finished
    done = [made for made in answers if not made["cut"]]
    assert {0, 4, 8} <= {len(made["latents"]) for made in done}
    assert any(len(made["latents"]) % policy.K for made in answers)


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_replayed_log_probs_are_the_samplers(policy, images, rollout, tables, prefix):
    """To 1e-4, against one row at a time without cache, whose latents are its own hidden states."""
    prompts, groups = rollout
    batch, latents = pack(policy, images, prompts, groups, prefix, True)
    with torch.no_grad():
        logp, imagined, _ = policy(batch, latents, True, HOT)
    pairs = [(table, made) for line, group in zip(tables, groups) for table, made in zip(line, group)]
    expected = torch.cat([at_scored(policy, table, made) for table, made in pairs])
    assert len(expected) > 60 and torch.allclose(logp, expected, atol=1e-4)
    assert torch.allclose(policy.feedback(imagined), latents, atol=3e-4)  # what is replayed was its own


def test_the_sampler_drew_from_these_log_probs(policy, rollout, tables):
    """Each sampled token is where the draw of its generator falls in the sum of the naive probabilities."""
    drawn = 0
    for question, group in enumerate(rollout[1]):
        for number, made in enumerate(group):
            uniform = torch.rand(MAX_NEW, generator=dice(1, 0, question, number), dtype=torch.float64)
            for t, token in enumerate(made["ids"]):
                if made["is_sampled"][t]:
                    total = tables[question][number][t].double().exp().cumsum(dim=0)
                    low = total[token - 1].item() if token else 0.0
                    assert low - 1e-4 <= uniform[t].item() <= total[token].item() + 1e-4
                    drawn += 1
    assert drawn > 150


def test_an_answer_does_not_depend_on_its_batch(policy, images, rows, rollout):
    """One prefill for all questions, for its own, for itself alone: the same answer to the same dice."""
    prompts, groups = rollout
    how = {"max_new": MAX_NEW, "images": images, "temperature": HOT}
    for question in (0, 3):
        generators = [dice(1, 0, question, number) for number in range(G)]
        made = generate(policy, [prompts[question]], **how, generators=generators)
        for mine, theirs in zip(made, groups[question]):
            assert_same(mine, theirs)
        for number in range(G):
            alone = generate(policy, [prompts[question]], **how, generators=[dice(1, 0, question, number)])
            assert_same(alone[0], groups[question][number])
    back = [dice(1, 0, question, number) for question in (3, 1) for number in reversed(range(G))]
    made = generate(policy, [prompts[3], prompts[1]], **how, generators=back)
    for mine, theirs in zip(made, groups[3][::-1] + groups[1][::-1]):
        assert_same(mine, theirs)


def test_dice_are_a_function_of_seed_step_question_and_answer():
    def draws(*key):
        return tuple(torch.rand(3, generator=dice(*key)).tolist())

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
    made = {"ids": [5, 6, 90, 91, 91, 92, 7, 99], "is_latent": [False] * 3 + [True] * 2 + [False] * 3}
    made |= {"is_sampled": [True] * 3 + [False] * 3 + [True] * 2, "cut": False}
    prompt = {"positions": torch.tensor([[0, 4, 4, 9], [0, 4, 5, 6], [0, 4, 11, 6]]), "where": "rl.jsonl:3"}
    sample = answer_sample(prompt, made)
    assert sample["ids"].tolist() == made["ids"]
    assert sample["is_latent"].int().tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert sample["is_text"].int().tolist() == [1, 1, 1, 0, 0, 0, 1, 1]
    assert sample["positions"].tolist() == [list(range(12, 20))] * 3
    assert sample["is_real"].all() and not sample["is_visual"].any() and sample["where"] == "rl.jsonl:3"
    assert not answer_sample(prompt, made | {"cut": True})["is_text"].any()


def test_a_packed_batch_holds_the_answers_in_order(policy, images, rollout):
    """Rows: answers of the first question, then of the second; latents in that order; T_i as the ids say."""
    prompts, groups = rollout
    for prefix in ("shared", "rows"):
        batch, latents = pack(policy, images, prompts, groups, prefix, True)
        assert batch["is_text"].shape == batch["ids"].shape and len(batch["ids"]) == 4 * G
        assert torch.equal(latents, torch.cat([made["latents"] for group in groups for made in group]))
        for row, made in enumerate(made for group in groups for made in group):
            first = 0 if prefix == "shared" else len(prompts[row // G]["ids"])
            places = [first + t for t in scored_places(policy, made)]
            assert batch["is_text"][row].nonzero()[:, 0].tolist() == places
            assert batch["ids"][row, first : first + len(made["ids"])].tolist() == made["ids"]
            assert batch["is_latent"][row].sum() == len(made["latents"])
        assert ("prompts" in batch) is (prefix == "shared")


def test_without_replay_the_log_probs_are_others(policy, images, rollout, tables):
    """The pitfall: pad embeddings at latent positions change all that follows an image, nothing before it."""
    prompts, groups = rollout
    logps = []
    for replay in (True, False):
        batch, latents = pack(policy, images, prompts, groups, "shared", replay)
        with torch.no_grad():
            logps.append(policy(batch, latents, True, HOT)[0])
    pad = policy.net.get_input_embeddings().weight[policy.ids["latent_pad"]]
    assert latents.eq(pad).all() and not latents.requires_grad
    away, moved = iter((logps[1] - logps[0]).abs().tolist()), []
    for made in (made for group in groups for made in group):
        for t in scored_places(policy, made):
            change = next(away)
            if any(made["is_latent"][:t]):
                moved.append(change)
            else:
                assert change < 1e-5
    assert len(moved) > 20 and statistics.median(moved) > 0.01 and max(moved) > 0.1


# ---------------------------------------------------------------- the gradient


def update(policy, reference, images, prompts, groups, prefix="shared", advantage=None, beta=0.5):
    """One pass of Eq. 10 as the script makes it -> loss, gradients by name."""
    batch, latents = pack(policy, images, prompts, groups, prefix, True)
    with torch.no_grad():
        ref = reference(batch, latents, True, HOT)[0]
    logp = policy(batch, latents, True, HOT)[0]
    count = sum(len(group) for group in groups)
    advantage = torch.linspace(-1.5, 2, count) if advantage is None else advantage
    given = (advantage, batch["is_text"].nonzero()[:, 0], count, 0.2, beta)
    loss = grpo_loss(logp, logp.detach(), ref, *given)[0]
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("questions", [[0, 1, 2, 3], [2, 0], [1]], ids=str)
def test_a_shared_prompt_gives_the_loss_and_gradients_of_rows(policy, reference, images, rollout, questions):
    """To 1e-5, with prompts of other lengths (or one), and cut-off answers among them."""
    some = [[part[question] for question in questions] for part in rollout]
    assert {made["cut"] for group in some[1] for made in group} == {True, False}
    loss, mine = update(policy, reference, images, *some, "shared")
    other, theirs = update(policy, reference, images, *some, "rows")
    assert loss == pytest.approx(other, abs=1e-5) and abs(loss) > 0.01
    assert mine.keys() == theirs.keys() and len(mine) > 20
    for name, gradient in mine.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-5), name
    assert max(gradient.abs().max() for gradient in mine.values()) > 0.01


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_only_logits_of_scored_tokens_have_a_gradient(
    policy, reference, images, rollout, prefix, monkeypatch
):
    """The state that speaks about token t has one if t is in T_i, exactly none otherwise; banned ids none."""
    prompts, groups = rollout
    groups = [*groups[:3], [made | {"cut": True} for made in groups[3]]]  # one question's are all cut off
    states, logits = [], []

    def keep_states(module, inputs, kwargs, output):
        output.last_hidden_state.retain_grad()
        states.append((kwargs["inputs_embeds"].shape[:2], kwargs["read"], output.last_hidden_state))

    real = TargetLogps.backward

    def keep_gradient(ctx, g):
        memory = ctx.saved_tensors[2]  # in which the logits' gradient is made
        result = real(ctx, g)
        logits.append(memory)
        return result

    monkeypatch.setattr(TargetLogps, "backward", staticmethod(keep_gradient))
    hook = policy.net.model.language_model.register_forward_hook(keep_states, with_kwargs=True)
    update(policy, reference, images, prompts, groups, prefix)
    hook.remove()
    places = [scored_places(policy, m) if not m["cut"] else [] for group in groups for m in group]
    expected = [torch.zeros(shape, dtype=torch.bool) for shape, _, _ in states]
    for row, scored in enumerate(places):
        for t in scored:
            if prefix == "rows":
                expected[0][row, len(prompts[row // G]["ids"]) + t - 1] = True
            elif t:
                expected[1][row, t - 1] = True
            else:  # the prompt's last state speaks about the first token of all its answers
                expected[0][row // G, -1] = True
    assert len(states) == (2 if prefix == "shared" else 1)
    for (_, read, state), mask in zip(states, expected):
        moved, everywhere = state.grad.ne(0).any(dim=-1).flatten(), torch.arange(mask.numel())
        read = everywhere if read is None else read  # where the last layer spoke at all
        assert torch.equal(everywhere[mask.flatten()], read[moved])
    assert sum(map(len, logits)) == sum(map(len, places)) > 50
    for one in logits:
        assert one.ne(0).any(dim=-1).all() and one[:, policy.banned].eq(0).all()


def test_equal_rewards_leave_the_kl_term_alone(policy, reference, images, rollout):
    """A group without spread: no gradient at β = 0; with β that of the KL term, the same for any reward."""
    prompts, groups = rollout
    zero = advantages(torch.full((4, G), 0.2)).flatten()
    _, nothing = update(policy, reference, images, prompts, groups, advantage=zero, beta=0.0)
    assert all(gradient.eq(0).all() for gradient in nothing.values()) and len(nothing) > 20
    loss, pull = update(policy, reference, images, prompts, groups, advantage=zero, beta=0.5)
    assert loss > 0.01 and max(gradient.abs().max() for gradient in pull.values()) > 0.01
    _, none = update(policy, policy, images, prompts, groups, advantage=zero, beta=0.5)  # its own reference
    assert max(gradient.abs().max() for gradient in none.values()) < 1e-6


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_a_batch_of_cut_off_answers_has_a_zero_gradient(policy, reference, images, rollout, prefix):
    """Zeros and not None, which two processes would wait for; no nan of a division by |T_i| = 0."""
    prompts, groups = rollout
    groups = [[made | {"cut": True} for made in group] for group in groups]
    loss, gradients = update(policy, reference, images, prompts, groups, prefix)
    assert loss == 0 and len(gradients) > 20
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def test_a_cut_off_answer_gives_no_gradient(policy, reference, images, rollout):
    """Neither what it says nor its advantage matters."""
    prompts, group = rollout[0][:1], list(rollout[1][0])
    at, advantage = next(n for n in range(G) if group[n]["cut"]), torch.linspace(-1, 1, G)
    loss, gradients = update(policy, reference, images, prompts, [group], advantage=advantage)
    ids = zip(group[at]["ids"], group[at]["is_sampled"])
    said = [9 if sampled and token != policy.ids["latent_start"] else token for token, sampled in ids]
    assert said != group[at]["ids"] and max(gradient.abs().max() for gradient in gradients.values()) > 0.01
    group[at], advantage[at] = group[at] | {"ids": said}, 50.0
    other, same = update(policy, reference, images, prompts, [group], advantage=advantage)
    assert loss == other
    assert all(torch.allclose(gradient, same[name], atol=1e-7) for name, gradient in gradients.items())


def test_answers_without_imagery_can_be_scored(policy, reference, images, rollout):
    plain = [made for group in rollout[1] for made in group if not made["cut"] and not len(made["latents"])]
    groups = [[plain[0]] * G]
    losses = [update(policy, reference, images, rollout[0][:1], groups, p)[0] for p in ("shared", "rows")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != 0


# ---------------------------------------------------------------- the log


def test_sums_over_answers_by_hand():
    """Two questions with two answers; the second question's rewards are equal."""
    texts = [f"{BLOCK} so {BLOCK}", "no", BLOCK + "<|latent_start|><|latent_pad|>", ""]
    answers = [{"ids": [0] * n, "cut": n == 9, "text": text} for n, text in zip((5, 2, 9, 1), texts)]
    scored = [[(1.0, 1.0), (1.0, 0.0)], [(0.0, 1.0), (0.0, 1.0)]]
    rewards = torch.tensor([[1.2, 1.0], [0.2, 0.2]])
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 5:] = False  # 14 of 18
    batches = [{"is_real": real, "prompts": {"is_real": real[:1]}}, {"is_real": real}]
    sums = answer_sums(scored, rewards, [answers[:2], answers[2:]], batches)
    expected = {"reward": 2.6, "acc": 2, "fmt": 3, "length": 17, "cut": 1, "blocks": 4, "spread": 1}
    expected |= {"real": 14 + 5 + 14, "places": 18 + 9 + 18}
    assert sums == pytest.approx(expected)


def test_sums_over_tokens_by_hand():
    """Ratios 1, 1.25, 0.7, 0.85 and ε = 0.2: two of four are beyond the band."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    ratio, divergence = torch.tensor([1.0, 1.25, 0.7, 0.85]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    sums = token_sums(logp.sum(), logp, ratio, divergence, 0.2)
    assert sums.tolist() == pytest.approx([-10, 3.8, 2, 1.0, 10, 4], abs=1e-6)
    assert sums.dtype == torch.float64 and not sums.requires_grad


def test_a_line_of_the_log_puts_the_reward_first():
    entry = {"step": 12, "reward": 0.65, "acc": 0.6, "fmt": 0.25, "spread": 5.0, "groups": 8, "length": 80.4}
    entry |= {
        "cut": 0.125,
        "blocks": 2.0,
        "ratio": 1.0,
        "clip": 0.0,
        "kl": 0.01,
        "entropy": 1.5,
        "loss": -0.02,
    }
    entry |= {"gnorm": 0.9, "lr": 1e-5, "seconds": 2.0, "rollout": 3.5, "update": 7.0, "holdout": 0.5}
    line = log_line(entry, 200, 1.0, 0.2)
    assert line.startswith("step    12/200 | reward 0.650 = 1 x acc 0.60 + 0.2 x fmt 0.25 | spread 5/8 |")
    for part in ("length 80", "cut 0.12", "imagery 2.0", "ratio 1.000", "clip 0.000", "kl 0.0100"):
        assert f" {part} |" in line
    for part in ("entropy 1.500 ", "lr 1.0e-05", "rollout 3.50k tok/s", "update 7.00k tok/s"):
        assert part in line


def test_a_sample_answer_is_shown_with_its_imagery_and_reward():
    made = {"text": GOOD.replace(BLOCK, BLOCK + " and <|latent_start|><|latent_pad|>"), "cut": True}
    lines = shown(ROW, made, (1.0, 0.0), 1.0).splitlines()
    assert lines[0] == "--- q7 | key B | reward 1.00 (acc 1, fmt 0) | cut off"
    assert lines[1].startswith("<think>It {imagery x 2} and {imagery x 1} turns.</think>")
    assert "cut off" not in shown(ROW, made | {"cut": False}, (1.0, 0.0), 1.0)


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


def assert_equal_runs(mine, theirs):
    """Logs and weights to 1e-5, times and padding aside."""
    assert len(mine[0]) == len(theirs[0]) > 0
    for one, other in zip(mine[0], theirs[0]):
        assert one.keys() == other.keys()
        for name in one.keys() - set(UNLIKE):
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-5), name
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
    for entry in log:
        assert all(math.isfinite(value) for value in entry.values())
        assert entry["reward"] == pytest.approx(entry["acc"] + 0.2 * entry["fmt"]) and entry["acc"] > 0
        assert entry["ratio"] == pytest.approx(1, abs=1e-6) and entry["clip"] == 0
        assert entry["spread"] >= 2 and 0 < entry["cut"] < 1 and entry["blocks"] > 0
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


def naive_loss(policy, reference, prompts, made, A, old, ratios):
    """Eq. 10 answer by answer and token by token; ε = 0.15, β = 0.5, G = 3; fills `old` if it is empty."""
    loss = torch.zeros(())
    for i, answer in enumerate(made):
        if answer["cut"]:
            continue
        prompt, latents = prompts[i // 3], answer["latents"]
        logp = at_scored(policy, naive_logps(policy, prompt, answer, latents), answer)
        ref = at_scored(reference, naive_logps(reference, prompt, answer, latents), answer)
        old.setdefault(i, logp.tolist())
        for t in range(len(logp)):
            rho, d = (logp[t] - old[i][t]).exp(), ref[t] - logp[t]
            gain = torch.minimum(rho * A[i], rho.clamp(0.85, 1.15) * A[i])
            loss = loss - (gain - 0.5 * (d.exp() - d - 1)) / len(logp) / len(made)
            ratios.append(rho.item())
    return loss


def test_two_updates_of_a_rollout_equal_a_naive_loop(world, tmp_path, monkeypatch):
    """MU = 2: one rollout, whose old log-probs stay those of the first update."""
    rollouts, real = [], model_py.generate

    def recorded(*args, **kwargs):
        rollouts.append(real(*args, **kwargs))
        return rollouts[-1]

    monkeypatch.setattr(model_py, "generate", recorded)
    more = ["MU=2", "STEPS=1", "MICRO_BATCH=3", "EPSILON=0.15", "W_ACC=2", "LR=3e-4"]
    (entry,), _ = train(world, tmp_path / "run", *more)
    assert len(rollouts) == 1

    # the answers are those that the dice give at this temperature, from the full softmax
    policy, reference = load_model(world / "dift"), load_model(world / "other").requires_grad_(False)
    rows = read_rows(world / "rl.jsonl")
    asked = {
        index: encode_row(policy, rows[index], answer=False)
        for index in rows_of_step(0, len(rows), 4, seed=2)
    }
    chosen = sorted(asked, key=lambda index: len(asked[index]["ids"]))
    made, prompts = rollouts[0], [asked[index] for index in chosen]
    assert {(answer["cut"], len(answer["latents"]) > 0) for answer in made} >= {(True, True), (False, True)}
    generators = [dice(2, 0, index, number) for index in chosen for number in range(3)]
    same = real(policy, prompts, 20, temperature=HOT, generators=generators)
    assert [answer["ids"] for answer in same] == [answer["ids"] for answer in made]

    # rewards of FAKE's letters; answers that were cut off count in the mean and the std
    keys, A = [rows[index]["key"] for index in chosen for _ in range(3)], []
    rewards = [2.0 * ("ABCD"[len(answer["text"]) % 4] == key) for answer, key in zip(made, keys)]
    for group in (rewards[at : at + 3] for at in range(0, 12, 3)):
        A += [(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4) for r in group]

    policy.net.model.visual.requires_grad_(False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer, old, ratios, losses = torch.optim.AdamW(trained, 3e-4, weight_decay=0.0), {}, [], []
    for _ in range(2):
        loss = naive_loss(policy, reference, prompts, made, A, old, ratios)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    clipped = sum(abs(ratio - 1) > 0.15 for ratio in ratios)
    assert entry["reward"] == pytest.approx(statistics.mean(rewards)) and len(set(A)) >= 3
    assert entry["loss"] == pytest.approx(statistics.mean(losses), abs=1e-4)
    assert entry["ratio"] == pytest.approx(statistics.mean(ratios), abs=1e-4)
    assert entry["clip"] == pytest.approx(clipped / len(ratios)) and clipped > 0
    start, end = (load_model(path).net.state_dict() for path in (world / "dift", tmp_path / "run"))
    for name, weight in policy.net.state_dict().items():
        if "visual" not in name:  # where a gradient is next to nothing, AdamW makes much of its rounding
            assert (weight - end[name]).abs().mean() < 1e-6 < 1e-4 < (weight - start[name]).abs().mean()


@pytest.mark.parametrize("prefix", ["shared", "rows"])
def test_questions_that_cost_as_much_are_read_together(world, tmp_path, monkeypatch, prefix):
    """Longest answers of 40, 4, 41, 5 tokens: behind shared prompts 4 stands with 5 and 40 with 41."""
    lengths = [[40, 9, 2], [3, 4, 2], [41, 40, 3], [5, 5, 5]]  # in order of the prompts' lengths

    def made_up(model, prompts, *args, **kwargs):
        ids = [[30] * (n - 1) + [model.ids["im_end"]] for n in sum(lengths, [])]
        none = torch.zeros(0, model.net.config.text_config.hidden_size)
        flags = [{"is_latent": [False] * len(row), "is_sampled": [True] * len(row)} for row in ids]
        more = {"latents": none, "cut": False, "text": ""}
        return [{"ids": row} | flag | more for row, flag in zip(ids, flags)]

    monkeypatch.setattr(model_py, "generate", made_up)
    (entry,), _ = train(world, tmp_path / "run", "STEPS=1", "MICRO_BATCH=2", f"PREFIX={prefix}")

    policy, rows = load_model(world / "dift"), read_rows(world / "rl.jsonl")
    drawn = [encode_row(policy, rows[index], answer=False) for index in rows_of_step(0, len(rows), 4, seed=2)]
    prompts = sorted(len(prompt["ids"]) for prompt in drawn)

    def padding(*pairs):
        read = places = 0
        for pair in pairs:
            asked, made = [prompts[i] for i in pair], [lengths[i] for i in pair]
            if prefix == "shared":
                read += sum(asked) + sum(map(sum, made))
                places += 2 * max(asked) + 6 * max(map(max, made))
            else:
                read += 3 * sum(asked) + sum(map(sum, made))
                places += 6 * max(p + max(some) for p, some in zip(asked, made))
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
    said = capsys.readouterr().out
    assert "LR=0.001" in said and f"torch {torch.__version__}" in said and "first question:" in said
    assert said.count("\nstep ") == 3 and said.count("\n--- ") == 3 and "{imagery x 4}" in said
    assert "HOLDOUT after 2 steps: " in said and [entry["step"] for entry in whole if "holdout" in entry] == [
        2
    ]
    table = said[said.index("before %") :]
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

    real = model_py.os.replace

    def killed(source, target):
        if str(target).endswith("step_000002"):
            raise KeyboardInterrupt
        real(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_py.os, "replace", killed)
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
        assert [json.loads(line)["text"] for line in lines] == [made["text"] for made in greedy]
        texts.append([made["text"] for made in greedy])
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
    said = two_processes(tmp_path / "pair.py", *words(world, out, *more, *scored))
    assert said.count("2 x cpu") == 1 and said.count("| reward ") == said.count("compound, all") + 1 == 2
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


def test_the_folder_of_another_run_is_refused(world, tmp_path):
    out = tmp_path / "run"
    train(world, out, "STEPS=1", "GLOBAL_BATCH=2")
    for word in ("LR=0.5", "SEED=3", "G=4", "MU=2", "GLOBAL_BATCH=4", "MAX_NEW=8", "LATENT_REPLAY=False"):
        said = (f"{out}", f"{word.split('=')[0]}=", "RESUME=never")
        refused(lambda word=word: train(world, out, "GLOBAL_BATCH=2", word), *said)
    log, _ = train(world, out, "STEPS=1", "GLOBAL_BATCH=2", "RESUME=never", "LR=0.5")
    assert len(log) == 1 and log[0]["lr"] == 0.5


# ---------------------------------------------------------------- bad input: one sentence each


@pytest.mark.parametrize(
    "change, said",
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
        (["STEP=3"], "STEPS"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_constants_are_one_sentence(world, tmp_path, change, said):
    refused(lambda: train(world, tmp_path / "run", *change), said)
    assert not (tmp_path / "run").exists()


def test_a_global_batch_that_cannot_be_shared_is_one_sentence(world, tmp_path, monkeypatch):
    monkeypatch.setattr(model_py, "init_distributed", lambda: (0, 3, torch.device("cpu")))
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
    said = (f"REFERENCE={tmp_path / 'odd' / 'step_000001'}", "in shape")
    refused(lambda: train(world, tmp_path / "run", f"REFERENCE={tmp_path / 'odd'}"), *said)


def test_the_script_can_be_imported_without_running():
    assert "kept_on_resume" in runpy.run_path(str(ROOT / "grpo4d.py"), run_name="grpo4d")
