r"""Dynamic-Imagery Fine-Tuning (paper Sec. 3.2): text by cross-entropy, imagery by cosine, vision frozen.

In:  a Qwen2.5-VL checkpoint (MODEL) and rows whose chain of thought holds `<output_image>` (DATA).
Out: OUT/step_*/ (checkpoints), OUT/log.jsonl, and after the last step OUT/eval/ with scores, picture, report.

    python dift.py                                        # laptop: the toy data is made first if missing
    python dift.py MODEL=Qwen2.5-VL-3B-Instruct DATA=data/dift_data.jsonl POOLING=strips LR=1e-5 \
        K=4 GLOBAL_BATCH=8 WARMUP=10 BETA2=0.999 MICRO_BATCH=1 TEST_BATCH=8 W_CE=0.1 W_SIM=1.0 \
        W_SIM_END=1.0 CHECKPOINTING=True CACHE_FEATURES=False OUT=out/dift_3b    # one GPU
    torchrun --nproc_per_node=8 dift.py ...               # the same run on eight; PARALLEL=fsdp for 7B

Differs from the paper:
- `grid` pooling by default: `strips` averages left and right away at the toy's resolution (ours)
- cosine is also logged centred per latent index: the plain one tells little (ours)
- object@1 among the things of the clip and retrieval@1 among other clips say what was imagined (ours)
- sums over the whole step's counts: the number of devices and of micro-batches does not change a step (ours)
- the imagery loss weighs less from step to step, W_SIM to W_SIM_END: imagery is learned first (ours)
- with MATCH_NORM hidden states are fed back with the norm of the targets they were trained to be (ours)
"""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import evaluate
from lib.checkpoints import clear_run, linear_warmup_decay, load_optimizer, open_run
from lib.command_line import override_constants, require
from lib.distributed import all_reduce_sum, autocast, barrier, end_distributed, full_tensor
from lib.distributed import init_distributed, no_sync, print0, require_shares
from lib.distributed import whole_weights, wrap_parallel
from lib.fast import checkpoint_layers
from lib.log import add_sums, describe_sample, is_due, log_line, print_header
from lib.rows import read_rows, rows_of_step, with_keys
from model import VisionCache, collate, encode_row, load_model

# --- paths
MODEL = "assets/tiny"  # checkpoint folder to start from: the bundled tiny base, or any Qwen2.5-VL
DATA = "out/toy"  # folder made by generate_data.py, or one jsonl file; the toy world is made if it is missing
OUT = "out/dift"  # checkpoints, log, evaluation
# --- data
COT = "imagery"  # imagery, noimage or verbal: which chain of thought of a generated folder to learn (ours)
TEST_ROWS = 1000  # >= 0; held-out rows scored at the end, at most; 0: no evaluation
TEST_BATCH = 64  # >= 1; of them answered at once on one device
MAX_PIXELS = None  # 1 to 1e8, whole; pixels of a frame; None: the checkpoint's own, or 256·28·28 (release)
MIN_PIXELS = None  # 1 to 1e8, whole; None: the checkpoint's own, or 28·28 (release)
SECONDS_PER_PAIR = None  # > 0, <= 1e6; None: the checkpoint's own, or real time (release: 1.0, scored at 2.0)
SUFFIX = ""  # instruction after the question; "": the checkpoint's own; @file reads one
# --- model
K = 8  # 0 to 4096; latents per image (release: 4); 0: a stage without imagery (pretraining of the tiny base)
POOLING = "grid"  # grid (ours) or strips (paper): how overlay tokens become K latents, Eq. 5
MATCH_NORM = True  # at inference, hidden states are fed back with the mean norm of the last targets (ours)
# --- optimisation
STEPS = 5000  # >= 0; optimiser steps
GLOBAL_BATCH = 4  # 1 to 1e6; rows of one step over all devices (release: 8)
MICRO_BATCH = 4  # >= 1; rows of one forward pass on one device; accumulation follows from it
LR = 2e-3  # > 0, <= 100; peak learning rate (release: 1e-5 for the 3B model)
WARMUP = 100  # >= 0; steps of linear warm-up, then linear decay to zero (release: 10)
BETA2 = 0.95  # >= 0, < 1; of AdamW: how much of the second moment each step keeps (release: 0.999)
WEIGHT_DECAY = 0.01  # 0 to 1e3; (release)
CLIP = 1.0  # > 0; largest norm of the gradient (release)
W_CE = 1.0  # >= 0; weight of the text loss in Eq. 7 (release: 0.1)
W_SIM = 4.0  # >= 0; weight of the imagery loss in Eq. 7 at the first step (release: 1.0)
W_SIM_END = 0.3  # >= 0; its value after the last step, linear between (release: as W_SIM)
# --- ablations
IMAGERY = "latents"  # latents | markers: the delimiters alone | pause: pads, no imagery loss (ours)
BOTTLENECK = 0.0  # 0 to 1; share of rows whose text after the first imagery does not look at the video (ours)
SELF_FED = 0.0  # 0 to 1; share of rows that read their own imagined latents in training (ours)
# --- logging
LOG_EVERY = 20  # >= 0; steps between printed lines, 0: the last alone; every step goes to the log file
EVAL_EVERY = 500  # >= 0; steps between looks at the imagery of 64 held-out rows; 0: never
SAVE_EVERY = 500  # >= 0; steps between checkpoints; 0: the last alone
# --- system
RESUME = "auto"  # auto: go on from the newest checkpoint in OUT | never: start afresh
CACHE_FEATURES = True  # keep frozen-vision features in memory, so that a clip is encoded once
PARALLEL = "ddp"  # ddp: each device holds all | fsdp: weights and moments are cut up; with torchrun
CHECKPOINTING = False  # activation checkpointing: less memory, a third more time, the same numbers
FAST = True  # False: exactly the code of model.py, the same numbers
SEED = 0  # >= 0; of the data order

