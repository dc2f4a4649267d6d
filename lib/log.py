"""What the training scripts print and sum for their logs."""

import itertools
import math
import re

import torch
import transformers

from lib.distributed import print0
from lib.rows import LATENT_BLOCK


def print_header(c, trained, world, device):
    """Prints versions, devices, the number of trained weights, and all constants."""
    millions = sum(parameter.numel() for parameter in trained) / 1e6
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print0(f"{versions} | {world} x {device} | {millions:.2f} M trained weights")
    print0(" ".join(f"{name}={value}" for name, value in vars(c).items()))


def describe_sample(sample, tokenizer):
    """A sample as text, run by run: what is neither supervised nor imagery, [supervised], {imagery}."""
    frames = ("{}", "[{}]", "{{{}}}")
    kinds = torch.where(sample.is_latent, 2, sample.is_text.long()).tolist()
    parts = []
    for kind, places in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        text = tokenizer.decode(sample.ids[list(places)])
        parts.append(frames[kind].format(text))

    # a video's pads are counted, not printed
    pad = "<|video_pad|>"
    return re.sub(r"(<\|video_pad\|>)+", lambda pads: f"{pad} x {len(pads[0]) // len(pad)}", "".join(parts))


@torch.no_grad()
def add_sums(sums, values):
    """Adds named numbers or tensors () to running sums of the same names."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def weighted_terms(entry, names, weights, digits=4):
    """Parts of a loss or a reward as text: "1 x ce 0.1321 + 0.3 x sim 0.0210"."""
    parts = []
    for name in names:
        weight = f"{weights[name]:.3g} x " if name in weights else ""
        parts.append(f"{weight}{name} {entry[name]:.{digits}f}")
    return " + ".join(parts)


def is_due(step, every, steps):
    """Whether something done every so many steps is due after this step (from 0); after the last it is."""
    is_last = step + 1 == steps
    return is_last or (every > 0 and (step + 1) % every == 0)


def padding_sums(batches):
    """Tokens that some Batches and their prompts hold: real ones, and all places with the padding."""
    sums = {"real": 0, "places": 0}
    for batch in batches:
        for part in (batch, batch.prompts):
            if part is not None:
                sums["real"] += part.is_real.sum().item()
                sums["places"] += part.is_real.numel()
    return sums


def answer_sums(groups, rewards):
    """Sums over the answers of a step of 4DRL: its groups, rewards (Q, G)."""
    sums = {"reward": rewards.sum(), "spread": (rewards != rewards[:, :1]).any(dim=1).sum()}
    for group in groups:
        for completion, parts in zip(group.completions, group.scores):
            add_sums(sums, parts)
            blocks = completion.text.count("<|latent_start|>")
            add_sums(sums, {"length": len(completion.ids), "cut": completion.truncated, "blocks": blocks})
    return sums


def to_means(sums, c):
    """Sums of a step of 4DRL over all processes -> fields of its log: means over answers, tokens, updates."""
    answers = c.GLOBAL_BATCH * c.G
    entry = {"groups": c.GLOBAL_BATCH, "spread": sums["spread"]}
    for name in ("reward", *c.REWARD_WEIGHTS, "length", "cut", "blocks"):
        entry[name] = sums[name] / answers
    for name in ("ratio", "clip", "kl", "entropy"):
        entry[name] = sums[name] / max(1, sums["n_text"])
    entry["loss"] = sums["loss"] / c.MU
    entry["padding"] = 1 - sums["real"] / sums["places"]  # of what the update reads
    return entry


def show_answer(row, group, reward):
    """The first answer to a question of 4DRL as text, its imagery as {imagery}, with its reward."""
    completion = group.completions[0]
    text = LATENT_BLOCK.sub(lambda block: f"{{imagery x {block[1].count('pad')}}}", completion.text)
    parts = ", ".join(f"{name} {value:g}" for name, value in group.scores[0].items())
    mark = " | cut off" if completion.truncated else ""
    return f"--- {row.id} | key {row.key} | reward {reward:.2f} ({parts}){mark}\n{text.strip()}\n---"


def compare_table(before, after):
    """Scores of two summaries by name -> lines "name  n  before %  after %  points", with 95 % intervals."""
    lines = [f"{'':20}{'n':>6}{'before %':>24}{'after %':>24}{'points':>8}"]
    for file in before:
        for name, old in before[file]["scores"].items():
            new = after[file]["scores"][name]
            title = f"{file}, all" if name == "micro" else name
            points = 100 * (new["accuracy"] - old["accuracy"])
            lines.append(f"{title:20}{old['n']:6d}{in_percent(old):>24}{in_percent(new):>24}{points:+8.1f}")
    return "\n".join(lines)


def in_percent(score):
    """A score with its interval as text: "44.4 (38.4 - 50.6)"."""
    accuracy, low, high = (100 * score[name] for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} ({low:.1f} - {high:.1f})"


def log_line(entry, terms, steps, weights):
    """One step as a line of the log; terms: names of the parts of the loss, weights: {name: weight}."""
    shares = []
    for name in ("object", "retrieval"):
        value = entry.get(name)
        shares.append(f"{name} {math.nan if value is None else value:.2f}")
    rate = entry["tokens"] / entry["seconds"] / 1e3
    cells = [
        f"step {entry['step']:5d}/{steps}",
        f"loss {entry['loss']:.4f} = {weighted_terms(entry, terms, weights)}",
        f"cosine {entry['cosine']:.2f}",
        *shares,
        f"gnorm {entry['gnorm']:.2f}",
        f"lr {entry['lr']:.1e}",
        f"latents {entry['latents']:.1f}",
        f"{entry['seconds']:.2f} s",
        f"{rate:.1f}k tok/s",
    ]
    return " | ".join(cells)
