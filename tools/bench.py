"""Seconds, tokens/s, memory and matmul share of all stages, the common way against ours, on this machine.

    python tests/bench.py                                   # tiny and 45M, one thread or one GPU
    python tests/bench.py GROWTH=True                       # what doubling frames, answer length or G costs
    python tests/bench.py MEMORY=True                       # predicted memory of 3B and 7B; runs nothing
    python tests/bench.py SIZES=3B OUT=out/bench_3B.json    # on a GPU: bf16 autocast, random weights
    python tests/bench.py MODEL=out/dift DATA=out/toy       # evaluation of a checkpoint, by batch size

Rows of the table: dift, rollout and update are the steps of bench_dift.py and bench_grpo4d.py (there stands
what the common way is); evaluation answers EVAL questions greedily, one by one against all at once. Each size
and way has a process of its own. An update is the reference's pass and the policy's forward and backward. No
optimiser runs. The first round warms up; the median of REPEATS counts.

share: the matrix products that a phase needs (vision once, the prompt once, the head where it is scored, and
nothing twice) are timed as plain products of those shapes on this machine; share is that time over the
phase's. mfu: the same products over the rate of one large product. Time is the process's own on a CPU (on an
idle core that is the clock's, which is printed too) and the clock's on a GPU. Memory is the peak above what
the process holds after its imports (where a kernel cannot reset the peak, the largest so far), on a GPU what
torch has allocated. The prediction is held against what PyTorch allocates, which its profiler tells on a CPU.

With MODEL the questions of DATA are answered by evaluate.py's own function, once in batches of each size:
evaluation is all but the start-up and the drawing, generation what model.generate takes of it. The ratios are
to the first size; changed are the answers whose text differs from the first size's, and their rows.
"""

import functools
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import transformers

import bench_dift
import bench_grpo4d
import evaluate
from model import Thinker, check, generate, load_model, set_constants

OUT = "out/bench.json"  # results with device and versions; "": none
SIZES = "tiny 45M"  # any of tiny 45M 3B 7B: shapes with random weights
PAIRS = 0  # frame pairs of the video; 0: the size's own
G = 8  # answers to a question
NEW = 64  # positions of an answer
EVAL = 16  # questions of the evaluation
REPEATS = 1  # measured rounds after one to warm up
THREADS = 1  # of a CPU
GROWTH = False  # the growth table, of ours, in place of the other
MEMORY = False  # the table of predicted memory
PHASES = "dift rollout update evaluation"  # any of them; rollout and update go together
WAY = "both"  # both | naive | ours
MODEL = ""  # a checkpoint, to time its evaluation instead; "": none
DATA = "out/toy"  # its questions, as evaluate.py takes them
BATCHES = "1 16 64"  # questions answered at once
QUESTIONS = 0  # the first so many; 0: all (fewer share the encoding of the overlays they are compared with)
JSON = False  # prints the figures of one size and way as a line of JSON: how the processes report

small_ids = "endoftext im_end image_pad video_pad latent_pad latent_start latent_end".split()
rope = {"rope_theta": 1e6, "rope_type": "default"}