# a run goes on only with the same values of these
kept_on_resume = (
    "MODEL DATA COT MAX_PIXELS MIN_PIXELS SECONDS_PER_PAIR SUFFIX K POOLING MATCH_NORM "
    "IMAGERY BOTTLENECK SELF_FED GLOBAL_BATCH LR WARMUP BETA2 WEIGHT_DECAY CLIP W_CE W_SIM W_SIM_END SEED"
).split()


# ---------------------------------------------------------------- the method


def dift_loss(logp, imagined, targets, n_text, n_latent, w_ce, w_sim):
    """Eq. 7: L = w_ce·ce + w_sim·sim, sums over the step's counts on all devices -> loss (), its named terms.

    ce = -1/n_text Σ log p(token), sim = 1/n_latent Σ (1 - cos(h_{t-1}, z_t)).
    logp (n,) of supervised tokens; imagined (m, D) = h_{t-1} and targets (m, D) = z_t at latent positions t.
    A further term is added to the loss and, for the log, to the dict.
    """
    ce = -logp.sum() / n_text
    sim = logp.new_zeros(())
    # a micro-batch may have no imagery in a step that has some
    if n_latent and targets is not None:
        cosine = F.cosine_similarity(imagined.float(), targets.float().detach(), dim=-1)  # (m,)
        sim = (1 - cosine).sum() / n_latent
    return w_ce * ce + w_sim * sim, {"ce": ce, "sim": sim}


@torch.no_grad()
def latent_sums(imagined, targets, K):
    """Sums over the latents of a micro-batch, for the log: centred cosine, norm of h, norm of z.

    The cosine is centred by the micro-batch's mean per latent index: pooled features share one direction, so
    the plain one is near 1 even for the wrong image. In micro-batches of few blocks it tells little.
    """
    if targets is None or len(targets) == 0:
        return {"cosine": 0.0, "norm_fed": 0.0, "norm_true": 0.0}
    h = imagined.float().unflatten(0, (-1, K))  # (blocks, K, D)
    z = targets.float().unflatten(0, (-1, K))
    cosine = F.cosine_similarity(h - h.mean(dim=0), z - z.mean(dim=0), dim=-1)
    return {
        "cosine": cosine.sum(),
        "norm_fed": h.norm(dim=-1).sum(),
        "norm_true": z.norm(dim=-1).sum(),
    }


# ---------------------------------------------------------------- data


