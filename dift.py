"""Dynamic-Imagery Fine-Tuning (paper Sec. 3.2): text by cross-entropy, imagery by cosine, vision frozen.

In: a Qwen2.5-VL checkpoint (MODEL) and rows whose chain of thought holds `<output_image>` (DATA, see generate_data.py).
Out: OUT/step_*/ (checkpoints), OUT/log.jsonl, and after the last step OUT/eval/ with scores, picture and report.

    python dift.py                                   # laptop: toy data is made first, then about 10 minutes
    torchrun dift.py                                 # the same
    torchrun --nproc_per_node=8 dift.py MODEL=Qwen2.5-VL-3B-Instruct DATA=data/dift_data.jsonl POOLING=strips LR=1e-5 ...

Differs from the paper:
- `grid` pooling by default: `strips` averages left and right away at the toy's resolution (ours)
- cosine is also logged centred per latent index, with retrieval@1: the plain one falls for any constant (ours)
- sums over all-reduced counts: the number of devices and of micro-batches does not change a step (ours)
"""

import contextlib
import itertools
import json
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.nn.parallel import DistributedDataParallel

import evaluate
from model import (
    Images,
    all_sum,
    collate,
    encode_row,
    init_distributed,
    load_model,
    load_optimizer,
    newest_checkpoint,
    read_rows,
    save_checkpoint,
    set_constants,
)

# --- paths
MODEL = "assets/tiny"  # checkpoint folder to start from: the bundled tiny base, or any Qwen2.5-VL
DATA = "out/toy"  # folder made by generate_data.py, or one jsonl file; the toy world is made if it is missing
OUT = "out/dift"  # checkpoints, log, evaluation
# --- data
COT = "imagery"  # imagery | noimage | verbal: which chain of thought of a generated folder to learn (ours)
TEST_ROWS = 600  # held-out rows scored at the end, at most
MAX_PIXELS = None  # pixels of a frame; None: the checkpoint's own, or 256·28·28 (release)
MIN_PIXELS = None  # None: the checkpoint's own, or 28·28 (release)
SECONDS_PER_PAIR = None  # None: real time; 1.0: as the release trains, 2.0: as it evaluates
SUFFIX = ""  # instruction after the question; "": the checkpoint's own; @file reads one
# --- model
K = 4  # latents per image (release); 0: a stage without imagery (pretraining of the tiny base)
POOLING = "grid"  # grid (ours) | strips (paper): how overlay tokens become K latents, Eq. 5
MATCH_NORM = False  # True: latents fed back at inference are scaled to the mean norm of the targets (ours)
TRAIN_VISION = False  # True only for pretraining (paper: frozen)
# --- optimisation
STEPS = 1000  # optimiser steps
GLOBAL_BATCH = 32  # rows of one step over all devices (release: 8)
MICRO_BATCH = 32  # rows of one forward pass on one device; accumulation follows from it
LR = 1e-3  # peak learning rate (release: 1e-5 for the 3B model)
WARMUP = 50  # steps of linear warm-up, then linear decay to zero (release: 10)
WEIGHT_DECAY = 0.01  # (release)
CLIP = 1.0  # largest norm of the gradient (release)
W_CE = 1.0  # weight of the text loss in Eq. 7 (release: 0.1)
W_SIM = 1.0  # weight of the imagery loss in Eq. 7 (release)
# --- logging
LOG_EVERY = 10  # steps between printed lines; every step goes to the log file
EVAL_EVERY = 250  # steps between small evaluations (accuracy and retrieval@1 on 64 held-out rows); 0: never
SAVE_EVERY = 250  # steps between checkpoints
# --- system
RESUME = "auto"  # auto: go on from the newest checkpoint in OUT | never: start afresh
CACHE_FEATURES = True  # keep frozen-vision features in memory, so that a clip is encoded once
CHECKPOINTING = False  # activation checkpointing: less memory, a third more time, the same numbers
SEED = 0  # of the data order


def dift_loss(logp, imagined, targets, n_text, n_latent, w_ce, w_sim):
    """Eq. 7: L = w_ce·ce + w_sim·sim, as sums over the step's counts on all devices -> (loss, ce, sim), each ().

    logp (n,) of supervised tokens; imagined (m, D) = h_{t-1} and targets (m, D) = z_t at latent positions t.
    """
    ce = -logp.sum() / n_text
    sim = logp.new_zeros(())
    if n_latent:
        sim = (1 - F.cosine_similarity(imagined.float(), targets.float().detach(), dim=-1)).sum() / n_latent
    return w_ce * ce + w_sim * sim, ce, sim


