"""Time and memory of one 4DRL step, ours against the common way, phase by phase, each in its own process.

    python tests/bench_grpo4d.py
    python tests/bench_grpo4d.py WAY=ours NEW=1024 PREFIX=rows REPEATS=1      # ours alone, longer answers

The step: rollout, reference pass, and the policy's forward and backward, without optimiser, of the random
45 M Qwen2.5-VL of bench_dift.py: one question of 470 tokens, 288 of them visual, 8 answers of 64 new tokens,
each with one or two latent blocks; float32, one thread. Both ways sample, but what they say is fixed (draw).

Ours is what grpo4d.py does: vision once for all three phases, the prompt prefilled once for its answers
(while sampling and, with PREFIX=shared, in both passes of the update), logits only at supervised positions.
The common way is rows: in each phase 8 copies of the prompt and of its pixels go through the library's
modules, which encode the video 8 times, window by window. Each forward makes logits of the whole vocabulary
at every position, as Qwen2_5_VLForConditionalGeneration.forward does unless told otherwise; while sampling,
behind a key-value cache, that is all of the prompt once, then one position a step (the library's generate
asks for the last position of the prompt alone: PROMPT_LOGITS=last). Then log_softmax and gather in float32,
Eq. 10 by a mask, and layer-wise activation checkpointing in the policy's pass, as in bench_dift.py; banned
ids are masked in place, and logits are let go before the backward pass.

Both ways replay the latents of their own rollout; their log-probabilities, losses and gradients are compared.
The old log-probabilities are the reference's, which is the policy disturbed: so ratios differ from 1,
clipping and KL have something to do, and the loss is not 0. Time is the process's own (on an idle core that
is the clock's, which is printed too). Memory is the peak above what the process holds after its imports, and
of a phase where the kernel lets a process reset that peak.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from transformers import DynamicCache

import bench_dift
import model as model_file
from grpo4d import advantages, grpo_loss, pack
from model import Images, Thinker, check, checkpoint_layers, collate, generate, rope_positions, set_constants

WAY = "both"  # both | naive | ours
REPEATS = 3  # after one step to warm up; the median counts; 0: that one step
G = 8  # answers to the question
NEW = 64  # positions of an answer, latents and the end of turn included
BEFORE = 20  # words of the prompt before the video
AFTER = 162  # and after it
PREFIX = "shared"  # of ours: shared | rows
CHECKPOINTING = False  # of ours, with PREFIX=rows
PROMPT_LOGITS = "all"  # of naive, while sampling: all | last
EPSILON = 0.2  # ε of Eq. 10
BETA = 0.01  # β of Eq. 10
TIME_GOAL = 1 / 4.5  # of the common way
MEMORY_GOAL = 0.4  # of the common way
JSON = False  # prints the figures of one side as a line of JSON: how the two processes report

phases_of_a_step = ("rollout", "reference", "policy")
video_grid = (bench_dift.PAIRS, 2 * bench_dift.HEIGHT, 2 * bench_dift.WIDTH)  # patches of the video
some_rewards = [0.0, 1.2, 1.0, 0.2, 0.0, 0.2, 1.2, 1.0]  # rewards, repeated for other G


class Words(bench_dift.Words):
    """Stands in for a tokenizer: ids of special tokens, and no text."""

    def decode(self, ids):
        """An answer as text: not looked at here."""
        return ""


class Pixels(Images):
    """Images whose videos are random patches instead of files."""

    pixels = None  # (P, d)

    def load(self, items, where):
        """The video's patches and grid, whatever its name; once for each name."""
        return {"pixels": self.pixels.repeat(len(items), 1), "grids": [video_grid] * len(items)}


def nets():
    """Policy and reference, the same in both processes; the reference is the policy, disturbed."""
    policy = bench_dift.build()
    policy.config.latent_norm = None  # hidden states are fed back as they are
    frozen = copy.deepcopy(policy).requires_grad_(False)
    torch.manual_seed(2)
    for weight in frozen.model.language_model.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.01)
    return policy, frozen


