"""Dynamic-Imagery Fine-Tuning (paper Sec. 3.2): text by cross-entropy, imagery by cosine, vision frozen.

In:  a Qwen2.5-VL checkpoint (MODEL) and rows whose chain of thought holds `<output_image>` (DATA).
Out: OUT/step_*/ (checkpoints), OUT/log.jsonl, and after the last step OUT/eval/ with scores, picture, report.

    python dift.py                                        # laptop: the toy data is made first if missing
    python dift.py MODEL=Qwen2.5-VL-3B-Instruct DATA=data/dift_data.jsonl POOLING=strips LR=1e-5 \\
        WARMUP=10 BETA2=0.999 MICRO_BATCH=1 TEST_BATCH=8 W_CE=0.1 W_SIM=1.0 \\
        CHECKPOINTING=True CACHE_FEATURES=False           # one GPU
    torchrun --nproc_per_node=8 dift.py ...               # the same run on eight; PARALLEL=fsdp for 7B

Differs from the paper:
- `grid` pooling by default: `strips` averages left and right away at the toy's resolution (ours)
- cosine is also logged centred per latent index, with retrieval@1: the plain one tells little (ours)
- sums over the whole step's counts: the number of devices and of micro-batches does not change a step (ours)
- with MATCH_NORM hidden states are fed back with the norm of the targets they were trained to be (ours)
"""

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers

import evaluate
from assets.fsdp import full, whole
from model import Images, all_sum, check, checkpoint_layers, collate, encode_row, init_distributed
from model import load_model, load_optimizer, parallelise, read_rows, rows_of_step, save_checkpoint
from model import set_constants

# --- paths
MODEL = "assets/tiny"  # checkpoint folder to start from: the bundled tiny base, or any Qwen2.5-VL
DATA = "out/toy"  # folder made by generate_data.py, or one jsonl file; the toy world is made if it is missing
OUT = "out/dift"  # checkpoints, log, evaluation
# --- data
COT = "imagery"  # imagery | noimage | verbal: which chain of thought of a generated folder to learn (ours)
TEST_ROWS = 1000  # held-out rows scored at the end, at most; 0: no evaluation
TEST_BATCH = 64  # of them answered at once on one device
MAX_PIXELS = None  # pixels of a frame; None: the checkpoint's own, or 256·28·28 (release)
MIN_PIXELS = None  # None: the checkpoint's own, or 28·28 (release)
SECONDS_PER_PAIR = None  # None: real time; 1.0: as the release trains, 2.0: as it evaluates
SUFFIX = ""  # instruction after the question; "": the checkpoint's own; @file reads one
# --- model
K = 4  # latents per image (release); 0: a stage without imagery (pretraining of the tiny base)
POOLING = "grid"  # grid (ours) | strips (paper): how overlay tokens become K latents, Eq. 5
MATCH_NORM = True  # at inference, hidden states are fed back with the mean norm of the targets (ours)
TRAIN_VISION = False  # True only for pretraining (paper: frozen)
SUPERVISE = "all"  # all | letters: what the text loss sees; option letters alone for pretraining (ours)
# --- optimisation
STEPS = 2500  # optimiser steps
GLOBAL_BATCH = 8  # rows of one step over all devices (release)
MICRO_BATCH = 4  # rows of one forward pass on one device; accumulation follows from it
LR = 2e-3  # peak learning rate (release: 1e-5 for the 3B model)
WARMUP = 100  # steps of linear warm-up, then linear decay to zero (release: 10)
BETA2 = 0.95  # of AdamW: how much of the second moment each step keeps (release: 0.999)
WEIGHT_DECAY = 0.01  # (release)
CLIP = 1.0  # largest norm of the gradient (release)
W_CE = 1.0  # weight of the text loss in Eq. 7 (release: 0.1)
W_SIM = 0.3  # weight of the imagery loss in Eq. 7 (release: 1.0)
# --- logging
LOG_EVERY = 20  # steps between printed lines, 0: the last alone; every step goes to the log file
EVAL_EVERY = 500  # steps between looks at retrieval@1 on 64 held-out rows; 0: never
SAVE_EVERY = 500  # steps between checkpoints; 0: the last alone
# --- system
RESUME = "auto"  # auto: go on from the newest checkpoint in OUT | never: start afresh
CACHE_FEATURES = True  # keep frozen-vision features in memory, so that a clip is encoded once
PARALLEL = "ddp"  # with torchrun. ddp: each device holds all | fsdp: weights and moments are cut up
CHECKPOINTING = False  # activation checkpointing: less memory, a third more time, the same numbers
SEED = 0  # of the data order

