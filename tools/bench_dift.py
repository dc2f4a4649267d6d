"""Time and memory of one DIFT step, ours against the common way, each in its own process.

    python -m tools.bench_dift
    python -m tools.bench_dift WAY=ours FAST=False REPEATS=1     # ours alone, by the plain code of model.py

The step: forward and backward of a random 45 M Qwen2.5-VL over one sequence of 780 tokens, 288 of them
visual, 8 latents, 151 supervised; float32, one thread, no optimiser. Ours is model.py's forward and dift.py's
loss. The common way is the library's: vision window by window, layer-wise activation checkpointing, logits of
the whole vocabulary at every position in float32. Both start from the same weights and data; their losses and
gradients are compared. Time is the process's own (on an idle core that is the clock's, which is printed too).
Memory is the peak above what the process holds after its imports (where a kernel cannot reset the peak, the
largest so far).

Two other tools, bench_grpo4d.py and bench.py, take their network, their data and the measuring from here.
"""

import contextlib
import functools
import gc
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

import model
from dift import dift_loss
from lib.command_line import override_constants, require
from lib.distributed import autocast
from lib.fast import checkpoint_layers, install_fast_paths
from model import Sample, Thinker, VisionCache, collate, rope_positions

WAY = "both"  # both | naive (the common way) | ours
SIZE = "45M"  # tiny | 45M | 3B | 7B: shapes with random weights
REPEATS = 3  # >= 0; after one step to warm up; the median counts; 0: that one step
THREADS = 1  # 1 to 1000; of the CPU
FAST = True  # of ours; False: exactly the code of model.py
TIME_GOAL = 0.25  # > 0; of the common way
MEMORY_GOAL = 0.4  # > 0; of the common way
JSON = False  # prints the figures of one way as a line of JSON: how the processes report

w_ce, w_sim = 0.1, 1.0  # weights of the two losses of Eq. 7 (release)


# ---------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Case:
    """What is measured: the shape of a network, and the lengths of what it reads and writes."""

    text: dict  # settings of the language model, as Qwen2_5_VLConfig takes them
    vision: dict  # of the visual encoder
    token_id: dict  # of the special tokens; below the smallest are the words
    tied: bool = True  # the head is the table of token embeddings
    K: int = 4  # latents of a block
    pairs: int = 4  # frame pairs of the video
    height: int = 8  # visual tokens of a pair; an overlay is as large as one pair
    width: int = 9
    before: int = 20  # words before the video
    # DIFT reads a row with two latent blocks
    row_after: int = 313  # words between the video and the answer
    written: tuple = (60, 50, 37)  # words before, between and after the blocks, less their 4 delimiters
    # 4DRL and the evaluation write answers to a question
    question_after: int = 162  # words after the video
    G: int = 8  # answers to a question
    new: int = 64  # positions of an answer, latents and the end of turn included
    questions: int = 16  # of the evaluation

    @property
    def video_grid(self):
        """Patches (t, h, w) of the video."""
        return self.pairs, 2 * self.height, 2 * self.width

    @property
    def video_segment(self):
        """The video as rope_positions takes it."""
        return [2.0 * pair for pair in range(self.pairs)], self.height, self.width

    @property
    def video_tokens(self):
        """Visual tokens of the video."""
        return self.pairs * self.height * self.width

    @property
    def supervised(self):
        """Supervised tokens of a row: its words, and the delimiters of its two blocks."""
        return sum(self.written) + 4

    @property
    def row_tokens(self):
        """Tokens of a row."""
        return self.before + self.video_tokens + self.row_after + self.supervised + 2 * self.K

    @property
    def question_tokens(self):
        """Tokens of a question."""
        return self.before + self.video_tokens + self.question_after


def text_shape(width, inner, layers, heads, key_heads, vocabulary=151668):
    """Settings of a language model; time, height and width have Qwen2.5-VL's shares of the rotary angles."""
    angles = width // heads // 2
    side = 3 * angles // 8
    sections = [angles - 2 * side, side, side]
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rope_parameters": {"mrope_section": sections, "rope_theta": 1e6, "rope_type": "default"},
        "vocab_size": vocabulary,
    }