def draw():
    """The prompt as encode_row gives it, the video's patches, and the ids (G, NEW) of the answers.

    An answer is random words with a latent block near its first quarter, every other one with a second block
    past its half, and the end of turn in its last place: w <start> . . . . <end> w w w … w <im_end>.
    """
    torch.manual_seed(1)
    ids, K = bench_dift.IDS, bench_dift.K
    seconds = [2.0 * pair for pair in range(bench_dift.PAIRS)]
    segments = [BEFORE, (seconds, bench_dift.HEIGHT, bench_dift.WIDTH), AFTER]
    positions = rope_positions(segments, 2)  # (3, T)
    words = torch.randint(0, ids["endoftext"], (positions.shape[1],))
    no = torch.zeros(len(words), dtype=torch.bool)
    is_visual = no.clone()
    is_visual[BEFORE : len(words) - AFTER] = True
    prompt = {"ids": words.masked_fill(is_visual, ids["video_pad"]), "positions": positions}
    prompt |= {"is_text": no, "is_latent": no, "is_visual": is_visual, "is_real": ~no}
    prompt |= {"video": ("video",), "overlays": (), "where": "row"}
    block = torch.tensor([ids["latent_start"], *[ids["latent_pad"]] * K, ids["latent_end"]])
    answers = torch.randint(0, ids["endoftext"], (G, NEW))  # (G, NEW)
    for number, answer in enumerate(answers):
        for first in (NEW // 4 + number % 8, NEW // 2 + number % 8)[: 1 + number % 2]:
            answer[first : first + len(block)] = block
        answer[-1] = ids["im_end"]
    return prompt, torch.randn(math.prod(video_grid), 3 * 2 * 14 * 14), answers


def our_phases(policy, frozen, prompt, pixels, answers):
    """grpo4d.py's: three functions, of which the later take what the first made."""
    core, reference = Thinker(policy, Words()), Thinker(frozen, Words()).eval()
    for thinker in (core, reference):
        thinker.to(torch.get_default_device())
    core.net.model.visual = reference.net.model.visual  # one frozen copy, as in grpo4d.py
    if CHECKPOINTING:
        checkpoint_layers(policy)
    images, sample, script = Pixels(core, cache=True), model_file.pick, itertools.cycle(answers.T)
    images.pixels = pixels

    def say(*how):
        """Samples, as ever, then says what is fixed."""
        sample(*how)
        return next(script)

    model_file.pick = say
    advantage = advantages(torch.tensor([(some_rewards * G)[:G]]))[0]  # (G,)

    def rollout():
        images.kept.clear()  # a step meets a new video
        core.eval()
        generators = [torch.Generator(torch.get_default_device()).manual_seed(number) for number in range(G)]
        made = generate(core, [prompt], NEW, images, 1.0, generators=generators)
        assert torch.equal(torch.tensor([one["ids"] for one in made]), answers)
        return pack(core, images, [prompt], [made], PREFIX, True)

    def refer(batch, latents):
        with torch.no_grad():
            return reference(batch, latents, True, 1.0)[0]

    def update(batch, latents, ref):
        core.train(CHECKPOINTING)
        logp = core(batch, latents, True, 1.0)[0]  # (n,)
        answer = batch["is_text"].nonzero()[:, 0]  # (n,)
        loss, _, _ = grpo_loss(logp, ref, ref, advantage, answer, G, EPSILON, BETA)
        loss.backward()
        return loss, logp

    return rollout, refer, update


def naive_phases(policy, frozen, prompt, pixels, answers):
    """The common way: the library's modules over whole rows."""
    checkpoint_layers(policy)
    special, grid = bench_dift.IDS, torch.tensor([video_grid])
    banned = torch.tensor([special[name] for name in ("latent_pad", "latent_end", "image_pad", "video_pad")])
    rows = collate([prompt] * G, special["endoftext"])  # the prompt, G times
    asked, last = rows["ids"].shape[1], prompt["positions"].max()
    ids = torch.cat([rows["ids"], answers], dim=1)  # (G, T)
    is_latent = ids == special["latent_pad"]
    is_text = (torch.arange(ids.shape[1]) >= asked) & ~is_latent & (ids != special["latent_end"])
    after = (last + 1 + torch.arange(NEW)).expand(3, G, -1)
    positions = torch.cat([rows["positions"], after], dim=2)  # (3, G, T)
    score = torch.tensor((some_rewards * G)[:G])
    A = (score - score.mean()) / (score.std() + 1e-4)  # (G,)

    def embed(net, ids):
        """Embeddings of rows that begin with the prompt; each row's video is encoded."""
        features = net.model.visual(pixels.repeat(G, 1), grid_thw=grid.repeat(G, 1)).pooler_output
        x, is_visual = net.get_input_embeddings()(ids), ids == special["video_pad"]
        return x.masked_scatter(is_visual[..., None], features)

    @torch.no_grad()
    def rollout():
        policy.eval()
        past, x, at, fed = DynamicCache(config=policy.config.text_config), embed(policy, rows["ids"]), 0, []
        for _ in range(NEW):
            where = positions[..., at : at + x.shape[1]]
            out = policy.model(inputs_embeds=x, position_ids=where, past_key_values=past, use_cache=True)
            hidden, at = out.last_hidden_state, at + x.shape[1]  # (G, T or 1, D)
            logits = policy.lm_head(hidden if PROMPT_LOGITS == "all" else hidden[:, -1:]).float()
            logits = logits[:, -1].index_fill(-1, banned, -torch.inf)  # (G, V)
            torch.multinomial(logits.softmax(dim=-1), 1)  # sampled; what is said is fixed
            inside = is_latent[:, at, None]
            x = torch.where(inside, hidden[:, -1], policy.get_input_embeddings()(ids[:, at]))[:, None]
            fed.append(x)
        return (torch.cat(fed, dim=1)[is_latent[:, asked:]],)  # (n_latent, D)

    def logps(net, latents):
        """Log-probabilities (G, T - 1) of all tokens but the first."""
        x = embed(net, ids).masked_scatter(is_latent[..., None], latents)
        hidden = net.model(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
        logits = net.lm_head(hidden).float().index_fill_(-1, banned, -torch.inf)  # (G, T, V)
        return logits.log_softmax(dim=-1).gather(-1, ids.roll(-1, dims=1)[..., None])[:, :-1, 0]

    def refer(latents):
        with torch.no_grad():
            return logps(frozen, latents)

    def update(latents, ref):
        policy.train()
        logp, mask = logps(policy, latents), is_text[:, 1:]  # (G, T - 1)
        ref = ref.where(mask, 0)
        kept = logp.where(mask, 0)  # banned ids stand in the prompt: -inf there
        ratio, d = (kept - ref).exp(), ref - kept
        gain = torch.minimum(ratio * A[:, None], ratio.clamp(1 - EPSILON, 1 + EPSILON) * A[:, None])
        each = (gain - BETA * (d.exp() - d - 1)) * mask
        loss = -(each.sum(dim=1) / mask.sum(dim=1)).mean()
        loss.backward()
        return loss, logp[mask]

    return rollout, refer, update


def peak(reset=False):
    """The largest number of bytes that this process has held since the last reset."""
    if reset:
        with contextlib.suppress(OSError):  # a kernel that does not reset: since it began
            Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(make):
    """Runs one way in this process -> {"rollout": [seconds, clock, bytes], ..., "loss", ...}."""
    torch.set_num_threads(1)
    start, figures = bench_dift.memory(), {name: [] for name in phases_of_a_step}
    policy, frozen = nets()
    phases = make(policy, frozen, *draw())

    def timed(name, phase, *given):
        peak(reset=True)
        began, clock_began = time.process_time(), time.perf_counter()
        result = phase(*given)
        seconds, clock = time.process_time() - began, time.perf_counter() - clock_began
        figures[name].append([seconds, clock, peak() - start])
        return result

    for _ in range(1 + REPEATS):
        policy.zero_grad(set_to_none=True)
        made = timed("rollout", phases[0])
        ref = timed("reference", phases[1], *made)
        loss, logp = timed("policy", phases[2], *made, ref)
    gradient = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
    weights = sum(weight.numel() for weight in policy.parameters())
    result = {"loss": loss.item(), "logp": logp.tolist(), "gradient": gradient, "weights": weights}
    return result | {name: list(zip(*(lines[1:] or lines))) for name, lines in figures.items()}


def summary(result):
    """One side's figures -> {phase or "step": (seconds, clock, MiB)}; times medians, memory the largest."""
    table = {}
    for name in phases_of_a_step:
        seconds, clock, held = result[name]
        table[name] = (statistics.median(seconds), statistics.median(clock), max(held) / 2**20)
    *times, held = zip(*table.values())
    return table | {"step": (*(sum(column) for column in times), max(held))}


def compare(naive, ours):
    """Prints naive against ours by phase, and whether the goals are met."""
    print(" " * 10 + "".join(f"{title:>28}" for title in ("own seconds", "seconds by the clock", "peak MiB")))
    print(f"{'phase':10}" + 3 * "{:>10}{:>10}{:>7} ".format("naive", "ours", "ratio"))
    for name in naive:
        cells = [f"{a:10.2f}{b:10.2f}{b / a:7.3f} " for a, b in zip(naive[name][:2], ours[name])]
        a, b = naive[name][2], ours[name][2]
        print(f"{name:10}" + "".join(cells) + f"{a:10.0f}{b:10.0f}{b / a:7.3f}")
    for name, column, goal in (("seconds", 0, TIME_GOAL), ("bytes", 2, MEMORY_GOAL)):
        ratio = ours["step"][column] / naive["step"][column]
        print(f"{name:8} ratio {ratio:.3f}, goal {goal:.3f}: {'reached' if ratio <= goal else 'missed'}")


if __name__ == "__main__":
    constants = set_constants(globals())
    ways = {"naive": naive_phases, "ours": our_phases}
    for name, known in {
        "WAY": "both naive ours",
        "PREFIX": "shared rows",
        "PROMPT_LOGITS": "all last",
    }.items():
        check(constants[name] in known.split(), f"{name}={constants[name]} is none of: {known}.")
    check(
        PREFIX == "rows" or not CHECKPOINTING, "CHECKPOINTING=True drops the prompt's cache; set PREFIX=rows."
    )
    check(NEW >= 8 * (bench_dift.K + 2) and G >= 2, f"NEW={NEW} G={G}: too few for latent blocks in groups.")
    if JSON:
        print(json.dumps(measure(ways[WAY])))
        sys.exit()
    results = {}
    for way in ways if WAY == "both" else [WAY]:
        command = [sys.executable, __file__, *sys.argv[1:], f"WAY={way}", "JSON=True"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        results[way] = json.loads(done.stdout.splitlines()[-1])
    for way, one in results.items():
        print(f"{way:6} {one['weights'] / 1e6:.1f} M weights, {len(one['logp'])} supervised tokens, ", end="")
        print(f"loss {one['loss']:.6f}, gradient {one['gradient']:.6f}")
    tables = {way: summary(one) for way, one in results.items()}
    if WAY != "both":
        for name, (seconds, clock, held) in tables[WAY].items():
            print(f"{name:10}{seconds:10.2f} s ({clock:.2f} s by the clock){held:10.0f} MiB")
        sys.exit()
    naive, ours = results["naive"], results["ours"]
    far = max(abs(a - b) for a, b in zip(naive["logp"], ours["logp"]))
    assert len(naive["logp"]) == len(ours["logp"]) and far < 1e-4, f"log-probabilities differ by {far}"
    assert abs(ours["loss"] - naive["loss"]) < 1e-4, "the two ways compute different losses"
    assert abs(ours["gradient"] / naive["gradient"] - 1) < 1e-4, "the two ways compute different gradients"
    compare(tables["naive"], tables["ours"])
