"""Seconds, tokens/s, memory and matmul share of all stages, the common way against ours, on this machine.

    python -m tools.bench                                   # tiny and 45M, one thread or one GPU
    python -m tools.bench PLAIN=True                        # ours with FAST=False against ours with FAST=True
    python -m tools.bench GROWTH=True                       # what doubling frames, answer length or G costs
    python -m tools.bench MEMORY=True                       # predicted memory of 3B and 7B; runs nothing
    python -m tools.bench SIZES=3B OUT=out/bench_3B.json    # on a GPU: bf16 autocast, random weights
    python -m tools.bench MODEL=out/dift DATA=out/toy       # evaluation of a checkpoint, by batch size

Rows of the table: dift, rollout and update are the steps of bench_dift.py and bench_grpo4d.py (which say what
the common way is); evaluation answers EVAL questions greedily, one by one against all at once. Plain are the
same steps as ours by the code of model.py alone, without lib/fast.py. Each size and way has a process of its
own. An update is the reference's pass and the policy's forward and backward. No optimiser runs. The first
round warms up; the median of REPEATS counts.

share: the matrix products that a phase needs (vision once, the prompt once, the head where it is scored, and
nothing twice) are timed as plain products of those shapes on this machine; share is that time over the
phase's. mfu: the same products over the rate of one large product. Time is the process's own on a CPU (on an
idle core that is the clock's, which is printed too) and the clock's on a GPU. Memory is the peak above what
the process holds after its imports (where a kernel cannot reset the peak, the largest so far), on a GPU what
torch has allocated. The prediction is held against what PyTorch allocates, which its profiler tells on a CPU.

With MODEL the questions of DATA are answered by evaluate.py's own function, once in batches of each size:
evaluation is all but the start-up and the drawing, generation what model.generate takes of it. The ratios are
to the first size; changed are the answers whose text differs from the first size's, and their rows. With
PLAIN=True that is done twice, first with FAST=False.
"""

import functools
import gc
import itertools
import json
import math
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers

import evaluate
from lib.benchmarks import read_benchmark
from lib.command_line import override_constants, require_choice
from lib.distributed import autocast
from lib.files import write_json
from model import generate, load_model
from tools import bench_grpo4d
from tools.bench_dift import RandomVision, build_network, build_thinker, cases, held_memory
from tools.bench_dift import make_case, measure_rounds, naive_step, our_step, run_alone, timed

OUT = "out/bench.json"  # results with device and versions; "": none
SIZES = "tiny 45M"  # any of tiny 45M 3B 7B: shapes with random weights
PAIRS = 0  # >= 0; frame pairs of the video; 0: the size's own
G = 8  # >= 2; answers to a question
NEW = 64  # >= 1; positions of an answer
EVAL = 16  # >= 1; questions of the evaluation
REPEATS = 1  # >= 0; measured rounds after one to warm up
THREADS = 1  # 1 to 1000; of a CPU
PLAIN = False  # True: FAST=False in the place of the common way
GROWTH = False  # the growth table, of ours, in place of the other
MEMORY = False  # the table of predicted memory
PHASES = "dift rollout update evaluation"  # any of them; rollout and update go together
WAY = "both"  # both | naive (the common way) | plain (ours with FAST=False) | ours
MODEL = ""  # a checkpoint, to time its evaluation instead; "": none
DATA = "out/toy"  # its questions, as evaluate.py takes them
BATCHES = "1 16 64"  # questions answered at once
QUESTIONS = 0  # >= 0; the first so many; 0: all (fewer share the encoding of the overlays)
JSON = False  # prints the figures of one size and way as a line of JSON: how the processes report

GiB = 2**30


# ---------------------------------------------------------------- counts from shapes


class Product(NamedTuple):
    """A matrix product of m x k and k x n, and how often it is needed."""

    m: int
    k: int
    n: int
    count: float


