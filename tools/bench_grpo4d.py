"""Time and memory of one 4DRL step, ours against the common way, phase by phase, each in its own process.

    python -m tools.bench_grpo4d
    python -m tools.bench_grpo4d WAY=ours NEW=1024 PREFIX=rows REPEATS=1      # ours alone, longer answers

The step: rollout, reference pass, and the policy's forward and backward, without optimiser, of the random
45 M Qwen2.5-VL of bench_dift.py: one question of 470 tokens, 288 of them visual, 8 answers of 64 new tokens,
each with one or two latent blocks; float32, one thread. Both ways sample, but the answers are fixed
(draw_question).

Ours is what grpo4d.py does: vision once for all three phases, the prompt prefilled once for its answers
(while sampling and, with PREFIX=shared, in both passes of the update), logits only at supervised positions.
The common way is rows: in each phase 8 copies of the prompt and of its pixels go through the library's
modules, which encode the video 8 times, window by window. Each forward makes logits of the whole vocabulary
at every position, as Qwen2_5_VLForConditionalGeneration.forward does by default; while sampling,
behind a key-value cache, that is all of the prompt once, then one position a step (the library's generate
asks for the last position of the prompt alone: PROMPT_LOGITS=last). Then log_softmax and gather in float32,
Eq. 10 by a mask, and layer-wise activation checkpointing in the policy's pass, as in bench_dift.py; forbidden
ids are masked in place, and logits are released before the backward pass.

Both ways replay the latents of their own rollout; their log-probabilities, losses and gradients are compared.
The old log-probabilities are the reference's, which is the policy disturbed: so ratios differ from 1,
clipping and KL have something to do, and the loss is not 0. Time is the process's own (on an idle core that
is the clock's, which is printed too). Memory is the peak of a phase above what the process holds after its
imports (where a kernel cannot reset the peak, the largest so far).
"""

import copy
import itertools
import json
from unittest import mock

import torch
from transformers import DynamicCache

import model
from grpo4d import Group, advantages, grpo_loss, pack
from lib.command_line import override_constants, require
from lib.fast import checkpoint_layers
from model import Sample, collate, generate, rope_positions
from tools.bench_dift import RandomVision, build_network, build_thinker, describe_network
from tools.bench_dift import draw_patches, held_memory, make_case, measure_rounds
from tools.bench_dift import print_goals, require_same, run_ways

WAY = "both"  # both | naive (the common way) | ours
SIZE = "45M"  # tiny | 45M | 3B | 7B: shapes with random weights
REPEATS = 3  # >= 0; after one step to warm up; the median counts; 0: that one step
THREADS = 1  # 1 to 1000; of the CPU
G = 8  # >= 2; answers to the question
NEW = 64  # >= 1; positions of an answer, latents and the end of turn included
BEFORE = 20  # >= 1; words of the prompt before the video
AFTER = 162  # >= 1; and after it
PREFIX = "shared"  # shared | rows; of ours
CHECKPOINTING = False  # of ours, with PREFIX=rows
FAST = True  # of ours; False: exactly the code of model.py
PROMPT_LOGITS = "all"  # all | last; of naive, while sampling
EPSILON = 0.2  # 0 to 1; ε of Eq. 10
BETA = 0.01  # >= 0; β of Eq. 10
TIME_GOAL = 1 / 4.5  # > 0; of the common way
MEMORY_GOAL = 0.4  # > 0; of the common way
JSON = False  # prints the figures of one way as a line of JSON: how the processes report

some_rewards = (0.0, 1.2, 1.0, 0.2, 0.0, 0.2, 1.2, 1.0)  # of the answers, repeated for another G


def require_room(case):
    """Ends the program if answers are too short for two latent blocks."""
    least = 8 * (case.K + 2)
    needs = f"set it to {least} or more"
    require(case.new >= least, f"NEW={case.new} leaves no room for two latent blocks; {needs}.")


# ---------------------------------------------------------------- two networks, a question and its answers


def build_policy_and_reference(case, device="cpu"):
    """Two networks, the same in all processes; the reference is the policy, disturbed."""
    policy = build_network(case, device)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(2)
    for weight in frozen.model.language_model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.01)
    return policy, frozen