def split_files(data, cot):
    """Training and held-out file of DATA: of a generated folder by COT, or one jsonl file and its twin.

    A lone file is scored on `<name>_test.jsonl` beside it, or else on itself, which is no held-out score.
    """
    data = Path(data)
    if data.suffix != ".jsonl":
        return data / f"train_{cot}.jsonl", data / f"test_{cot}.jsonl"
    test = data.with_name(f"{data.stem}_test.jsonl")
    return data, test if test.is_file() else data


def make_toy_data(data, rank):
    """Runs generate_data.py where DATA does not exist, or is a toy set that a kill left unfinished."""
    is_folder = Path(data).suffix != ".jsonl"
    is_ours = not Path(data).exists() or Path(data, "constants.json").exists()
    # a set's meta.json comes last
    if rank == 0 and is_folder and is_ours and not Path(data, "meta.json").exists():
        script = Path(__file__).with_name("generate_data.py")
        done = subprocess.run([sys.executable, script, f"OUT={data}"])
        require(done.returncode == 0, f"generate_data.py could not make {data}; see above.")
    barrier()


def micro_batches(samples, vision, pad_id, size, rank=0, world=1):
    """The samples of a step -> micro-batches of this process, and the step's counts on all devices.

    Sorted by length before they are dealt out and cut, so that little is padding: of lengths 1 to 8 in
    micro-batches of 2 the first of two processes has 1 3 | 5 7.
    """
    samples = sorted(samples, key=lambda sample: len(sample.ids))
    counts = {"text": 0, "latent": 0, "real": 0}
    for sample in samples:
        counts["text"] += int(sample.is_text.sum())
        counts["latent"] += int(sample.is_latent.sum())
        counts["real"] += int(sample.is_real.sum())
    # this process's micro-batches; SELF_FED's first pass is made by all processes, or by none (FSDP)
    has_self_fed = any(bool(sample.is_self_fed.any()) for sample in samples)
    mine = samples[rank::world]
    batches = []
    for start in range(0, len(mine), size):
        batch = collate(mine[start : start + size], pad_id)
        batch.has_self_fed = has_self_fed
        batches.append(vision.prepare(batch))
    return batches, counts