def linear(rows, inner, outer, train=False, count=1):
    """Products of a linear layer; the backward pass has that of its input and that of its weight."""
    shapes = [Product(rows, inner, outer, count)]
    if train:
        shapes.append(Product(rows, outer, inner, count))
        shapes.append(Product(inner, rows, outer, count))
    return shapes


def attention(queries, keys, width, count):
    """Products of one head; `count` is a fraction where keys are masked."""
    return [Product(queries, width, keys, count), Product(queries, keys, width, count)]


def key_width(text):
    """Width of the keys of all heads of a language model."""
    return text["hidden_size"] // text["num_attention_heads"] * text["num_key_value_heads"]


def text_products(case, rows, new, past=0, train=False, times=1, read=None):
    """The language model on `rows` sequences of `new` positions behind `past` others.

    read: positions whose last hidden state is asked for, where the last layer's MLP works; None: all.
    """
    text = case.text
    D, inner = text["hidden_size"], text["intermediate_size"]
    heads = text["num_attention_heads"]
    layers = text["num_hidden_layers"] * times
    m = rows * new

    # queries and mixture, keys and values, then the MLPs: of the last layer only where it is read
    shapes = linear(m, D, D, train, 2 * layers)
    shapes += linear(m, D, key_width(text), train, 2 * layers)
    last = m if read is None else read
    for positions, count in ((m, layers - times), (last, times)):
        shapes += linear(positions, D, inner, train, 2 * count)
        shapes += linear(positions, inner, D, train, count)

    # attention is causal, and its backward pass has twice its products
    visible = (past + (new + 1) / 2) / (past + new)
    passes = 3 if train else 1
    return shapes + attention(new, past + new, D // heads, visible * passes * layers * rows * heads)


def vision_products(case, pairs, count=1):
    """The frozen visual encoder on a video of frame pairs, or `count` of them."""
    vision = case.vision
    width, inner, heads = vision["hidden_size"], vision["intermediate_size"], vision["num_heads"]
    depth, full = vision["depth"], len(vision["fullatt_block_indexes"])
    sides = case.video_grid[1:]
    n = pairs * math.prod(sides)  # patches

    # patches, attention's layers, MLPs, and the merging of 2 x 2 patches
    shapes = linear(n, 6 * vision["patch_size"] ** 2, width)
    shapes += linear(n, width, 3 * width, count=depth)
    shapes += linear(n, width, width, count=depth)
    shapes += linear(n, width, inner, count=2 * depth)
    shapes += linear(n, inner, width, count=depth)
    shapes += linear(n // 4, 4 * width, 4 * width)
    shapes += linear(n // 4, 4 * width, vision["out_hidden_size"])

    # attention within windows, which are smaller at the edge, and within a whole pair
    side = vision["window_size"] // vision["patch_size"]
    window = math.prod(min(side, length) for length in sides)
    windows = pairs * math.prod(math.ceil(length / min(side, length)) for length in sides)
    filled = n / (windows * window)
    shapes += attention(window, window, width // heads, filled * (depth - full) * windows * heads)
    whole = math.prod(sides)
    shapes += attention(whole, whole, width // heads, full * pairs * heads)
    return [shape._replace(count=shape.count * count) for shape in shapes]


def products(case, phase):
    """The matrix products that a phase needs."""
    if phase == "dift":
        return dift_products(case)
    if phase == "update":
        return update_products(case)
    if phase == "rollout":
        return answer_products(case, prompts=1, answers=case.G)
    return answer_products(case, prompts=case.questions, answers=case.questions)


def dift_products(case):
    """Those of a DIFT step: video, two overlays, the row, and the head at supervised tokens."""
    D, V = case.text["hidden_size"], case.text["vocab_size"]
    read = case.supervised + 2 * case.K
    shapes = vision_products(case, case.pairs) + vision_products(case, 1, count=2)
    shapes += text_products(case, 1, case.row_tokens, train=True, read=read)
    return shapes + linear(case.supervised, D, V, train=True)


def update_products(case):
    """Those of an update: the reference's forward pass, the policy's forward and backward."""
    D, V = case.text["hidden_size"], case.text["vocab_size"]
    # scored are all but latents and forced ends, of which every other answer has twice as many
    blocks = case.G + case.G // 2
    scored = case.G * case.new - blocks * (case.K + 1)
    shapes = []
    for train in (False, True):
        shapes += text_products(case, 1, case.question_tokens, train=train, read=1)
        shapes += text_products(case, case.G, case.new, case.question_tokens, train)
        shapes += linear(scored, D, V, train)
    return shapes


def answer_products(case, prompts, answers):
    """Those of a rollout or an evaluation: prompts, then one position of all answers after the other."""
    D, V = case.text["hidden_size"], case.text["vocab_size"]
    shapes = vision_products(case, case.pairs, prompts)
    shapes += text_products(case, prompts, case.question_tokens, read=prompts)
    shapes += linear(answers, D, V, count=case.new)
    past = case.question_tokens + case.new // 2
    return shapes + text_products(case, answers, 1, past, times=case.new - 1)


def flops(shapes):
    """Multiplications and additions of products."""
    return sum(2 * shape.m * shape.k * shape.n * shape.count for shape in shapes)


def tokens(case, phase):
    """Positions that a phase reads (dift) or writes (rollout, update, evaluation)."""
    if phase == "dift":
        return case.row_tokens
    answers = case.questions if phase == "evaluation" else case.G
    return case.new * answers


def arithmetic(device):
    """The type in which matrix products are computed."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@functools.cache
def product_seconds(m, k, n, device):
    """Time of one plain product, the best of some."""
    a = torch.randn(m, k, dtype=arithmetic(device), device=device)
    b = torch.randn(k, n, dtype=arithmetic(device), device=device)
    repeats = max(1, round(2e7 / (m * k * n)))  # small ones many at a time

    def multiply():
        """The product, as often as it takes to be timed."""
        for _ in range(repeats):
            a @ b

    return min(timed(multiply, device)[1].seconds for _ in range(3)) / repeats


def floor_seconds(shapes, device):
    """Time of all products of a phase as plain ones; attention's masked half is left out by its count."""
    return sum(product_seconds(*shape[:3], device) * shape.count for shape in shapes)


# ---------------------------------------------------------------- memory from shapes


def count_weights(case):
    """Numbers of weights from shapes: of the text with its head, of vision, of one table."""
    text, vision = case.text, case.vision
    D, inner, narrow = text["hidden_size"], text["intermediate_size"], key_width(text)
    layer = 2 * D * D + 2 * D * narrow + 3 * D * inner + 3 * D + 2 * narrow
    table = D * text["vocab_size"]
    tables = table if case.tied else 2 * table
    of_text = text["num_hidden_layers"] * layer + D + tables

    width = vision["hidden_size"]
    block = 4 * width * width + 3 * width * vision["intermediate_size"]
    merger = 16 * width * width + 4 * width * vision["out_hidden_size"]
    of_vision = 6 * vision["patch_size"] ** 2 * width + vision["depth"] * block + merger
    return of_text, of_vision, table


@dataclass
class Load:
    """What a forward pass keeps for its backward pass, in numbers."""

    positions: int
    scored: int  # positions whose logits are made
    unread: int  # positions whose last hidden state is read nowhere
    repeated: int = 0  # in each layer: keys and values of a shared prompt and its answers, for all heads
    mask: int = 0  # in each layer: mask of the answers behind a shared prompt


def load_of(case, stage, rows, checkpointing):
    """The Load of a stage; an update with checkpointing is one with PREFIX=rows."""
    if stage == "dift":
        positions, scored = rows * case.row_tokens, rows * case.supervised
        return Load(positions, scored, positions - scored - 2 * rows * case.K)
    answers = rows * case.G
    scored = answers * case.new
    together = case.question_tokens + case.new
    if checkpointing:
        positions = answers * together
        return Load(positions, scored, positions - scored)
    # behind a shared prompt all of an answer is read, of the prompt its last position
    return Load(
        positions=rows * case.question_tokens + scored,
        scored=scored,
        unread=rows * (case.question_tokens - 1),
        repeated=answers * together * 2 * case.text["hidden_size"],
        mask=scored * together,
    )


def predict_memory(
    case, stage, rows=1, half=True, checkpointing=False, optimiser=True, chunk=1024, devices=1
):
    """Peak bytes that PyTorch allocates -> {"weights", "gradients", "moments", "activations", "peak"}.

    stage: dift, rows of a micro-batch | update, rows questions with G answers each behind a shared prompt.
    half: bf16 arithmetic with fp32 masters; else fp32. devices: that FSDP cuts weights, gradients and moments
    over; each then gathers the tables and two layers at a time. Kept per token and layer: at each norm its
    input and the normalised input (fp32) and what it gives, in bf16 once for each product that reads it;
    queries, keys, values and their mixture; four tensors of the MLP. The last layer's MLP and the last norm
    keep theirs only where a hidden state is read. Behind a shared prompt each answer also keeps, in every
    layer, keys and values of prompt and answer for all heads, and its mask. With checkpointing (update:
    PREFIX=rows) only a layer's input is kept, and one whole layer at a time.
    Not counted: what is outside PyTorch (libraries' code and buffers), what an allocator cannot join, vision.
    """
    item = 2 if half else 4
    of_text, _, table = count_weights(case)
    load = load_of(case, stage, rows, checkpointing)
    D, inner = case.text["hidden_size"], case.text["intermediate_size"]

    # activations: of one layer, of all, and of the last norm
    norms = 7 * D if half else 4 * D
    of_layer = load.positions * (16 * D + item * (norms + 2 * key_width(case.text) + 4 * inner))
    of_layer += item * load.repeated
    layers = case.text["num_hidden_layers"]
    if checkpointing:
        activations = layers * load.positions * 4 * D
    else:
        activations = layers * (of_layer + item * load.mask)
        activations -= load.unread * (8 * D + item * ((2 if half else 1) * D + 4 * inner))
    activations += 8 * (load.positions - load.unread) * D

    # the peak is at the head, or in the backward pass of the last or of the first layer
    parts = {
        "weights": predict_weights(case, stage, half, devices),
        "gradients": 4 * of_text / devices,
        "moments": 8 * of_text / devices if optimiser else 0,
        "activations": activations,
    }
    flow = load.positions * item * (2 * inner + 2 * D) + item * load.repeated  # gradients within a layer
    at_head = activations + predict_logits(case, min(chunk, load.scored), half)
    at_last_layer = activations + flow + 4 * table
    if checkpointing:
        at_last_layer += of_layer
    at_first_layer = of_layer + flow + parts["gradients"]
    held = parts["weights"] + parts["moments"]
    parts["peak"] = held + max(at_head, at_last_layer, at_first_layer)
    return parts


def predict_weights(case, stage, half, devices):
    """Bytes of all weights, and of the bf16 copies that autocast makes or that FSDP gathers."""
    of_text, of_vision, table = count_weights(case)
    item = 2 if half else 4
    tables = table if case.tied else 2 * table
    if devices > 1:
        copies = item * (tables + 2 * (of_text - tables) / case.text["num_hidden_layers"])
    else:
        copies = 2 * of_text if half else 0
    # the reference is in the memory of an update too; its bf16 copies are let go
    networks = 2 if stage == "update" else 1
    return networks * 4 * of_text / devices + 4 * of_vision + copies


def predict_logits(case, rows, half):
    """Bytes of the logits of some rows, of their gradient and of the head's."""
    _, _, table = count_weights(case)
    V = case.text["vocab_size"]
    if half:
        return max(6 * rows * V + 2 * table, 6 * table)
    return 4 * rows * V + 4 * table


def print_memory():
    """The table of predicted memory for 3B and 7B."""
    print("Predicted GiB of one device: bf16 arithmetic, fp32 masters, AdamW, 256 tokens a frame pair, G 8")
    head = "size  stage     answer  frames  rows  weights   grads  moments  activations    peak"
    print(head + "  checkpointed  the same, FSDP on 8")
    stages = (("dift", 64), ("update", 256), ("update", 1024))
    for size, (stage, new), frames in itertools.product(("3B", "7B"), stages, (10, 36, 50)):
        case = make_case(size, frames // 2, G=8, new=new)
        for rows in (1, 2, 4) if stage == "dift" else (1,):
            answer = "" if stage == "dift" else new
            print(f"{size:6}{stage:8}{answer:>8}{frames:8}{rows:6}" + memory_cells(case, stage, rows))


def memory_cells(case, stage, rows):
    """The numbers of one line of that table."""
    parts = predict_memory(case, stage, rows)
    one = predict_memory(case, stage, rows, checkpointing=True)["peak"]
    eight = predict_memory(case, stage, rows, checkpointing=True, devices=8)["peak"]
    in_gib = {name: size / GiB for name, size in parts.items()}
    line = "{weights:9.1f}{gradients:8.1f}{moments:9.1f}{activations:13.1f}{peak:8.1f}".format(**in_gib)
    return f"{line}{one / GiB:14.1f}{eight / GiB:21.1f}"


# ---------------------------------------------------------------- measuring


def this_device():
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allocated(call, device):
    """The most bytes that PyTorch has allocated at once during a call, above what it had before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        with autocast(device):
            return timed(call, device)[1].bytes - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    changes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    return max(itertools.accumulate(size for _, size in sorted(changes)))


def weight_bytes(*networks):
    """Bytes of the weights of some networks, shared ones once."""
    weights = {weight for network in networks for weight in network.parameters()}
    return sum(weight.numel() * weight.element_size() for weight in weights)


@dataclass
class Measured:
    """The figures of one size and way."""

    phases: dict  # {phase: Usage}
    allocated: dict  # of ours: {phase: bytes at PyTorch's peak, weights included}
    decode: float | None = None  # seconds of the rollout that are decoding; not of naive


def measure_dift(measured, case, c, device, start):
    """Adds the figures of a DIFT step."""
    qwen = build_network(case, device)
    step = naive_step(qwen, case) if c.WAY == "naive" else our_step(qwen, case, fast=c.WAY == "ours")
    usages, _ = measure_rounds(qwen, {"dift": step}, c.REPEATS, device, start)
    measured.phases.update(usages)
    if c.WAY == "ours":
        qwen.zero_grad(set_to_none=True)
        measured.allocated["dift"] = weight_bytes(qwen) + allocated(step, device)


def measure_grpo4d(measured, case, c, device, start):
    """Adds the figures of a rollout and of an update."""
    settings = override_constants(vars(bench_grpo4d), [])
    settings.FAST = c.WAY == "ours"
    policy, frozen = bench_grpo4d.build_policy_and_reference(case, device)
    make = bench_grpo4d.naive_phases if c.WAY == "naive" else bench_grpo4d.our_phases
    calls = make(policy, frozen, case, settings)

    def update(*rollout):
        """Both passes."""
        return calls["policy"](*calls["reference"](*rollout))

    both = {"rollout": calls["rollout"], "update": update}
    usages, _ = measure_rounds(policy, both, c.REPEATS, device, start)
    measured.phases.update(usages)
    policy.zero_grad(set_to_none=True)
    if c.WAY == "ours":
        with autocast(device):
            rollout = calls["rollout"]()
        once = functools.partial(update, *rollout)
        measured.allocated["update"] = weight_bytes(policy, frozen) + allocated(once, device)
    if c.WAY != "naive":
        measured.decode = decode_seconds(policy, case, settings.FAST, device)


def decode_seconds(qwen, case, fast, device):
    """Seconds of a rollout's positions but the first: G rows of one token at a time."""
    thinker = build_thinker(qwen, case, fast).eval()
    prompt, patches, _ = bench_grpo4d.draw_question(case)
    vision = RandomVision(thinker, patches)

    def rollout(positions):
        """Answers of so many positions."""
        generators = [torch.Generator().manual_seed(number) for number in range(case.G)]
        generate(thinker, [prompt], positions, vision, 1.0, generators=generators)

    with autocast(device):
        rollout(2)  # warms up, and keeps the video's features
        _, first = timed(functools.partial(rollout, 1), device)
        _, all_of_them = timed(functools.partial(rollout, case.new), device)
    return all_of_them.seconds - first.seconds


def measure_evaluation(measured, case, c, device, start):
    """Adds the figures of answering some questions greedily: naive is one by one, else all at once."""
    qwen = build_network(case, device)
    thinker = build_thinker(qwen, case, fast=c.WAY != "plain").eval()
    prompt, patches, _ = bench_grpo4d.draw_question(case)
    # as many videos as questions, all of the same patches
    names = [f"video {number}" for number in range(case.questions)]
    samples = [replace(prompt, video=(name,)) for name in names]
    vision = RandomVision(thinker, {(name,): patches[("video",)] for name in names})
    size = 1 if c.WAY == "naive" else len(samples)

    def answer():
        """Answers all questions."""
        vision.clear()
        for at in range(0, len(samples), size):
            generate(thinker, samples[at : at + size], case.new, vision)
        return ()

    usages, _ = measure_rounds(qwen, {"evaluation": answer}, c.REPEATS, device, start)
    measured.phases.update(usages)


def measure(case, c):
    """One size and way in this process -> its figures, as they are written to OUT."""
    torch.set_num_threads(c.THREADS)
    device = this_device()
    start = held_memory()
    measured = Measured({}, {})
    parts = {"dift": measure_dift, "rollout update": measure_grpo4d, "evaluation": measure_evaluation}
    for phases, measure_part in parts.items():
        if set(phases.split()) & set(c.PHASES.split()):
            measure_part(measured, case, c, device, start)
            gc.collect()  # a Thinker with fast paths refers to itself, so it would stay for a while

    # the needed products of each phase, and the time that they take as plain ones
    phases = {name: vars(usage) for name, usage in measured.phases.items()}
    if c.WAY == "ours":
        for name, figures in phases.items():
            shapes = products(case, name)
            figures["flops"] = flops(shapes)
            figures["floor"] = floor_seconds(shapes, device)
    rates = machine_rates(device)
    return {"phases": phases, "allocated": measured.allocated, "decode": measured.decode, **rates}


def machine_rates(device):
    """Rate of one large product, in operations a second, and of copying memory, in bytes a second."""
    is_gpu = device.type == "cuda"
    large = 4096 if is_gpu else 1024
    block = torch.empty(2**28 if is_gpu else 2**25, device=device)
    copying = min(timed(block.clone, device)[1].seconds for _ in range(3))
    return {
        "rate": 2 * large**3 / product_seconds(large, large, large, device),
        "bandwidth": 2 * 4 * block.numel() / copying,
    }


def describe_machine(threads):
    """Device and versions, for the results."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{cpu_name()}, {platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": name,
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name():
    """The processor's name as Linux gives it; "CPU" elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


# ---------------------------------------------------------------- the tables


def compare(size, c):
    """Runs one size in both ways, prints its table -> figures."""
    baseline = "plain" if c.PLAIN else "naive"
    ways = (baseline, "ours") if c.WAY == "both" else (c.WAY,)
    results = {way: run_alone("tools.bench", c, SIZES=size, WAY=way) for way in ways}
    results = {way: figures for way, figures in results.items() if figures}
    case = case_of(size, c)
    first = results.get(baseline, {"phases": {}})["phases"]
    ours = results.get("ours", {"phases": {}})["phases"]
    for way, figures in results.items():
        for name in figures["phases"]:
            line = usage_cells(case, name, figures, ours.get(name))
            if way == "ours":
                line += ratio_cells(figures["phases"][name], first.get(name))
                line += "   " + remark(case, name, figures)
            print(f"{size:6}{name:12}{way:7}{line}".rstrip(), flush=True)
    return results


def usage_cells(case, name, figures, ours):
    """What a phase took, and its share of plain products, which are counted in the figures of ours."""
    phase = figures["phases"][name]
    seconds = phase["seconds"]
    line = f"{seconds:9.3f}{phase['clock']:9.3f}{tokens(case, name) / seconds:10.0f}"
    line += f"{phase['bytes'] / 2**20:9.0f}"
    if ours is None:
        return line
    share = ours["floor"] / seconds
    mfu = ours["flops"] / seconds / figures["rate"]
    return f"{line}{ours['flops'] / 1e9:10.1f}{share:8.2f}{mfu:7.2f}"


def ratio_cells(phase, first):
    """Time and memory of ours over those of the common way, or of the plain code."""
    if first is None:
        return ""
    return f"{phase['seconds'] / first['seconds']:8.3f}{phase['bytes'] / first['bytes']:8.3f}"


def remark(case, name, figures):
    """What else there is to say of ours: memory against its prediction, decoding against the bandwidth."""
    device = this_device()
    if name in figures["allocated"]:
        predicted = predict_memory(case, name, 1, device.type == "cuda", optimiser=False)["peak"]
        return f"PyTorch's own: {figures['allocated'][name] / predicted:.2f} of the predicted memory"
    if name == "rollout":
        # every weight of the text is read once a position
        of_text, _, _ = count_weights(case)
        read = arithmetic(device).itemsize * of_text * (case.new - 1)
        share = read / figures["decode"] / figures["bandwidth"]
        return f"{figures['decode']:.3f} s of it decode, {share:.2f} of the memory's bandwidth"
    return ""


def growth(size, c):
    """Ours at the size's own and with frames, answer length or G doubled, printed -> figures."""
    own = {"PAIRS": case_of(size, c).pairs, "NEW": c.NEW, "G": c.G}
    results = {"own": run_alone("tools.bench", c, SIZES=size, WAY="ours", **own)}
    for name, value in own.items():
        doubled = dict(own, **{name: 2 * value})
        results[name] = run_alone("tools.bench", c, SIZES=size, WAY="ours", **doubled)
    for name in own:
        if results["own"] and results[name]:
            print_growth(f"{size:6}2 x {name:8}", results["own"]["phases"], results[name]["phases"])
    return results


def print_growth(head, before, after):
    """One doubling: a line for each phase that depends on it."""
    for name, figures in after.items():
        first = before[name]
        if figures["flops"] == first["flops"]:
            continue
        time_grew = figures["seconds"] / first["seconds"]
        products_grew = figures["flops"] / first["flops"]
        line = f"{head}{name:12}{time_grew:9.2f}{products_grew:12.2f}{time_grew / products_grew:9.2f}"
        print(f"{line}{figures['bytes'] / first['bytes']:10.2f}", flush=True)


# ---------------------------------------------------------------- evaluation of a checkpoint


@dataclass
class Evaluation:
    """One evaluation: seconds of all of it and of generation, the process's own and the clock's."""

    own: float
    own_generation: float
    clock: float
    clock_generation: float
    texts: dict  # {row: answer}


def evaluate_once(model, rows, size, questions):
    """Evaluates in batches of a size, timed as a whole and within generate -> Evaluation."""
    result = Evaluation(0.0, 0.0, 0.0, 0.0, {})
    generate_batch, answer_batch = evaluate.generate, evaluate.answer

    def timed_generate(*inputs, **options):
        """evaluate.generate, timed."""
        own, clock = time.process_time(), time.perf_counter()
        completions = generate_batch(*inputs, **options)  # reads its answers back, so a device is waited for
        result.own_generation += time.process_time() - own
        result.clock_generation += time.perf_counter() - clock
        return completions

    def kept_answer(*inputs, **options):
        """evaluate.answer, whose texts are kept."""
        answers = answer_batch(*inputs, **options)
        for answer in answers:
            result.texts[answer.row] = answer.text
        return answers

    settings = evaluate.Settings(batch=size)
    with mock.patch.multiple(evaluate, generate=timed_generate, answer=kept_answer):
        run = functools.partial(evaluate.evaluate, model, rows, settings=settings, limit=questions)
        _, usage = timed(run, model.device)
    result.own, result.clock = usage.seconds, usage.clock
    return result


def by_batch(model, data, sizes, questions):
    """Evaluates a checkpoint once for each batch size, after a few questions to warm up; a line each."""
    rows = read_benchmark("toy", data)
    evaluate_once(model, rows, sizes[0], 4)
    print(" batch questions   all, s   gen, s  clock s   gen, s   ratio  of gen  changed")
    first = None
    for size in sizes:
        result = evaluate_once(model, rows, size, questions)
        first = first or result
        changed = [row for row, text in result.texts.items() if text != first.texts[row]]
        line = f"{size:6}{len(result.texts):10}{result.own:9.2f}{result.own_generation:9.2f}"
        line += f"{result.clock:9.2f}{result.clock_generation:9.2f}"
        line += f"{first.own / result.own:8.2f}{first.own_generation / result.own_generation:8.2f}"
        print(f"{line}{len(changed):9} {changed or ''}", flush=True)


def time_checkpoint(c):
    """The evaluation of MODEL by batch size; with PLAIN=True by the plain code first."""
    torch.set_num_threads(c.THREADS)
    sizes = [int(size) for size in c.BATCHES.split()]
    for fast in (False, True) if c.PLAIN else (True,):
        print(f"FAST={fast}")
        by_batch(load_model(c.MODEL, this_device(), fast=fast), c.DATA, sizes, c.QUESTIONS)


# ---------------------------------------------------------------- the command


def case_of(size, c):
    """The case of a size with the constants' lengths."""
    return make_case(size, c.PAIRS, G=c.G, new=c.NEW, questions=c.EVAL)


def print_heads(c):
    """The head of the table that follows."""
    if c.GROWTH:
        print("size  change      phase          time x  products x    ratio memory x")
    else:
        head = "size  phase       way            s  clock s     tok/s      MiB     GFLOP"
        print(head + "   share    mfu    time  memory")


def check_constants(c):
    """Ends the program with one sentence on constants that name nothing, or do not go together."""
    for size in c.SIZES.split():
        require_choice("SIZES", size, cases)
        bench_grpo4d.require_room(case_of(size, c))
    for phase in c.PHASES.split():
        require_choice("PHASES", phase, ("dift", "rollout", "update", "evaluation"))


def main():
    """Prints the table that the constants ask for."""
    c = override_constants(globals())
    check_constants(c)
    if c.JSON:
        print(json.dumps(measure(case_of(c.SIZES, c), c)))
        return
    if c.MEMORY:
        print_memory()
        return
    machine = describe_machine(c.THREADS)
    print(" | ".join(f"{name} {value}" for name, value in machine.items()))
    if c.MODEL:
        time_checkpoint(c)
        return

    print_heads(c)
    run = growth if c.GROWTH else compare
    results = {size: run(size, c) for size in c.SIZES.split()}
    if c.OUT:
        write_json(c.OUT, {"machine": machine, "constants": vars(c), "results": results})
        print(c.OUT)


if __name__ == "__main__":
    main()