kept_on_resume = "MODEL DATA COT MAX_PIXELS MIN_PIXELS SECONDS_PER_PAIR SUFFIX K POOLING MATCH_NORM"
kept_on_resume += " TRAIN_VISION SUPERVISE GLOBAL_BATCH LR WARMUP BETA2 WEIGHT_DECAY CLIP W_CE W_SIM SEED"


def dift_loss(logp, imagined, targets, n_text, n_latent, w_ce, w_sim):
    """Eq. 7: L = w_ce·ce + w_sim·sim, sums over the step's counts on all devices -> (loss, ce, sim), each ().

    logp (n,) of supervised tokens; imagined (m, D) = h_{t-1} and targets (m, D) = z_t at latent positions t.
    """
    ce = -logp.sum() / n_text
    sim = logp.new_zeros(())
    if n_latent and targets is not None:  # a micro-batch may have no imagery in a step that has some
        sim = (1 - F.cosine_similarity(imagined.float(), targets.float().detach(), dim=-1)).sum() / n_latent
    return w_ce * ce + w_sim * sim, ce, sim


@torch.no_grad()
def measure(loss, ce, sim, imagined, targets, K):
    """A micro-batch for the log -> (6,): loss, ce, sim; sums over latents of cosine, norm of h, norm of z.

    The cosine is centred by the micro-batch's mean per latent index: pooled features share one direction, so
    the plain one is near 1 even for the wrong image. In micro-batches of a few blocks it tells little.
    """
    sums = torch.stack([loss, ce, sim, *loss.new_zeros(3)])
    if targets is not None:
        h, z = (x.float().view(-1, K, x.shape[-1]) for x in (imagined, targets))  # (blocks, K, D)
        cosine = F.cosine_similarity(h - h.mean(dim=0), z - z.mean(dim=0), dim=-1)
        sums[3:] = torch.stack([cosine.sum(), h.norm(dim=-1).sum(), z.norm(dim=-1).sum()])
    return sums