def qwen(width, inner, layers, heads, groups, vision, **more):
    """The shape of a Qwen2.5-VL as settings of bench_dift."""
    text = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    part = width // heads // 8
    text |= {
        "rope_parameters": rope
        | {"mrope_section": [width // heads // 2 - 6 * part // 2, *[3 * part // 2] * 2]}
    }
    keys = ("hidden_size", "intermediate_size", "depth", "num_heads", "patch_size", "fullatt_block_indexes")
    return {
        "TEXT": text | {"vocab_size": 151668},
        "VISION": dict(zip(keys, vision)) | {"out_hidden_size": width},
    } | more


usual = {name: vars(bench_dift)[name] for name in "TEXT VISION IDS PAIRS HEIGHT WIDTH".split()}
frame = {"PAIRS": 18, "HEIGHT": 16, "WIDTH": 16}  # 36 frames of 256·28·28 pixels (release)
eyes = (1280, 3420, 32, 16, 14, [7, 15, 23, 31])
SHAPES = {
    "tiny": qwen(128, 384, 4, 4, 2, (64, 128, 2, 2, 14, [0, 1])),
    "45M": {},  # bench_dift's own
    "3B": qwen(2048, 11008, 36, 16, 2, eyes, **frame),
    "7B": qwen(3584, 18944, 28, 28, 4, eyes, **frame),
}
SHAPES["tiny"]["TEXT"]["vocab_size"] = 1024
SHAPES["tiny"]["IDS"] = {name: 1010 + number for number, name in enumerate(small_ids)}
UNTIED = ("7B",)


def choose(size, pairs=0, answers=8, new=64):
    """Makes bench_dift's and bench_grpo4d's settings those of one size."""
    vars(bench_dift).update(usual | SHAPES[size])
    bench_dift.PAIRS = pairs or bench_dift.PAIRS
    bench_dift.TIED = size not in UNTIED
    bench_grpo4d.video_grid = (bench_dift.PAIRS, 2 * bench_dift.HEIGHT, 2 * bench_dift.WIDTH)
    bench_grpo4d.G, bench_grpo4d.NEW = answers, new


# ---------------------------------------------------------------- counts from shapes


def linear(rows, inner, outer, train=False, count=1):
    """Products of a linear layer: (m, k, n, how often); backward: of its input and of its weight."""
    shapes = [(rows, inner, outer, count)]
    return shapes + train * [(rows, outer, inner, count), (inner, rows, outer, count)]


def attention(new, seen, size, share, train, count):
    """Products of one head: `new` queries on `seen` keys, a share of them not masked; backward twice that."""
    share *= count * (3 if train else 1)
    return [(new, size, seen, share), (new, seen, size, share)]


def text_products(rows, new, past=0, train=False, times=1, read=None):
    """The language model on `rows` sequences of `new` positions behind `past` others.

    read: positions whose last hidden state is asked for, where the last layer's MLP works; None: all.
    """
    t = bench_dift.TEXT
    D, inner, layers, heads = (
        t[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    )
    size, count = D // heads, layers * times
    narrow, m = size * t["num_key_value_heads"], rows * new
    shapes = linear(m, D, D, train, 2 * count) + linear(m, D, narrow, train, 2 * count)
    for some, often in ((m, count - times), (m if read is None else read, times)):
        shapes += linear(some, D, inner, train, 2 * often) + linear(some, inner, D, train, often)
    share = (past + (new + 1) / 2) / (past + new)  # causal
    return shapes + attention(new, past + new, size, share, train, count * rows * heads)


def vision_products(pairs, count=1):
    """The frozen visual encoder on a video of frame pairs, or `count` of them."""
    v, sides = bench_dift.VISION, (2 * bench_dift.HEIGHT, 2 * bench_dift.WIDTH)
    w, depth, heads = v["hidden_size"], v["depth"], v["num_heads"]
    n = pairs * math.prod(sides)  # patches
    shapes = (
        linear(n, 6 * v["patch_size"] ** 2, w)
        + linear(n, w, 3 * w, False, depth)
        + linear(n, w, w, False, depth)
    )
    shapes += linear(n, w, v["intermediate_size"], False, 2 * depth) + linear(
        n, v["intermediate_size"], w, False, depth
    )
    window = v.get("window_size", 112) // v["patch_size"]
    full = len(v["fullatt_block_indexes"])
    area = [min(window, side) for side in sides]
    windows = pairs * math.prod(math.ceil(side / part) for side, part in zip(sides, area))
    room = n / (windows * math.prod(area))  # windows at the edge are smaller
    shapes += attention(
        math.prod(area), math.prod(area), w // heads, room, False, (depth - full) * windows * heads
    )
    shapes += attention(math.prod(sides), math.prod(sides), w // heads, 1, False, full * pairs * heads)
    shapes += linear(n // 4, 4 * w, 4 * w) + linear(n // 4, 4 * w, v["out_hidden_size"])
    return [(m, k, o, c * count) for m, k, o, c in shapes]


def products(phase):
    """The matrix products that a phase needs -> [(m, k, n, how often)], m x k times k x n."""
    b, D, V = bench_dift, bench_dift.TEXT["hidden_size"], bench_dift.TEXT["vocab_size"]
    video, many, new = b.PAIRS * b.HEIGHT * b.WIDTH, bench_grpo4d.G, bench_grpo4d.NEW
    if phase == "dift":
        spoken = sum(b.SPOKEN) + 4
        T = b.BEFORE + video + b.AFTER + spoken + 2 * b.K
        return (
            vision_products(b.PAIRS)
            + vision_products(1, 2)
            + text_products(1, T, 0, True, read=spoken + 2 * b.K)
            + linear(spoken, D, V, True)
        )
    asked = bench_grpo4d.BEFORE + video + bench_grpo4d.AFTER
    if phase == "update":  # scored: all but latents and forced ends, of which a half has twice as many
        n = many * new - (many + many // 2) * (b.K + 1)
        made = []
        for train in (False, True):
            made += (
                text_products(1, asked, 0, train, read=1)
                + text_products(many, new, asked, train)
                + linear(n, D, V, train)
            )
        return made
    prompts, many = (1, many) if phase == "rollout" else (EVAL, EVAL)
    made = vision_products(b.PAIRS, prompts) + text_products(prompts, asked, read=prompts)
    made += linear(many, D, V, False, new)
    return made + text_products(many, 1, asked + new // 2, False, new - 1)


def flops(shapes):
    """Multiplications and additions of products."""
    return sum(2 * m * k * n * count for m, k, n, count in shapes)


def tokens(phase):
    """Positions that a phase reads (dift, update) or makes (rollout, evaluation)."""
    b = bench_dift
    video = b.PAIRS * b.HEIGHT * b.WIDTH
    if phase == "dift":
        return b.BEFORE + video + b.AFTER + sum(b.SPOKEN) + 4 + 2 * b.K
    return bench_grpo4d.NEW * (EVAL if phase == "evaluation" else bench_grpo4d.G)


@functools.cache
def product_seconds(m, k, n, dtype):
    """Time of one plain product, the best of some, after one to warm up."""
    a, b, best = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype), math.inf
    inner = max(1, round(2e7 / (m * k * n)))  # small ones many at a time
    for _ in range(3):
        best = min(best, timed(lambda: [a @ b for _ in range(inner)][:0])[1][0] / inner)
    return best


def floor_seconds(shapes):
    """Time of all products of a phase as plain ones; attention's masked half is left out by its count."""
    dtype = torch.bfloat16 if cuda() else torch.float32
    return sum(product_seconds(m, k, n, dtype) * count for m, k, n, count in shapes)


# ---------------------------------------------------------------- memory from shapes


def weights():
    """Numbers of weights (text with its head, vision) and of one table, from shapes."""
    t, v = bench_dift.TEXT, bench_dift.VISION
    D, w = t["hidden_size"], v["hidden_size"]
    table, layers = D * t["vocab_size"], t["num_hidden_layers"]
    narrow = D // t["num_attention_heads"] * t["num_key_value_heads"]
    text = layers * (2 * D * D + 2 * D * narrow + 3 * D * t["intermediate_size"] + 3 * D + 2 * narrow) + D
    text += table * (1 if bench_dift.TIED else 2)
    eye = 6 * v["patch_size"] ** 2 * w + v["depth"] * (4 * w * w + 3 * w * v["intermediate_size"])
    return text, eye + 16 * w * w + 4 * w * v["out_hidden_size"], table


def predict_memory(stage, rows=1, half=True, checkpointing=False, optimiser=True, chunk=1024, devices=1):
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
    b, t = bench_dift, bench_dift.TEXT
    (text, eye, table), item = weights(), 2 if half else 4
    D, layers, inner = t["hidden_size"], t["num_hidden_layers"], t["intermediate_size"]
    narrow = D // t["num_attention_heads"] * t["num_key_value_heads"]
    length, scored, again = tokens("dift"), rows * (sum(b.SPOKEN) + 4), 0
    if stage == "update":
        new, many = bench_grpo4d.NEW, bench_grpo4d.G
        asked = bench_grpo4d.BEFORE + b.PAIRS * b.HEIGHT * b.WIDTH + bench_grpo4d.AFTER
        length, scored = asked + many * new, rows * many * new
        again = item * rows * many * (asked + new) * 2 * D  # keys and values
        if checkpointing:
            length, again = many * (asked + new), 0
    count = rows * length
    whole = count * (16 * D + item * ((7 if half else 4) * D + 2 * narrow + 4 * inner)) + again  # of a layer
    mask = item * rows * many * new * (asked + new) if again else 0
    if stage == "dift":
        unread = count - scored - 2 * rows * b.K
    else:  # behind a shared prompt all of an answer is read, of the prompt its last position
        unread = count - scored if checkpointing else rows * (asked - 1)
    less = unread * (8 * D + item * ((2 if half else 1) * D + 4 * inner))
    kept = layers * (count * 4 * D if checkpointing else whole + mask) - less * (not checkpointing)
    kept += 8 * (count - unread) * D  # the last norm
    made = count * item * (2 * inner + 2 * D) + again  # gradients within one layer
    n, V = min(chunk, scored), t["vocab_size"]
    logits = max(6 * n * V + 2 * table, 6 * table) if half else 4 * n * V + 4 * table

    tables = table * (1 if b.TIED else 2)
    copies = 2 * text if half else 0  # of autocast
    copies = copies if devices == 1 else item * (tables + 2 * (text - tables) / layers)
    parts = {"weights": 4 * text / devices + 4 * eye + copies, "gradients": 4 * text / devices}
    parts["weights"] += 4 * text / devices * (stage == "update")  # the reference; its bf16 copies are let go
    parts |= {"moments": 8 * text / devices * optimiser, "activations": kept}
    highs = [kept + logits, kept + whole * checkpointing + made + 4 * table]  # of the head, the last layer
    highs += [whole + made + parts["gradients"]]  # of the first layer's backward
    return parts | {"peak": parts["weights"] + parts["moments"] + max(highs)}


def print_memory():
    """The table of predicted memory for 3B and 7B."""
    print(
        "Predicted GiB of one device, bf16 arithmetic, fp32 masters and AdamW, 256 tokens a frame pair, G 8"
    )
    print(
        f"{'size':6}{'stage':8}{'answer':>8}{'frames':>8}{'rows':>6}{'weights':>9}{'grads':>8}{'moments':>9}",
        end="",
    )
    print(f"{'activations':>13}{'peak':>8}{'checkpointed':>14}{'the same, FSDP on 8':>21}")
    for size in ("3B", "7B"):
        for stage, new in (("dift", 64), ("update", 256), ("update", 1024)):
            for frames in (10, 36, 50):
                for rows in (1, 2, 4) if stage == "dift" else (1,):
                    choose(size, frames // 2, 8, new)
                    made = predict_memory(stage, rows)
                    less = predict_memory(stage, rows, checkpointing=True)["peak"] / 2**30
                    cut = predict_memory(stage, rows, checkpointing=True, devices=8)["peak"] / 2**30
                    cells = [
                        made[name] / 2**30
                        for name in ("weights", "gradients", "moments", "activations", "peak")
                    ]
                    head = f"{size:6}{stage:8}{new if stage == 'update' else '':>8}{frames:8}{rows:6}"
                    print(
                        head
                        + "{:9.1f}{:8.1f}{:9.1f}{:13.1f}{:8.1f}".format(*cells)
                        + f"{less:14.1f}{cut:21.1f}"
                    )


# ---------------------------------------------------------------- measuring


def cuda():
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def timed(call, start=0):
    """-> what the call gives, [its seconds, the clock's, peak bytes above start]."""
    gc.collect()
    if cuda():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        bench_grpo4d.peak(reset=True)
    began, clock = time.process_time(), time.perf_counter()
    result = call()
    if cuda():
        torch.cuda.synchronize()
    clock = time.perf_counter() - clock
    own = clock if cuda() else time.process_time() - began
    return result, [own, clock, torch.cuda.max_memory_allocated() if cuda() else bench_grpo4d.peak() - start]


def allocated(call):
    """The most bytes that PyTorch has allocated at once during a call, above what it had before."""
    if cuda():
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            return timed(call)[1][2] - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    events = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(itertools.accumulate(size for _, size in events))


def held(*nets):
    """Bytes of the weights of some networks, shared ones once."""
    return sum(x.numel() * x.element_size() for x in {x for net in nets for x in net.parameters()})


def rounds(net, calls, start):
    """Rounds of calls, each taking what the last one gave -> {name: [seconds, clock, bytes]}."""
    figures = {name: [] for name in calls}
    for _ in range(1 + REPEATS):
        net.zero_grad(set_to_none=True)
        given = ()
        for name, call in calls.items():
            with torch.autocast("cuda", torch.bfloat16, enabled=cuda()):
                given, line = timed(functools.partial(call, *given), start)
            figures[name].append(line)
    net.zero_grad(set_to_none=True)
    kept = {name: list(zip(*(lines[1:] or lines))) for name, lines in figures.items()}
    return {name: [*map(statistics.median, columns[:2]), max(columns[2])] for name, columns in kept.items()}


def asked(net):
    """A Thinker of the network, a prompt and its images."""
    core = Thinker(net, bench_grpo4d.Words()).to(torch.get_default_device()).eval()
    core.net.config.latent_norm = None
    prompt, pixels, _ = bench_grpo4d.draw()
    images = bench_grpo4d.Pixels(core, cache=True)
    images.pixels = pixels
    return core, prompt, images


def decode_seconds(net):
    """Seconds of a rollout's NEW - 1 positions behind the prompt's: G rows of one token at a time."""
    core, prompt, images = asked(net)
    device = torch.get_default_device()

    def rollout(positions):
        dice = [torch.Generator(device).manual_seed(number) for number in range(G)]
        generate(core, [prompt], positions, images, 1.0, generators=dice)

    with torch.autocast("cuda", torch.bfloat16, enabled=cuda()):
        rollout(2)  # warms up, and keeps the video's features
        one, all_of_them = (timed(functools.partial(rollout, count))[1][0] for count in (1, NEW))
    return all_of_them - one


def evaluation(net, alone):
    """A call that answers EVAL questions greedily, one by one or all at once."""
    core, prompt, images = asked(net)
    samples = [prompt | {"video": (f"video {number}",)} for number in range(EVAL)]

    def call():
        images.kept.clear()
        core.eval()
        parts = [[sample] for sample in samples] if alone else [samples]
        return [len(made["ids"]) for part in parts for made in generate(core, part, bench_grpo4d.NEW, images)]

    return call


def evaluate_once(model, rows, size, questions):
    """Evaluates in batches of a size -> [seconds, of generation alone, both by the clock], texts by row."""
    spent, texts, inner, judge = [], {}, evaluate.generate, evaluate.judge

    def clocked(*words, **more):
        own, clock = time.process_time(), time.perf_counter()
        made = inner(*words, **more)  # reads its answers back, so a device is waited for
        spent.append((time.process_time() - own, time.perf_counter() - clock))
        return made

    def kept(row, index, answer, K):
        texts[index] = answer["text"]
        return judge(row, index, answer, K)

    evaluate.generate, evaluate.judge = clocked, kept
    try:
        line = timed(lambda: evaluate.evaluate(model, rows, how={"batch": size}, limit=questions))[1]
    finally:
        evaluate.generate, evaluate.judge = inner, judge
    own, clock = map(sum, zip(*spent))
    return [line[0], own, line[1], clock], texts


def by_batch(model, data, sizes, questions):
    """Evaluates a checkpoint once for each batch size, after a few questions to warm up; a line each."""
    rows, first = evaluate.read_bench("toy", data), None
    evaluate_once(model, rows, sizes[0], 4)
    print(" batch questions   all, s   gen, s  clock s   gen, s   ratio  of gen  changed")
    for size in sizes:
        seconds, texts = evaluate_once(model, rows, size, questions)
        first = first or (seconds, texts)
        ratios = [start / own for start, own in zip(first[0][:2], seconds)]
        changed = [index for index in texts if texts[index] != first[1][index]]
        line = f"{size:6}{len(texts):10}" + "{:9.2f}{:9.2f}{:9.2f}{:9.2f}{:8.2f}{:8.2f}".format(
            *seconds, *ratios
        )
        print(f"{line}{len(changed):9} {changed or ''}", flush=True)


def measure(way):
    """One size and way in this process -> {phase: [seconds, clock, bytes]}, and what was computed."""
    torch.set_num_threads(THREADS)
    if cuda():
        torch.set_default_device("cuda")
    start, naive, figures, peaks, decode = bench_dift.memory(), way == "naive", {}, {}, None
    if "dift" in PHASES.split():
        net = bench_dift.build()
        step = (bench_dift.common_step if naive else bench_dift.our_step)(net, bench_dift.draw())
        figures |= rounds(net, {"dift": step}, start)
        if not naive:
            peaks["dift"] = held(net) + allocated(step)
        del net, step
    if {"rollout", "update"} & set(PHASES.split()):
        policy, frozen = bench_grpo4d.nets()
        make = bench_grpo4d.naive_phases if naive else bench_grpo4d.our_phases
        picks = bench_grpo4d.model_file.pick
        rollout, refer, update = make(policy, frozen, *bench_grpo4d.draw())
        calls = {"rollout": rollout, "update": lambda *made: (update(*made, refer(*made))[0].item(),)}
        figures |= rounds(policy, calls, start)
        if not naive:
            peaks["update"] = held(policy, frozen) + allocated(functools.partial(calls["update"], *rollout()))
        bench_grpo4d.model_file.pick = picks
        decode = None if naive else decode_seconds(policy)
        del policy, frozen, rollout, refer, update, calls, make
    if "evaluation" in PHASES.split():
        net = bench_dift.build()
        made = evaluation(net, naive)
        figures |= rounds(net, {"evaluation": lambda: (made(),)[:0]}, start)
        del net, made
    if not naive:
        for name in figures:
            shapes = products(name)
            figures[name] += [flops(shapes), floor_seconds(shapes)]
    big = 4096 if cuda() else 1024
    rate = 2 * big**3 / product_seconds(big, big, big, torch.bfloat16 if cuda() else torch.float32)
    block = torch.empty(2**28 if cuda() else 2**25)
    copied = min(timed(lambda: block.clone())[1][0] for _ in range(3))
    rates = {"rate": rate, "bandwidth": 2 * 4 * block.numel() / copied}
    return {"phases": figures, "allocated": peaks, "decode": decode} | rates


def spawn(**constants):
    """Runs this file in a process of its own -> its figures; None if it failed, as for want of memory."""
    words = [f"{key}={value}" for key, value in constants.items()]
    env = os.environ | {"OMP_NUM_THREADS": str(THREADS), "MKL_NUM_THREADS": str(THREADS)}
    command = [sys.executable, __file__, *sys.argv[1:], *words, "GROWTH=False", "JSON=True"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{' '.join(words)} ended with code {done.returncode}; left out.", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def machine():
    """Device and versions, for the results."""
    name = torch.cuda.get_device_name() if cuda() else f"{platform.machine()}, {os.cpu_count()} cores"
    with_cpu = Path("/proc/cpuinfo")
    if not cuda() and with_cpu.is_file():
        models = [
            line.split(":")[1].strip()
            for line in with_cpu.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = f"{(models or ['CPU'])[0]}, {name}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, "threads": THREADS, "python": platform.python_version()} | versions


def compare(size):
    """Runs one size in both ways, prints its table -> figures."""
    results = {way: spawn(SIZES=size, WAY=way) for way in ("naive", "ours") if WAY in ("both", way)}
    results = {way: one for way, one in results.items() if one}
    choose(size, PAIRS, G, NEW)
    for way, one in results.items():
        for name, (seconds, clock, held, *_) in one["phases"].items():
            work = results.get("ours", {}).get("phases", {}).get(name, [0] * 5)
            line = f"{size:6}{name:12}{way:7}{seconds:9.3f}{clock:9.3f}"
            line += f"{tokens(name) / seconds:10.0f}{held / 2**20:9.0f}"
            if len(work) > 4 and work[4]:
                line += f"{work[3] / 1e9:10.1f}{work[4] / seconds:8.2f}{work[3] / seconds / one['rate']:7.2f}"
            old = results.get("naive", {}).get("phases", {}).get(name)
            if way == "ours" and old:
                line += f"{seconds / old[0]:8.3f}{held / old[2]:8.3f}"
            if way == "ours" and name in ("dift", "update"):
                predicted = predict_memory(name, 1, cuda(), optimiser=False)["peak"]
                line += f"   PyTorch's own: {one['allocated'][name] / predicted:.2f} of the predicted memory"
            if way == "ours" and name == "rollout":  # every weight of the text is read once a position
                item = 2 if cuda() else 4
                read = item * weights()[0] * (NEW - 1) / one["decode"] / one["bandwidth"]
                line += f"   {one['decode']:.3f} s of it decode, {read:.2f} of the memory's bandwidth"
            print(line, flush=True)
    return results


def growth(size):
    """Ours at the size's own and with frames, answer length or G doubled, printed -> figures."""
    choose(size, PAIRS, G, NEW)
    own = {"PAIRS": bench_dift.PAIRS, "NEW": NEW, "G": G}
    cases = {"own": own} | {name: own | {name: 2 * value} for name, value in own.items()}
    results = {case: spawn(SIZES=size, WAY="ours", **how) for case, how in cases.items()}
    base = results["own"]
    for case in own if base else ():
        for name, (seconds, _, held, work, _) in (results[case] or {"phases": {}})["phases"].items():
            first = base["phases"][name]
            if work == first[3]:
                continue  # this phase does not depend on it
            times, more = seconds / first[0], work / first[3]
            line = f"{size:6}2 x {case:8}{name:12}{times:9.2f}{more:12.2f}{times / more:9.2f}"
            print(f"{line}{held / first[2]:10.2f}", flush=True)
    return results


if __name__ == "__main__":
    constants = set_constants(globals())
    known = set(SIZES.split()) <= set(SHAPES)
    check(known, f"SIZES={SIZES} names another size than: {' '.join(SHAPES)}.")
    check(WAY in ("both", "naive", "ours"), f"WAY={WAY} is none of: both naive ours.")
    check(NEW >= 8 * (bench_dift.K + 2) and G >= 2, f"NEW={NEW} G={G}: too few for latent blocks in groups.")
    if JSON:
        choose(SIZES, PAIRS, G, NEW)
        print(json.dumps(measure(WAY)))
        sys.exit()
    if MEMORY:
        print_memory()
        sys.exit()
    about = machine()
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    if MODEL:
        torch.set_num_threads(THREADS)
        model = load_model(MODEL, "cuda" if cuda() else "cpu")
        by_batch(model, DATA, [int(size) for size in BATCHES.split()], QUESTIONS)
        sys.exit()
    if GROWTH:
        print(
            f"{'size':6}{'change':12}{'phase':12}{'time x':>9}{'products x':>12}{'ratio':>9}{'memory x':>9}"
        )
    else:
        print(
            f"{'size':6}{'phase':12}{'way':7}{'s':>9}{'clock s':>9}{'tok/s':>10}{'MiB':>9}{'GFLOP':>10}",
            end="",
        )
        print(f"{'share':>8}{'mfu':>7}{'time':>8}{'memory':>8}")
    results = {size: (growth if GROWTH else compare)(size) for size in SIZES.split()}
    if OUT:
        Path(OUT).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT).write_text(
            json.dumps({"machine": about, "constants": constants, "results": results}, indent=1)
        )
        print(f"{OUT}")