def vision_shape(width, inner, depth, heads, full_layers, text_width):
    """Settings of a visual encoder; full_layers: those without windows."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "depth": depth,
        "num_heads": heads,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": full_layers,
        "out_hidden_size": text_width,
    }


small_names = ("endoftext", "im_end", "image_pad", "video_pad", "latent_pad", "latent_start", "latent_end")
small_ids = {name: 1010 + number for number, name in enumerate(small_names)}
qwen_ids = {
    "endoftext": 151643,
    "im_end": 151645,
    "image_pad": 151655,
    "video_pad": 151656,
    "latent_pad": 151665,
    "latent_start": 151666,
    "latent_end": 151667,
}
frames = {"pairs": 18, "height": 16, "width": 16}  # 36 frames of 256·28·28 pixels (release)
qwen_vision = (1280, 3420, 32, 16, [7, 15, 23, 31])
cases = {
    "tiny": Case(
        text=text_shape(128, 384, 4, 4, 2, vocabulary=1024),
        vision=vision_shape(64, 128, 2, 2, [0, 1], 128),
        token_id=small_ids,
    ),
    "45M": Case(
        text=text_shape(256, 768, 6, 4, 2),
        vision=vision_shape(160, 432, 2, 4, [1], 256),
        token_id=qwen_ids,
    ),
    "3B": Case(
        text=text_shape(2048, 11008, 36, 16, 2),
        vision=vision_shape(*qwen_vision, 2048),
        token_id=qwen_ids,
        **frames,
    ),
    "7B": Case(
        text=text_shape(3584, 18944, 28, 28, 4),
        vision=vision_shape(*qwen_vision, 3584),
        token_id=qwen_ids,
        tied=False,
        **frames,
    ),
}


def make_case(size, pairs=0, **lengths):
    """The case of a size, with other lengths where they are given; pairs=0: the size's own video."""
    case = cases[size]
    return replace(case, pairs=pairs or case.pairs, **lengths)


# ---------------------------------------------------------------- a random network, and what it reads


class FakeTokenizer:
    """Stands in for a tokenizer: ids of special tokens, option letters that nobody asks for, and no text."""

    def __init__(self, token_id):
        self.token_id = token_id

    def convert_tokens_to_ids(self, tokens):
        """The id of a special token such as <|im_end|>; 0 for each of a list of letters."""
        if isinstance(tokens, list):
            return [0 for _ in tokens]
        return self.token_id[tokens.strip("<|>")]

    def decode(self, ids):
        """An answer as text, which is not used here."""
        return ""


class RandomVision(VisionCache):
    """A VisionCache whose videos and overlays are random patches instead of files."""

    def __init__(self, thinker, patches, keep=True):
        super().__init__(thinker, keep)
        self.patches = patches  # {item: (patches (P, d), grid)}

    def encode_missing(self, items, source):
        """Encodes as ever what is loaded by `load`."""
        with mock.patch.object(model, "load_patches", self.load):
            super().encode_missing(items, source)

    def load(self, item, config, source):
        """The patches of a video or an overlay, and their grid."""
        return self.patches[item]