def draw_question(case):
    """The prompt as a Sample, the patches of its video, and the ids (G, new) of the answers.

    An answer is random words with a latent block near its first quarter, every other one with a second block
    past its half, and the end of turn in its last place: w <start> . . . . <end> w w w … w <im_end>.
    """
    torch.manual_seed(1)
    token_id = case.token_id

    # the prompt: words, video, words
    positions = rope_positions([case.before, case.video_segment, case.question_after], 2)  # (3, T)
    T = positions.shape[1]
    words = torch.randint(0, token_id["endoftext"], (T,))
    none = torch.zeros(T, dtype=torch.bool)
    is_visual = none.clone()
    is_visual[case.before : T - case.question_after] = True
    prompt = Sample(
        ids=words.masked_fill(is_visual, token_id["video_pad"]),
        positions=positions,
        is_text=none,
        is_latent=none,
        is_visual=is_visual,
        is_real=~none,
        video=("video",),
        source="row",
    )

    # the answers: words, in which blocks are put
    block = [token_id["latent_start"], *[token_id["latent_pad"]] * case.K, token_id["latent_end"]]
    answers = torch.randint(0, token_id["endoftext"], (case.G, case.new))  # (G, new)
    for number, answer in enumerate(answers):
        starts = [case.new // 4 + number % 8]
        if number % 2 == 1:
            starts.append(case.new // 2 + number % 8)
        for start in starts:
            answer[start : start + len(block)] = torch.tensor(block)
        answer[-1] = token_id["im_end"]
    return prompt, draw_patches({("video",): case.video_grid}), answers


def rewards_of(case):
    """A reward for each answer -> (1, G)."""
    rewards = itertools.islice(itertools.cycle(some_rewards), case.G)
    return torch.tensor([list(rewards)])


def scripted(answers):
    """A context in which sampling takes the time that it takes, and then returns these answers (G, new)."""
    sample = model.sample_token
    columns = iter(answers.T)

    def sample_token(*inputs):
        """Samples as ever, and returns the next column."""
        sample(*inputs)
        return next(columns)

    return mock.patch.object(model, "sample_token", sample_token)


# ---------------------------------------------------------------- the two ways


def our_phases(policy, frozen, case, c):
    """The phases as grpo4d.py has them -> {name: call}; each call is given what the last one returned."""
    thinker = build_thinker(policy, case, c.FAST)
    reference = build_thinker(frozen, case, c.FAST).eval()
    thinker.qwen.model.visual = reference.qwen.model.visual  # one frozen copy, as in grpo4d.py
    if c.CHECKPOINTING:
        checkpoint_layers(policy)
    prompt, patches, answers = draw_question(case)
    answers = answers.to(thinker.device)
    vision = RandomVision(thinker, patches)
    advantage = advantages(rewards_of(case))[0].to(thinker.device)  # (G,)

    def rollout():
        """Samples the answers -> batch and latents for the update."""
        vision.clear()  # a step meets a new video
        thinker.eval()
        generators = [torch.Generator().manual_seed(number) for number in range(case.G)]
        with scripted(answers):
            completions = generate(thinker, [prompt], case.new, vision, 1.0, generators=generators)
        written = [completion.ids for completion in completions]
        require(written == answers.tolist(), "generate did not write what was sampled.")
        return pack(thinker, vision, [Group(0, prompt, completions)], c.PREFIX, True)

    def reference_pass(batch, latents):
        """Adds the log-probabilities under the reference."""
        with torch.no_grad():
            return batch, latents, reference(batch, latents, True, 1.0)[0]

    def policy_pass(batch, latents, ref):
        """Forward and backward -> loss, log-probabilities (n,)."""
        thinker.train(c.CHECKPOINTING)
        logp = thinker(batch, latents, True, 1.0)[0]  # (n,)
        answer = batch.text_at // batch.ids.shape[1]  # (n,)
        loss, _, _ = grpo_loss(logp, ref, ref, advantage, answer, case.G, c.EPSILON, c.BETA)
        loss.backward()
        return loss, logp

    return {"rollout": rollout, "reference": reference_pass, "policy": policy_pass}


class NaiveRows:
    """G rows of prompt and answer, as the library's modules take them."""

    def __init__(self, case, device):
        token_id = case.token_id
        prompt, patches, answers = draw_question(case)
        prompts = collate([prompt] * case.G, token_id["endoftext"])
        pixels, grid = patches[("video",)]

        # what the rows show
        self.video_pad = token_id["video_pad"]
        self.pixels = pixels.repeat(case.G, 1).to(device)
        self.grids = torch.tensor([grid] * case.G, device=device)
        # their tokens, and where latents and supervised tokens are
        ids = torch.cat([prompts.ids, answers], dim=1)  # (G, T)
        self.start = prompts.ids.shape[1]  # of the answers
        is_latent = ids == token_id["latent_pad"]
        is_answer = torch.arange(ids.shape[1]) >= self.start
        is_text = is_answer & ~is_latent & (ids != token_id["latent_end"])
        self.ids = ids.to(device)
        self.is_latent = is_latent.to(device)
        self.is_text = is_text.to(device)
        # answers go on after the prompt's largest position
        after = prompt.positions.max() + 1 + torch.arange(case.new)
        after = after.expand(3, case.G, -1)
        self.positions = torch.cat([prompts.positions, after], dim=2).to(device)  # (3, G, T)
        # what may not be sampled
        forbidden = [token_id[name] for name in ("latent_pad", "latent_end", "image_pad", "video_pad")]
        self.forbidden_ids = torch.tensor(forbidden, device=device)

    def embed(self, qwen, ids):
        """Embeddings of rows that begin with the prompt; each row's video is encoded."""
        features = qwen.model.visual(self.pixels, grid_thw=self.grids).pooler_output
        x = qwen.get_input_embeddings()(ids)
        is_visual = ids == self.video_pad
        return x.masked_scatter(is_visual[..., None], features.to(x.dtype))

    def log_probs(self, qwen, latents):
        """Log-probabilities (G, T - 1) of all tokens but the first."""
        x = self.embed(qwen, self.ids)
        x = x.masked_scatter(self.is_latent[..., None], latents.to(x.dtype))
        output = qwen.model(inputs_embeds=x, position_ids=self.positions, use_cache=False)
        logits = qwen.lm_head(output.last_hidden_state).float()  # (G, T, V)
        logits = logits.index_fill_(-1, self.forbidden_ids, -torch.inf)
        following = self.ids.roll(-1, dims=1)[..., None]
        return logits.log_softmax(dim=-1).gather(-1, following)[:, :-1, 0]


@torch.no_grad()
def naive_rollout(policy, rows, prompt_logits):
    """Writes the answers behind a key-value cache -> (latents (n, D),)."""
    policy.eval()
    past = DynamicCache(config=policy.config.text_config)
    x = rows.embed(policy, rows.ids[:, : rows.start])  # (G, T, D), then one position a step
    at = 0
    inputs = []
    for _ in range(rows.ids.shape[1] - rows.start):
        positions = rows.positions[..., at : at + x.shape[1]]
        output = policy.model(inputs_embeds=x, position_ids=positions, past_key_values=past, use_cache=True)
        hidden = output.last_hidden_state  # (G, T or 1, D)
        at += x.shape[1]
        read = hidden if prompt_logits == "all" else hidden[:, -1:]
        logits = policy.lm_head(read).float()[:, -1]
        logits = logits.index_fill(-1, rows.forbidden_ids, -torch.inf)  # (G, V)
        # a token is sampled, but what stands in the answer is fixed
        torch.multinomial(logits.softmax(dim=-1), 1)
        embedded = policy.get_input_embeddings()(rows.ids[:, at])
        x = torch.where(rows.is_latent[:, at, None], hidden[:, -1], embedded)[:, None]
        inputs.append(x)
    is_latent = rows.is_latent[:, rows.start :]
    return (torch.cat(inputs, dim=1)[is_latent],)


def naive_phases(policy, frozen, case, c):
    """The phases of the common way -> {name: call}; each call is given what the last one returned."""
    checkpoint_layers(policy)
    rows = NaiveRows(case, policy.device)
    rewards = rewards_of(case)[0].to(policy.device)
    A = (rewards - rewards.mean()) / (rewards.std() + 1e-4)  # (G,)
    A = A[:, None]

    def rollout():
        """Samples the answers -> (latents,)."""
        return naive_rollout(policy, rows, c.PROMPT_LOGITS)

    def reference_pass(latents):
        """Adds the log-probabilities under the reference."""
        with torch.no_grad():
            return latents, rows.log_probs(frozen, latents)

    def policy_pass(latents, ref):
        """Forward and backward by Eq. 10 with a mask -> loss, log-probabilities (n,)."""
        policy.train()
        logp = rows.log_probs(policy, latents)
        is_text = rows.is_text[:, 1:]  # (G, T - 1)
        # forbidden ids stand in the prompt: -inf there
        ref = ref.where(is_text, 0)
        kept = logp.where(is_text, 0)
        ratio = (kept - ref).exp()
        d = ref - kept
        gain = torch.minimum(ratio * A, ratio.clamp(1 - c.EPSILON, 1 + c.EPSILON) * A)
        each = (gain - c.BETA * (d.exp() - d - 1)) * is_text
        loss = -(each.sum(dim=1) / is_text.sum(dim=1)).mean()
        loss.backward()
        return loss, logp[is_text]

    return {"rollout": rollout, "reference": reference_pass, "policy": policy_pass}


# ---------------------------------------------------------------- figures


def measure(case, c):
    """Runs one way in this process -> its figures; "phases": {name: Usage as a dict}."""
    torch.set_num_threads(c.THREADS)
    start = held_memory()
    policy, frozen = build_policy_and_reference(case)
    make = naive_phases if c.WAY == "naive" else our_phases
    calls = make(policy, frozen, case, c)
    usages, (loss, logp) = measure_rounds(policy, calls, c.REPEATS, torch.device("cpu"), start)
    phases = {name: vars(usage) for name, usage in usages.items()}
    return {"loss": loss.item(), "logp": logp.tolist(), "phases": phases, **describe_network(policy)}


def add_step(phases):
    """The phases and, as "step", all of them: the sum of their times and the largest of their peaks."""
    step = {name: sum(usage[name] for usage in phases.values()) for name in ("seconds", "clock")}
    step["bytes"] = max(usage["bytes"] for usage in phases.values())
    return {**phases, "step": step}


def print_way(phases):
    """Prints one way's figures by phase."""
    for name, usage in phases.items():
        line = "{:10}{seconds:10.2f} s ({clock:.2f} s by the clock){:10.0f} MiB"
        print(line.format(name, usage["bytes"] / 2**20, **usage))


def print_both(naive, ours):
    """Prints naive against ours by phase."""
    titles = ("own seconds", "seconds by the clock", "peak MiB")
    print(" " * 10 + "".join(f"{title:>28}" for title in titles))
    print("phase     " + "     naive      ours  ratio " * 3)
    for name in naive:
        line = f"{name:10}"
        for column in ("seconds", "clock"):
            a, b = naive[name][column], ours[name][column]
            line += f"{a:10.2f}{b:10.2f}{b / a:7.3f} "
        a, b = naive[name]["bytes"], ours[name]["bytes"]
        print(f"{line}{a / 2**20:10.0f}{b / 2**20:10.0f}{b / a:7.3f}")


def require_same_log_probs(naive, ours):
    """Ends the program unless both ways gave each supervised token the same log-probability."""
    same_length = len(naive) == len(ours)
    require(same_length, f"The two ways supervise {len(naive)} and {len(ours)} tokens.")
    difference = max(abs(a - b) for a, b in zip(naive, ours))
    require(difference < 1e-4, f"The log-probabilities of the two ways differ by {difference}.")


def main():
    """Measures the ways, compares what they computed and prints the figures."""
    c = override_constants(globals())
    has_cache = c.PREFIX == "rows" or not c.CHECKPOINTING
    require(has_cache, "CHECKPOINTING=True drops the prompt's cache; set PREFIX=rows.")
    case = make_case(c.SIZE, before=c.BEFORE, question_after=c.AFTER, G=c.G, new=c.NEW)
    require_room(case)
    if c.JSON:
        print(json.dumps(measure(case, c)))
        return

    results = run_ways("tools.bench_grpo4d", c)
    for way, figures in results.items():
        head = f"{way:6} {figures['weights'] / 1e6:.1f} M weights, {len(figures['logp'])} supervised tokens"
        print("{}, loss {loss:.6f}, gradient {gradient:.6f}".format(head, **figures))
    tables = {way: add_step(figures["phases"]) for way, figures in results.items()}
    if c.WAY != "both":
        print_way(tables[c.WAY])
        return
    naive, ours = results["naive"], results["ours"]
    require_same_log_probs(naive["logp"], ours["logp"])
    require_same(naive, ours)
    print_both(**tables)
    print_goals(tables["naive"]["step"], tables["ours"]["step"], c)


if __name__ == "__main__":
    main()