def lr_at(step, steps, warmup, peak):
    """Linear warm-up to `peak`, then linear decay that would reach zero at `steps`; step counts from 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def split_files(data, cot):
    """Training and held-out file of DATA: of a generated folder by COT, or one jsonl file and its twin.

    A lone file is scored on `<name>_test.jsonl` beside it, or else on itself, which is no held-out score.
    """
    data = Path(data)
    if data.suffix != ".jsonl":
        return data / f"train_{cot}.jsonl", data / f"test_{cot}.jsonl"
    test = data.with_name(f"{data.stem}_test.jsonl")
    return data, test if test.is_file() else data


def narrow(sample, tokens):
    """A sample of whose supervised tokens only those among `tokens` (n,) stay so; all, if that is empty."""
    return sample | {"is_text": sample["is_text"] & (torch.isin(sample["ids"], tokens) | (not len(tokens)))}


def micro_batches(model, images, rows, letters, size, rank=0, world=1):
    """The rows of a step -> micro-batches of this process with their images, and counts on all devices.

    Sorted by length before they are dealt out and cut, so that little is padding: of lengths 1 to 8 in
    micro-batches of 2 the first of two processes has 1 3 | 5 7. Counts: supervised, latent, real tokens.
    """
    samples = sorted((narrow(encode_row(model, row), letters) for row in rows), key=lambda s: len(s["ids"]))
    counts = [sum(int(s[name].sum()) for s in samples) for name in ("is_text", "is_latent", "is_real")]
    mine = samples[rank::world]
    parts = [collate(mine[at : at + size], model.ids["pad"]) for at in range(0, len(mine), size)]
    return [images.add(part, model.banned.device) for part in parts], counts


def describe(sample, model):
    """A sample as text, run by run: what is neither supervised nor imagery, [supervised], {imagery}."""
    parts = []
    kinds = torch.where(sample["is_latent"], 2, torch.where(sample["is_text"], 1, 0)).tolist()
    for kind, run in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        text = model.tok.decode(sample["ids"][list(run)])
        parts.append(("%s", "[%s]", "{%s}")[kind] % text)
    return re.sub(r"(<\|video_pad\|>)+", lambda pads: f"<|video_pad|> x {len(pads[0]) // 13}", "".join(parts))


def log_line(entry, steps, w_ce, w_sim):
    """One step as a line of the log."""
    shown = entry | {"retrieval": math.nan if entry["retrieval"] is None else entry["retrieval"]}
    shown |= {"steps": steps, "rate": entry["tokens"] / entry["seconds"] / 1e3, "w_ce": w_ce, "w_sim": w_sim}
    parts = ["step {step:5d}/{steps}", "loss {loss:.4f} = {w_ce:g} x ce {ce:.4f} + {w_sim:g} x sim {sim:.4f}"]
    parts += ["cosine {cosine:.2f}", "retrieval {retrieval:.2f}", "gnorm {gnorm:.2f}", "lr {lr:.1e}"]
    parts += ["latents {latents:.1f}", "{seconds:.2f} s", "{rate:.1f}k tok/s"]
    return " | ".join(parts).format(**shown)


if __name__ == "__main__":
    constants = set_constants(globals())
    rank, world, device = init_distributed()
    for name, known in {"RESUME": "auto never", "SUPERVISE": "all letters", "PARALLEL": "ddp fsdp"}.items():
        check(constants[name] in known.split(), f"{name}={constants[name]} is none of: {known}.")
    check(PARALLEL == "ddp" or not TRAIN_VISION, "PARALLEL=fsdp needs frozen vision; set PARALLEL=ddp.")
    check(GLOBAL_BATCH % world == 0, f"GLOBAL_BATCH={GLOBAL_BATCH} is no multiple of the {world} processes.")
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words, **how: None

    # data: the toy world is made where there is none, or a part of one (its test files come last)
    train_file, test_file = split_files(DATA, COT)
    generated = not Path(DATA).exists() or Path(DATA, "constants.json").exists()
    if rank == 0 and generated and not test_file.exists() and Path(DATA).suffix != ".jsonl":
        made = subprocess.run([sys.executable, Path(__file__).with_name("generate_data.py"), f"OUT={DATA}"])
        check(made.returncode == 0, f"generate_data.py could not make {DATA}; see above.")
    all_sum([0], device)  # all wait for it
    rows = read_rows(train_file)
    test_rows = [row for row in read_rows(test_file) if row["key"] in row["options"]] if TEST_ROWS else []

    # model: from the newest checkpoint in OUT, or from MODEL
    done = sorted(Path(OUT).glob("step_*/config.json")) if RESUME == "auto" else []
    run = json.loads(done[-1].read_text())["run"] if done else {"step": 0, **constants}
    for name in kept_on_resume.split():
        same = run.get(name) == constants[name]
        check(same, f"OUT={OUT} holds a run with {name}={run.get(name)}; set another OUT, or RESUME=never.")
    parent, start = done[-1].parent if done else MODEL, run["step"]
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "seconds_per_pair": SECONDS_PER_PAIR}
    core = load_model(parent, device, K, POOLING, SUFFIX, **pixels)
    core.net.model.visual.requires_grad_(TRAIN_VISION)
    if CHECKPOINTING:
        checkpoint_layers(core.net)
    model = parallelise(core, PARALLEL, device)
    letters = torch.tensor(core.tok.convert_tokens_to_ids(list("ABCDEF" if SUPERVISE == "letters" else "")))
    images = Images(core, cache=CACHE_FEATURES and not TRAIN_VISION)
    split = {"rank": rank, "world": world, "images": images, "how": {"batch": TEST_BATCH}}
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, (0.9, BETA2), weight_decay=WEIGHT_DECAY, fused=True)
    if start:
        load_optimizer(parent, core, optimizer)

    # log
    log = Path(OUT) / "log.jsonl"
    lines = log.read_text().splitlines()[:start] if start and rank == 0 else []
    if rank == 0:
        afresh = list(Path(OUT).glob("step_*")) if start == 0 else []
        for old in [*afresh, *[Path(OUT) / "eval"] * (start < STEPS)]:  # of another run; of fewer steps
            shutil.rmtree(old, ignore_errors=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(line + "\n" for line in lines))
    retrieval = json.loads(lines[-1])["retrieval"] if lines else None
    count = sum(parameter.numel() for parameter in trained) / 1e6
    say(f"{parent} -> {OUT} | {train_file}: {len(rows)} rows, {len(test_rows)} to score | {world} x {device}")
    say(f"torch {torch.__version__}, transformers {transformers.__version__}, {count:.2f} M trained weights")
    say(" ".join(f"{name}={value}" for name, value in constants.items()))
    say("first sample: [supervised], {imagery}\n", describe(narrow(encode_row(core, rows[0]), letters), core))
    if test_rows and test_file == train_file:
        say(f"{train_file} has no held-out twin: the score at the end is on training rows.")

    def prepare(step):
        """The micro-batches and counts of a step."""
        some = [rows[index] for index in rows_of_step(step, len(rows), GLOBAL_BATCH, SEED)]
        return micro_batches(core, images, some, letters, MICRO_BATCH, rank, world)

    thread, coming = ThreadPoolExecutor(1), None
    for step in range(start, STEPS):
        began = time.time()
        batches, (n_text, n_latent, tokens) = coming.result() if coming else prepare(step)
        # the next one is made ready while this one runs, on a GPU; a CPU is busy enough with this one
        coming = thread.submit(prepare, step + 1) if device.type == "cuda" and step + 1 < STEPS else None
        lr = optimizer.param_groups[0]["lr"] = lr_at(step, STEPS, WARMUP, LR)
        core.train()
        sums = torch.zeros(6, device=device)
        for number, batch in enumerate(batches, 1):
            with contextlib.nullcontext() if number == len(batches) or model is core else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logp, imagined, targets = model(batch)
                    loss, ce, sim = dift_loss(logp, imagined, targets, n_text, n_latent, W_CE, W_SIM)
                (loss * world).backward()  # of processes the mean is taken, Eq. 7 takes the sum
            sums += measure(loss, ce, sim, imagined, targets, K)
        gnorm = full(torch.nn.utils.clip_grad_norm_(core.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        core.eval()

        # the log of a step, and at times retrieval@1 and a checkpoint
        *parts, positions = all_sum([*sums.tolist(), sum(batch["ids"].numel() for batch in batches)], device)
        parts[3:] = [x / max(1, n_latent) for x in parts[3:]]
        entry = {"step": step + 1} | dict(zip("loss ce sim cosine norm_fed norm_true".split(), parts))
        if n_latent:
            core.net.config.latent_norm = parts[5] if MATCH_NORM else None
        if test_rows and n_latent and EVAL_EVERY and (step + 1) % EVAL_EVERY == 0:
            with whole(core):
                retrieval = evaluate.evaluate(core, test_rows, limit=64, **split)["imagery"]["retrieval"]
        entry |= {"retrieval": retrieval, "gnorm": gnorm.item(), "lr": lr, "latents": n_latent / GLOBAL_BATCH}
        entry |= {"padding": 1 - tokens / positions, "seconds": time.time() - began, "tokens": tokens}
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if (LOG_EVERY and (step + 1) % LOG_EVERY == 0) or step + 1 == STEPS:
            say(log_line(entry, STEPS, W_CE, W_SIM))
        if (SAVE_EVERY and (step + 1) % SAVE_EVERY == 0) or step + 1 == STEPS:
            save_checkpoint(OUT, step + 1, core, constants, optimizer)

    # scores, picture and report
    if test_rows:
        out = Path(OUT) / "eval"
        with whole(core):
            summary = evaluate.evaluate(core, test_rows, out, limit=TEST_ROWS, **split)
            if rank == 0:
                evaluate.print_table(summary)
                evaluate.draw(core, test_rows, out, log)
                say(f"{out}/summary.json, {out}/picture.png, {out}/report.html")
    if world > 1:
        dist.destroy_process_group()