def build_network(case, device="cpu"):
    """The random network, the same in all processes; vision is frozen."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=case.text,
        vision_config=case.vision,
        tie_word_embeddings=case.tied,
    )
    config.latent_size = case.K
    config.latent_pooling = "strips"
    config.latent_norm = None  # hidden states are fed back as they are
    config.imagery = "latents"
    with torch.device(device):
        qwen = QwenVL._from_config(config, attn_implementation="sdpa").train()
    qwen.model.visual.requires_grad_(False)
    return qwen


def build_thinker(qwen, case, fast):
    """The network as load_model would return it."""
    thinker = Thinker(qwen, FakeTokenizer(case.token_id)).to(qwen.device)
    if fast:
        install_fast_paths(thinker)
    return thinker


def draw_patches(grids):
    """Random patches of images -> {item: (patches (P, d), grid)}; grids: {item: (t, h, w)}."""
    counts = [math.prod(grid) for grid in grids.values()]
    pixels = torch.randn(sum(counts), 3 * 2 * 14 * 14)
    parts = pixels.split(counts)
    return {item: (part, grid) for (item, grid), part in zip(grids.items(), parts)}


def draw_row(case):
    """One row with two latent blocks -> its Sample, and the patches of its video and overlays."""
    torch.manual_seed(1)
    token_id = case.token_id
    block = [token_id["latent_start"], *[token_id["latent_pad"]] * case.K, token_id["latent_end"]]

    # words, video, words | words, block, words, block, words
    words = []
    for count in (case.before, case.row_after, *case.written):
        words.append(torch.randint(0, token_id["endoftext"], (count,)).tolist())
    visual = [token_id["video_pad"]] * case.video_tokens
    prompt = words[0] + visual + words[1]
    ids = torch.tensor(prompt + words[2] + block + words[3] + block + words[4])

    is_latent = ids == token_id["latent_pad"]
    is_answer = torch.arange(len(ids)) >= len(prompt)
    segments = [case.before, case.video_segment, len(ids) - case.before - len(visual)]
    sample = Sample(
        ids=ids,
        positions=rope_positions(segments, 2),
        is_text=is_answer & ~is_latent,
        is_latent=is_latent,
        is_visual=ids == token_id["video_pad"],
        is_real=torch.ones(len(ids), dtype=torch.bool),
        video=("video",),
        overlays=("overlay 0", "overlay 1"),
        source="row",
    )
    overlay_grid = (1, *case.video_grid[1:])
    grids = {("video",): case.video_grid, ("overlay 0",): overlay_grid, ("overlay 1",): overlay_grid}
    return sample, draw_patches(grids)


# ---------------------------------------------------------------- the two ways


def our_step(qwen, case, fast=True):
    """A call that makes a step by model.py and dift.py -> (loss,)."""
    thinker = build_thinker(qwen, case, fast).train()
    sample, patches = draw_row(case)
    vision = RandomVision(thinker, patches, keep=False)
    collated = collate([sample], case.token_id["endoftext"])

    def step():
        """Forward and backward, the encoding of the images included."""
        batch = vision.prepare(collated)
        logp, imagined, targets = thinker(batch)
        loss, _ = dift_loss(logp, imagined, targets, len(logp), len(imagined), w_ce, w_sim)
        loss.backward()
        return (loss,)

    return step


def naive_step(qwen, case):
    """A call that makes a step by the library's modules and its loss -> (loss,)."""
    checkpoint_layers(qwen)
    sample, patches = draw_row(case)
    batch = collate([sample], case.token_id["endoftext"]).to(qwen.device)
    labels = batch.ids.masked_fill(~batch.is_text, -100)
    pixels = [part.to(qwen.device) for part, _ in patches.values()]
    grids = torch.tensor([grid for _, grid in patches.values()], device=qwen.device)
    overlay_pixels = torch.cat(pixels[1:])

    def step():
        """The same, by the library."""
        # the input: word embeddings, visual features, and as latents the overlays' means (Eq. 5)
        video = qwen.model.visual(pixels[0], grid_thw=grids[:1]).pooler_output
        overlays = qwen.model.visual(overlay_pixels, grid_thw=grids[1:]).pooler_output
        parts = overlays.chunk(2 * case.K)
        targets = torch.stack([part.mean(dim=0) for part in parts])  # (8, D)
        x = qwen.get_input_embeddings()(batch.ids)
        x = x.masked_scatter(batch.is_visual[..., None], video.to(x.dtype))
        x = x.masked_scatter(batch.is_latent[..., None], targets.to(x.dtype))

        # logits of all positions, cross-entropy of the supervised ones, cosine of the latent ones (Eq. 7)
        output = qwen.model(inputs_embeds=x, position_ids=batch.positions, use_cache=False)
        hidden = output.last_hidden_state
        logits = qwen.lm_head(hidden).float()  # (1, T, V)
        ce = qwen.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        imagined = hidden[:, :-1][batch.is_latent[:, 1:]]
        sim = (1 - F.cosine_similarity(imagined, targets.detach(), dim=-1)).mean()
        loss = w_ce * ce + w_sim * sim
        loss.backward()
        return (loss,)

    return step


# ---------------------------------------------------------------- measuring


@dataclass
class Usage:
    """What a call took."""

    seconds: float  # the process's own on a CPU, the clock's on a GPU
    clock: float
    bytes: int  # at the peak, above what the process held after its imports


def held_memory():
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(device):
    """The most bytes that were held since the last reset: by the process, or on a GPU by torch."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def reset_peak(device):
    """Begins a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # a kernel that does not reset it keeps the peak since the process began
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def wait_for(device):
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call, device, start=0):
    """-> what the call returns, and its Usage with the peak above `start` bytes (a GPU's above nothing)."""
    is_gpu = device.type == "cuda"
    gc.collect()
    reset_peak(device)
    wait_for(device)
    own_start, clock_start = time.process_time(), time.perf_counter()
    result = call()
    wait_for(device)
    clock = time.perf_counter() - clock_start
    own = time.process_time() - own_start
    peak = peak_memory(device)
    return result, Usage(clock if is_gpu else own, clock, peak if is_gpu else peak - start)