@torch.no_grad()
def measure(loss, ce, sim, imagined, targets, K):
    """Sums of a micro-batch for the log: loss, ce, sim, centred cosine, norm of h, norm of z over latents -> (6,).

    The cosine is centred by the batch mean per latent index: pooled features share one direction, so the plain one
    is near 1 even for the wrong image.
    """
    sums = torch.stack([loss, ce, sim, *loss.new_zeros(3)])
    if targets is not None:
        h, z = (x.float().view(-1, K, x.shape[-1]) for x in (imagined, targets))  # (blocks, K, D)
        sums[3] = F.cosine_similarity(h - h.mean(dim=0), z - z.mean(dim=0), dim=-1).sum()
        sums[4] = h.norm(dim=-1).sum()
        sums[5] = z.norm(dim=-1).sum()
    return sums


def lr_at(step, steps, warmup, peak):
    """Linear warm-up to `peak`, then linear decay that would reach zero at `steps`; step counts from 0."""
    return peak * min((step + 1) / max(1, warmup), (steps - step) / max(1, steps - warmup))


def rows_of_step(step, count, batch, seed):
    """Indices of a step's global batch: a walk through one shuffle an epoch, a function of (seed, step) alone."""
    positions = range(step * batch, (step + 1) * batch)
    epochs = {position // count for position in positions}
    orders = {epoch: random.Random(f"{seed}-{epoch}").sample(range(count), count) for epoch in epochs}
    return [orders[position // count][position % count] for position in positions]


def split_files(data, cot):
    """The training and the held-out file of DATA: of a generated folder by COT, or of one jsonl file by its name.

    A lone file is scored on `<name>_test.jsonl` beside it, or else on itself, which is no held-out score.
    """
    data = Path(data)
    if data.suffix != ".jsonl":
        return data / f"train_{cot}.jsonl", data / f"test_{cot}.jsonl"
    test = data.with_name(f"{data.stem}_test.jsonl")
    return data, test if test.is_file() else data


def describe(sample, model):
    """A sample as text, run by run: what is neither supervised nor imagery, [supervised], {imagery}."""
    parts = []
    kinds = torch.where(sample["is_latent"], 2, torch.where(sample["is_text"], 1, 0)).tolist()
    for kind, run in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        text = model.tok.decode(sample["ids"][list(run)])
        parts.append(("%s", "[%s]", "{%s}")[kind] % text)
    return re.sub(r"(<\|video_pad\|>)+", lambda pads: f"<|video_pad|> x {len(pads[0]) // 13}", "".join(parts))


def groups_for_decay(model, weight_decay):
    """AdamW's parameter groups: matrices decay; norms and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = [parameter for parameter in trained if parameter.ndim > 1]
    plain = [parameter for parameter in trained if parameter.ndim <= 1]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


if __name__ == "__main__":
    constants = set_constants(globals())
    rank, world, device = init_distributed()
    if GLOBAL_BATCH % world:
        sys.exit(f"GLOBAL_BATCH={GLOBAL_BATCH} is no multiple of the {world} processes; change one of them.")
    say = print if rank == 0 else (lambda *words, **how: None)

    # data: the toy world is made where there is none
    if rank == 0 and not Path(DATA).exists() and Path(DATA).suffix != ".jsonl":
        subprocess.run(
            [sys.executable, Path(__file__).with_name("generate_data.py"), f"OUT={DATA}"], check=True
        )
    if world > 1:
        dist.barrier()
    train_file, test_file = split_files(DATA, COT)
    rows = read_rows(train_file)
    test_rows = read_rows(test_file, TEST_ROWS) if TEST_ROWS else []

    # model
    folders = sorted(Path(OUT).glob("step_*/config.json")) if RESUME == "auto" else []
    parent = folders[-1].parent if folders else newest_checkpoint(MODEL)
    start = json.loads(folders[-1].read_text())["run"]["step"] if folders else 0
    words = Path(SUFFIX[1:]).read_text() if SUFFIX.startswith("@") else SUFFIX
    pixels = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "seconds_per_pair": SECONDS_PER_PAIR}
    core = load_model(parent, device, K, POOLING, words, **pixels)
    core.net.model.visual.requires_grad_(TRAIN_VISION)
    if CHECKPOINTING:
        core.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = DistributedDataParallel(core, find_unused_parameters=TRAIN_VISION) if world > 1 else core
    images = Images(core, cache=CACHE_FEATURES and not TRAIN_VISION)
    optimizer = torch.optim.AdamW(groups_for_decay(core, WEIGHT_DECAY), lr=LR)
    if start:
        load_optimizer(parent, core, optimizer)

    # log
    Path(OUT).mkdir(parents=True, exist_ok=True)
    log = Path(OUT) / "log.jsonl"
    if rank == 0:
        kept = log.read_text().splitlines()[:start] if start else []
        log.write_text("".join(line + "\n" for line in kept))
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    say(f"dift: {parent} -> {OUT}, {len(rows)} rows, step {start} of {STEPS}, {world} x {device.type}")
    say(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {trained / 1e6:.2f} M trainable parameters"
    )
    say(" ".join(f"{name}={value}" for name, value in constants.items()))
    say("first sample, [supervised] and {imagery}:", describe(encode_row(core, rows[0]), core), sep="\n")

    retrieval = math.nan
    for step in range(start, STEPS):
        began = time.time()
        lr = lr_at(step, STEPS, WARMUP, LR)
        for group in optimizer.param_groups:
            group["lr"] = lr
        mine = rows_of_step(step, len(rows), GLOBAL_BATCH, SEED)[rank::world]
        samples = sorted((encode_row(core, rows[index]) for index in mine), key=lambda s: len(s["ids"]))
        micros = [samples[at : at + MICRO_BATCH] for at in range(0, len(samples), MICRO_BATCH)]
        counts = [sum(int(s[name].sum()) for s in samples) for name in ("is_text", "is_latent")]
        n_text, n_latent = all_sum(counts, device)
        core.train()
        sums = torch.zeros(6, device=device)
        for number, micro in enumerate(micros):
            batch = images.add(collate(micro, core.ids["pad"]), device)
            last = number == len(micros) - 1
            with contextlib.nullcontext() if last or world == 1 else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logp, imagined, targets = model(batch)
                    loss, ce, sim = dift_loss(logp, imagined, targets, n_text, n_latent, W_CE, W_SIM)
                (loss * world).backward()  # DDP takes the mean over processes, Eq. 7 the sum
            sums += measure(loss, ce, sim, imagined, targets, K)
        gnorm = torch.nn.utils.clip_grad_norm_(core.parameters(), CLIP).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        core.eval()

        # log and checkpoint
        loss, ce, sim, *shape = all_sum(sums.tolist(), device)
        cosine, norm_h, norm_z = (x / max(1, n_latent) for x in shape)
        entry = {
            "step": step + 1,
            "loss": loss,
            "ce": ce,
            "sim": sim,
            "cosine": cosine,
            "retrieval": retrieval,
        }
        entry |= {
            "gnorm": gnorm,
            "lr": lr,
            "latents": n_latent / GLOBAL_BATCH,
            "norm_fed": norm_h,
            "norm_true": norm_z,
        }
        seconds = time.time() - began
        entry |= {"seconds": seconds, "tokens": sum(all_sum([sum(len(s["ids"]) for s in samples)], device))}
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if (step + 1) % LOG_EVERY == 0 or step + 1 == STEPS:
            say(
                f"step {step + 1:5d}/{STEPS} | loss {loss:.4f} = {W_CE} x ce {ce:.4f} + {W_SIM} x sim {sim:.4f}"
                f" | cosine {cosine:.2f} | retrieval {retrieval:.2f} | gnorm {gnorm:.2f} | lr {lr:.1e}"
                f" | latents {n_latent / GLOBAL_BATCH:.1f} | {seconds:.2f} s | {entry['tokens'] / seconds / 1e3:.1f}k tok/s",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
            if rank == 0:
                save_checkpoint(
                    OUT, step + 1, core, {"stage": "dift", "parent": str(parent), **constants}, optimizer
                )
            if world > 1:
                dist.barrier()