if __name__ == "__main__":
    c = override_constants(globals())
    rank, world, device = init_distributed()
    require_shares(c.GLOBAL_BATCH, world)

    # data: the toy world is made where there is none
    train_file, test_file = split_files(c.DATA, c.COT)
    make_toy_data(c.DATA, rank)
    rows = read_rows(train_file, with_answers=True)
    test_rows = read_rows(test_file) if c.TEST_ROWS else []
    test_rows = with_keys(test_rows, print0)

    # model: from the newest checkpoint in OUT, or from MODEL
    run = open_run(c.OUT, c.RESUME, vars(c), kept_on_resume, rows)
    parent = run.folder or c.MODEL
    pixels = {"min_pixels": c.MIN_PIXELS, "max_pixels": c.MAX_PIXELS, "seconds_per_pair": c.SECONDS_PER_PAIR}
    K = 0 if c.IMAGERY == "markers" else c.K
    thinker = load_model(parent, device, K, c.POOLING, c.SUFFIX, c.FAST, imagery=c.IMAGERY, **pixels)
    if c.CHECKPOINTING:
        checkpoint_layers(thinker.qwen)
    model = wrap_parallel(thinker, c.PARALLEL, device)
    vision = VisionCache(thinker, keep=c.CACHE_FEATURES)
    trained = [parameter for parameter in thinker.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, c.LR, (0.9, c.BETA2), weight_decay=c.WEIGHT_DECAY, fused=True)
    if run.start:
        load_optimizer(parent, thinker, optimizer)
    settings = evaluate.Settings(batch=c.TEST_BATCH)
    # without CACHE_FEATURES the thread below clears the cache of this vision: scores have their own
    scoring_vision = vision if c.CACHE_FEATURES else None
    scoring = {"settings": settings, "rank": rank, "world": world, "vision": scoring_vision}

    # log
    clear_run(run, unfinished=run.start < c.STEPS, results="eval")
    print0(f"{parent} -> {c.OUT} | {train_file}: {len(rows)} rows, {len(test_rows)} to score")
    print_header(c, trained, world, device)
    first = encode_row(thinker, rows[0])
    print0("first sample: [supervised], {imagery}\n", describe_sample(first, thinker.tokenizer))
    if test_rows and test_file == train_file:
        print0(f"{train_file} has no held-out twin: the score at the end is on training rows.")
    imagery = {"object": None, "retrieval": None}
    if run.entries:
        imagery = {name: run.entries[-1].get(name) for name in imagery}

    def prepare(step):
        """The micro-batches and counts of a step."""
        samples = []
        for place, index in enumerate(rows_of_step(step, len(rows), c.GLOBAL_BATCH, c.SEED)):
            draws = random.Random(f"{c.SEED} {step} {place}")
            blind = draws.random() < c.BOTTLENECK
            self_fed = draws.random() < c.SELF_FED
            samples.append(encode_row(thinker, rows[index], blind=blind, self_fed=self_fed))
        return micro_batches(samples, vision, thinker.token_id["pad"], c.MICRO_BATCH, rank, world)

    thread = ThreadPoolExecutor(1)
    next_step = None
    for step in range(run.start, c.STEPS):
        began = time.time()
        batches, counts = next_step.result() if next_step else prepare(step)
        # on a GPU the next step's batches are made while this step runs; a CPU is busy enough with this one
        if device.type == "cuda" and step + 1 < c.STEPS:
            next_step = thread.submit(prepare, step + 1)
        lr = linear_warmup_decay(step, c.STEPS, c.WARMUP, c.LR)
        optimizer.param_groups[0]["lr"] = lr
        # what to imagine is learned first, what to say about it later
        w_sim = c.W_SIM + (c.W_SIM_END - c.W_SIM) * step / c.STEPS
        weights = {"ce": c.W_CE, "sim": w_sim}

        # forward and backward, one micro-batch after the other
        thinker.train()
        sums = {}
        for number, batch in enumerate(batches, 1):
            with no_sync(model, when=number < len(batches)):
                with autocast(device):
                    logp, imagined, targets = model(batch)
                    loss, terms = dift_loss(
                        logp, imagined, targets, counts["text"], counts["latent"], c.W_CE, w_sim
                    )
                (loss * world).backward()  # DDP takes the mean over processes, Eq. 7 the sum
            add_sums(sums, {"loss": loss, **terms, **latent_sums(imagined, targets, K)})
            add_sums(sums, {"places": batch.ids.numel()})

        # step
        gnorm = full_tensor(torch.nn.utils.clip_grad_norm_(thinker.parameters(), c.CLIP))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        thinker.eval()

        # the step's sums over all devices; those over latents become means
        entry = {"step": step + 1, **all_reduce_sum(sums, device)}
        for name in ("cosine", "norm_fed", "norm_true"):
            entry[name] /= max(1, counts["latent"])

        # MATCH_NORM: at inference Thinker.feedback scales hidden states to the norm of this step's targets
        if counts["latent"]:
            norm = entry["norm_true"] if c.MATCH_NORM else 0
            thinker.config.latent_norm = norm or None

        # every EVAL_EVERY steps: is the right thing imagined? Then the log, a checkpoint
        if test_rows and counts["latent"] and c.EVAL_EVERY and (step + 1) % c.EVAL_EVERY == 0:
            with whole_weights(thinker):
                scores = evaluate.evaluate(thinker, test_rows, limit=64, **scoring)
            imagery = {name: scores["imagery"].get(name) for name in imagery}
        entry.update(imagery)
        entry["gnorm"] = gnorm.item()
        entry["lr"] = lr
        entry["latents"] = counts["latent"] / c.GLOBAL_BATCH
        entry["tokens"] = counts["real"]
        entry["padding"] = 1 - counts["real"] / entry.pop("places")
        entry["seconds"] = time.time() - began
        run.write(entry)
        if is_due(step, c.LOG_EVERY, c.STEPS):
            print0(log_line(entry, terms, c.STEPS, weights))
        if is_due(step, c.SAVE_EVERY, c.STEPS):
            run.save(step + 1, thinker, optimizer)

    # scores, picture and report
    if test_rows:
        out = Path(c.OUT) / "eval"
        with whole_weights(thinker):
            summary = evaluate.evaluate(thinker, test_rows, out, limit=c.TEST_ROWS, **scoring)
            if rank == 0:
                evaluate.print_table(summary)
                evaluate.draw(thinker, test_rows, out, run.log, train_rows=rows)
                print0(f"{out}/summary.json, {out}/picture.png, {out}/report.html")
    end_distributed()