def measure_rounds(qwen, calls, repeats, device, start):
    """Rounds of calls {name: call}, each given what the last one returned -> {name: Usage}, the last result.

    The first round warms up, unless it is the only one. Times are medians, memory is the largest.
    """
    rounds = {name: [] for name in calls}
    for _ in range(1 + repeats):
        qwen.zero_grad(set_to_none=True)
        result = ()
        for name, call in calls.items():
            with autocast(device):
                result, usage = timed(functools.partial(call, *result), device, start)
            rounds[name].append(usage)

    usages = {}
    for name, measured in rounds.items():
        counted = measured[1:] or measured
        usages[name] = Usage(
            seconds=statistics.median(usage.seconds for usage in counted),
            clock=statistics.median(usage.clock for usage in counted),
            bytes=max(usage.bytes for usage in counted),
        )
    return usages, result


def describe_network(qwen):
    """Number of its weights, and the norm of its gradient."""
    norms = [weight.grad.norm() for weight in qwen.parameters() if weight.grad is not None]
    weights = sum(weight.numel() for weight in qwen.parameters())
    return {"weights": weights, "gradient": torch.stack(norms).norm().item()}


def run_alone(module, c, **changes):
    """Runs a tool in a process of its own -> its figures; None if it failed, as for want of memory."""
    constants = dict(vars(c), **changes, JSON=True)
    words = [f"{name}={value}" for name, value in constants.items()]
    env = dict(os.environ, OMP_NUM_THREADS=str(c.THREADS), MKL_NUM_THREADS=str(c.THREADS))
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        named = " ".join(f"{name}={value}" for name, value in changes.items())
        print(f"{named} ended with code {done.returncode}; left out.", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_ways(module, c):
    """Runs a tool in the way, or both ways, that WAY names -> {way: figures}; exits if one failed."""
    ways = ("naive", "ours") if c.WAY == "both" else (c.WAY,)
    results = {way: run_alone(module, c, WAY=way) for way in ways}
    require(all(results.values()), "Not all figures could be measured; see above.")
    return results


def require_same(naive, ours):
    """Ends the program unless both ways computed the same loss and the same gradient."""
    same_loss = abs(ours["loss"] - naive["loss"]) < 1e-4
    require(same_loss, f"The two ways compute different losses: {naive['loss']} and {ours['loss']}.")
    same_gradient = abs(ours["gradient"] / naive["gradient"] - 1) < 1e-4
    norms = f"{naive['gradient']} and {ours['gradient']}"
    require(same_gradient, f"The two ways compute gradients of different norms: {norms}.")


def print_goals(naive, ours, c):
    """Prints whether time and memory reach their goals; naive, ours: figures of a step."""
    for name, goal in {"seconds": c.TIME_GOAL, "bytes": c.MEMORY_GOAL}.items():
        ratio = ours[name] / naive[name]
        print(f"{name:8} ratio {ratio:.3f}, goal {goal:.3f}: {'reached' if ratio <= goal else 'missed'}")


def measure(c):
    """Runs one way in this process -> its figures."""
    torch.set_num_threads(c.THREADS)
    start = held_memory()
    case = make_case(c.SIZE)
    qwen = build_network(case)
    step = naive_step(qwen, case) if c.WAY == "naive" else our_step(qwen, case, c.FAST)
    usages, (loss,) = measure_rounds(qwen, {"dift": step}, c.REPEATS, torch.device("cpu"), start)
    return {"loss": loss.item(), **vars(usages["dift"]), **describe_network(qwen)}


def main():
    """Measures both ways, compares what they computed and prints the figures."""
    c = override_constants(globals())
    if c.JSON:
        print(json.dumps(measure(c)))
        return

    results = run_ways("tools.bench_dift", c)
    case = make_case(c.SIZE)
    millions = next(iter(results.values()))["weights"] / 1e6
    counts = [case.supervised, case.video_tokens, 2 * case.K]
    head = f"{millions:.1f} M weights, {case.row_tokens} tokens"
    print(f"{head}, supervised, visual and latent: {counts}")
    for way, figures in results.items():
        time_used = "{seconds:7.3f} s ({clock:.3f} s by the clock)".format(**figures)
        print(f"{way:7} {time_used} {figures['bytes'] / 2**20:7.0f} MiB   loss {figures['loss']:.6f}")
    if c.WAY == "both":
        require_same(**results)
        print_goals(**results, c=c)


if __name__ == "__main__":
    main()
