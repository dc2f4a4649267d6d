"""4DRL (paper Sec. 3.3): GRPO on question-answer pairs, gradient on text tokens only, imagery replayed.

In:  a checkpoint of dift.py (MODEL) and rows of a question, options and a key, no chain of thought (DATA).
Out: OUT/step_*/ (checkpoints), OUT/log.jsonl, OUT/before/ and OUT/after/: answers and scores of held-out
     questions (HOLDOUT in compound/, SINGLES in single/), afterwards with picture and report.

    python grpo4d.py                               # laptop: from out/dift, on the toy's compound questions
    python grpo4d.py MODEL=out/dift_3b DATA=data/rl.jsonl HOLDOUT=data/rl_test.jsonl SINGLES="" STEPS=400 \\
        GLOBAL_BATCH=8 LR=1e-6 BETA=0.01 MAX_NEW=1024 ROLLOUT_BATCH=1 MICRO_BATCH=1 \\
        PREFIX=rows CHECKPOINTING=True CACHE_FEATURES=False TEST_BATCH=8           # one GPU
    torchrun --nproc_per_node=8 grpo4d.py ...      # the same run on eight; PARALLEL=fsdp for 7B

A step: (1) draw questions, (2) sample G answers to each, imagery included, keep the latents that were fed,
(3) score them by the key and the format, (4) advantages within each group, (5) read the answers again with
those very latents, under the policy and under the frozen DIFT model, (6) Eq. 10 over text tokens, (7) step.

Differs from the paper:
- latents are replayed as sampled, in the policy's and the reference's pass (release: pad embeddings)
- k3 estimator of KL, whose gradient is not zero on policy (release: logp - logp_ref)
- one limit for sampling and loss; an answer that meets it has an empty T_i (release: 8192 and 1024)
- the prompt is computed once for its G answers, while sampling and in the update (ours)
- the format reward asks for imagery, the parser is strict (ours)
"""

import contextlib
import functools
import json
import random
import re
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

import evaluate
from assets.fsdp import full, whole
from model import Images, all_sum, check, checkpoint_layers, collate, encode_row, generate
from model import init_distributed, load_model, load_optimizer, newest_checkpoint, parallelise, read_rows
from model import rows_of_step, save_checkpoint, set_constants

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint: where the policy starts
REFERENCE = ""  # the frozen model of the KL term; "": where the policy started (paper)
DATA = "out/toy/rl_train.jsonl"  # questions with options and a key
VIDEOS = ""  # folder of the videos of rows that have no frames; "": where the rows say
HOLDOUT = "out/toy/rl_test.jsonl"  # compound questions scored before, during and after; "": none
SINGLES = "out/toy/test_imagery.jsonl"  # single-motion questions, scored before and after; "": none
OUT = "out/grpo4d"  # checkpoints, log, scores
# --- data
FPS = 1.0  # frames a second of rows that name only a video (release)
MAX_FRAMES = 50  # of such a video, evenly spaced where there are more (release)
HOLDOUT_ROWS = 500  # rows of HOLDOUT and of SINGLES that are scored, at most; 0: no scores
TEST_BATCH = 64  # of them answered at once on one device
# --- model
LATENT_REPLAY = True  # False feeds pad embeddings at latent positions, as the release does (ablation)
PREFIX = "shared"  # shared: a prompt is read once for its G answers | rows: once for each, the same numbers
# --- optimisation
STEPS = 60  # rounds of sampling and updating
GLOBAL_BATCH = 48  # questions of one step over all devices, with G answers each
MICRO_BATCH = 4  # questions of one forward pass of the update on one device
MU = 1  # updates on the same answers; beyond 1 the ratio leaves 1 and is clipped
LR = 2.5e-4  # peak learning rate (release: 1e-6 for the 3B model)
WARMUP = 10  # steps of linear warm-up, then linear decay to zero (ours)
WEIGHT_DECAY = 0.0  # (ours)
CLIP = 1.0  # largest norm of the gradient (release)
# --- RL
G = 8  # answers to a question (release)
ROLLOUT_BATCH = 8  # questions answered together on one device
MAX_NEW = 256  # positions of an answer at most, latents included (release: 1024)
TEMPERATURE = 1.0  # of the sampler and of the loss (release)
EPSILON = 0.2  # the ratio is clipped to 1 - ε … 1 + ε (release)
BETA = 0.04  # β, weight of the KL term (release: 0.01)
KL = "k3"  # k3 (ours) | k1: logp - logp_ref, whose gradient on policy is zero on average (release)
W_ACC = 1.0  # weight of the right letter in the reward, Eq. 9 (release)
W_FMT = 0.2  # weight of the format (release)
FORMAT_NEEDS_IMAGERY = True  # the format reward asks for a latent block within <think>
# --- logging
LOG_EVERY = 1  # steps between printed lines, 0: the last alone; every step goes to the log file
SAMPLE_EVERY = 20  # steps between printed sample answers; 0: never
EVAL_EVERY = 30  # steps between scores on HOLDOUT; 0: only before and after
SAVE_EVERY = 30  # steps between checkpoints; 0: the last alone
# --- system
RESUME = "auto"  # auto: go on from the newest checkpoint in OUT | never: start afresh
CACHE_FEATURES = True  # keep vision features over steps; False: within a step only
PARALLEL = "ddp"  # with torchrun. ddp: each device holds all | fsdp: weights and moments are cut up
CHECKPOINTING = False  # activation checkpointing, with PREFIX=rows: less memory, more time, the same numbers
SEED = 0  # of the order of questions and of the samples

kept_on_resume = "MODEL REFERENCE DATA LATENT_REPLAY GLOBAL_BATCH MU LR WARMUP WEIGHT_DECAY CLIP G MAX_NEW"
kept_on_resume += " FPS MAX_FRAMES TEMPERATURE EPSILON BETA KL W_ACC W_FMT FORMAT_NEEDS_IMAGERY SEED"
sequences = ("ids", "is_text", "is_latent", "is_visual", "is_real", "positions")  # of a sample, T last


def reward(row, made, needs_imagery):
    """The parts of Eq. 9 for one answer -> (acc, fmt), each 0.0 or 1.0; replace it to reward something else.

    acc: the strict parser finds the key. fmt: one <think> part with a whole latent block in it, then one
    <answer>, the end of turn, and nothing else.
    """
    acc = evaluate.parse_answer(made["text"], "".join(row["options"])) == row["key"]
    found = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*<\|im_end\|>", made["text"], re.S)
    once = all(made["text"].count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    block = r"<\|latent_start\|>(<\|latent_pad\|>)+<\|latent_end\|>"
    imagery = found and re.search(block, found[1])
    return float(acc), float(bool(found and once and (imagery or not needs_imagery)))


def advantages(rewards):
    """Eq. 9: A_i = (R_i - mean) / (std + 1e-4) in each group: (Q, G) -> (Q, G), exactly 0 without spread."""
    spread = rewards - rewards.mean(dim=1, keepdim=True)
    spread = spread.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0)
    return spread / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_loss(logp, old, ref, advantage, answer, count, epsilon, beta, kl="k3"):
    """Eq. 10 -> (loss (), ratio (n,), kl (n,)), over the tokens of all T_i, one answer after the other.

    logp, old, ref (n,): log-probabilities under the policy, under the policy that sampled, and under the
    frozen DIFT model; answer (n,): which answer a token is of; advantage (B,); count: answers of the step on
    all devices, those with an empty T_i included. For T_0 of 2 tokens and T_1 of 1: answer [0, 0, 1].
    Latents have no log-probability, for a vector is not drawn from a distribution: no switch puts them here.
    """
    ratio = (logp - old).exp()  # (n,) ρ
    A = advantage[answer]  # (n,)
    lengths = torch.zeros_like(advantage).index_add_(0, answer, torch.ones_like(A))  # (B,) |T_i|
    gain = torch.minimum(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon) * A)
    d = ref - logp
    divergence = d.exp() - d - 1 if kl == "k3" else -d  # (n,) KL_t
    return -((gain - beta * divergence) / lengths[answer]).sum() / count, ratio, divergence


def answer_sample(prompt, made):
    """What generate made, as a sample that goes on where its prompt stops; is_text is T_i, empty if cut off.

    made         The  sky  <start>  .  .  <end>  turns  <im_end>
    is_latent     0    0     0      1  1    0      0       0
    is_text       1    1     1      0  0    0      1       1
    """
    n = len(made["ids"])
    sample = {"ids": torch.tensor(made["ids"]), "is_latent": torch.tensor(made["is_latent"])}
    sample["is_text"] = torch.tensor(made["is_sampled"]) & (not made["cut"])
    sample |= {"is_visual": torch.zeros(n, dtype=torch.bool), "is_real": torch.ones(n, dtype=torch.bool)}
    sample["positions"] = (prompt["positions"].max() + 1 + torch.arange(n)).expand(3, -1)  # (3, T)
    return sample | {"video": (), "overlays": (), "where": prompt["where"]}


def pack(model, images, prompts, groups, prefix, replay):
    """G answers to each of some questions as one batch, and the latents (n, D) to be seen in them.

    shared: rows are answers, batch["prompts"] is what they go on from. rows: prompt and answer in one.
    """
    samples = []
    for prompt, group in zip(prompts, groups):
        for answer in (answer_sample(prompt, made) for made in group):
            joined = {name: torch.cat([prompt[name], answer[name]], dim=-1) for name in sequences}
            samples.append(answer if prefix == "shared" else prompt | joined)
    pad, device = model.ids["pad"], model.banned.device
    batch = images.add(collate(samples, pad), device)
    if prefix == "shared":
        batch["prompts"] = images.add(collate(prompts, pad, "left"), device)
    latents = torch.cat([made["latents"] for group in groups for made in group]).to(device)  # (n, D)
    if not replay:  # release: the pitfall, as an ablation
        pad = full(model.net.get_input_embeddings().weight.detach())[model.ids["latent_pad"]]  # (D,)
        latents = pad.expand_as(latents)
    return batch, latents


def answer_sums(scored, rewards, groups, batches):
    """Sums for the log over answers: scored (Q, G, 2) nested, rewards (Q, G), groups of answers -> dict.

    batches as `pack` made them; real: their tokens, prompts included, places: the same and padding.
    """
    answers = [made for group in groups for made in group]
    acc, fmt = torch.tensor(scored).sum(dim=(0, 1)).tolist()
    sums = {"reward": rewards.sum().item(), "acc": acc, "fmt": fmt}
    sums["length"] = sum(len(made["ids"]) for made in answers)
    sums["cut"] = sum(made["cut"] for made in answers)
    sums["blocks"] = sum(made["text"].count("<|latent_start|>") for made in answers)
    sums["spread"] = (rewards != rewards[:, :1]).any(dim=1).sum().item()
    parts = [part["is_real"] for batch in batches for part in (batch, batch.get("prompts")) if part]
    sums["real"] = sum(is_real.sum().item() for is_real in parts)
    sums["places"] = sum(is_real.numel() for is_real in parts)
    return sums


@torch.no_grad()
def token_sums(loss, logp, ratio, divergence, epsilon):
    """Sums for the log over the tokens of all T_i -> (6,): loss, ratio, clipped, KL, -logp, count.

    -logp of sampled tokens is an estimate of the entropy without a (n, V) tensor.
    """
    clipped = (ratio - 1).abs() > epsilon
    sums = [loss, ratio.sum(), clipped.sum(), divergence.sum(), -logp.sum(), loss.new_tensor(len(logp))]
    return torch.stack(sums).double()


def dice(seed, step, question, number):
    """The random numbers of one answer, whatever the number of devices or the batch."""
    state = random.Random(f"{seed} {step} {question} {number}").getrandbits(60)
    return torch.Generator().manual_seed(state)


def shown(row, made, parts, total):
    """An answer as text, its imagery as {imagery}, with its reward."""
    block = r"<\|latent_start\|>(<\|latent_pad\|>)*(<\|latent_end\|>)?"
    text = re.sub(block, lambda block: f"{{imagery x {block[0].count('latent_pad')}}}", made["text"])
    score = f"reward {total:.2f} (acc {parts[0]:g}, fmt {parts[1]:g})"
    return f"--- {row['id']} | key {row['key']} | {score}{' | cut off' * made['cut']}\n{text.strip()}\n---"


def log_line(entry, steps, w_acc, w_fmt):
    """One step as a line of the log."""
    parts = ["step {step:5d}/{steps}"]
    parts += ["reward {reward:.3f} = {w_acc:g} x acc {acc:.2f} + {w_fmt:g} x fmt {fmt:.2f}"]
    parts += ["spread {spread:.0f}/{groups:.0f}", "length {length:.0f}", "cut {cut:.2f}"]
    parts += ["imagery {blocks:.1f}", "ratio {ratio:.3f}", "clip {clip:.3f}", "kl {kl:.4f}"]
    parts += ["entropy {entropy:.3f}", "loss {loss:.4f}", "gnorm {gnorm:.2f}", "lr {lr:.1e}"]
    parts += ["{seconds:.1f} s", "rollout {rollout:.2f}k tok/s", "update {update:.2f}k tok/s"]
    return " | ".join(parts).format(steps=steps, w_acc=w_acc, w_fmt=w_fmt, **entry)


def compare_table(before, after):
    """Scores of two summaries by name -> lines "name  n  before %  after %  points", with 95 % intervals."""
    lines = [f"{'':20}{'n':>6}{'before %':>24}{'after %':>24}{'points':>8}"]
    for file in before:
        for name, old in before[file]["scores"].items():
            new = after[file]["scores"][name]
            cells = [[100 * score[key] for key in ("accuracy", "low", "high")] for score in (old, new)]
            texts = ["{:.1f} ({:.1f} - {:.1f})".format(*cell) for cell in cells]
            title = f"{file}, all" if name == "micro" else name
            points = cells[1][0] - cells[0][0]
            lines.append(f"{title:20}{old['n']:6d}{texts[0]:>24}{texts[1]:>24}{points:+8.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    constants = set_constants(globals())
    rank, world, device = init_distributed()
    choices = {"PREFIX": "shared rows", "KL": "k3 k1", "RESUME": "auto never", "PARALLEL": "ddp fsdp"}
    for name, known in choices.items():
        check(constants[name] in known.split(), f"{name}={constants[name]} is none of: {known}.")
    check(G >= 2, f"G={G}: an advantage is relative to other answers; set G to 2 or more.")
    check(TEMPERATURE > 0, f"TEMPERATURE={TEMPERATURE} makes all answers one; set it above 0, such as 1.")
    check(GLOBAL_BATCH % world == 0, f"GLOBAL_BATCH={GLOBAL_BATCH} is no multiple of the {world} processes.")
    check(PREFIX == "rows" or not CHECKPOINTING, "CHECKPOINTING=True drops all caches; set PREFIX=rows.")
    say = functools.partial(print, flush=True) if rank == 0 else lambda *words, **how: None

    # data
    frames = (VIDEOS, rank, world, FPS, MAX_FRAMES)
    rows = evaluate.film(read_rows(DATA), *frames)
    check(rows, f"DATA={DATA}: no row's video could be used; set VIDEOS to their folder.")
    for row in rows:
        check(row["key"] in row["options"], f"{row['where']}: no options with a key to reward by; drop it.")
    asked = {"compound": HOLDOUT, "single": SINGLES} if HOLDOUT_ROWS else {}
    held_out = {name: read_rows(file, HOLDOUT_ROWS) for name, file in asked.items() if file}
    held_out = {name: evaluate.film(some, *frames) for name, some in held_out.items()}

    # the policy, from the newest checkpoint in OUT or from MODEL, and the frozen reference
    done = sorted(Path(OUT).glob("step_*/config.json")) if RESUME == "auto" else []
    run = json.loads(done[-1].read_text())["run"] if done else {"step": 0, **constants}
    for name in kept_on_resume.split():
        same = run[name] == constants[name]
        check(same, f"OUT={OUT} holds a run with {name}={run[name]}; set another OUT, or RESUME=never.")
    start, begun = run["step"], run.get("start_path") or str(newest_checkpoint(MODEL))
    source = run.get("reference_path") or (str(newest_checkpoint(REFERENCE)) if REFERENCE else begun)
    came = {"start_path": begun, "reference_path": source}  # kept, for a run's folder may get a newer one
    parent = done[-1].parent if done else begun
    core, reference = load_model(parent, device), load_model(source, device).requires_grad_(False)
    check(core.K, f"{parent} has no latents (latent_size 0); give a checkpoint of dift.py with K > 0.")
    shapes = [{name: tuple(x.shape) for name, x in m.net.state_dict().items()} for m in (core, reference)]
    fine = shapes[0] == shapes[1] and core.K == reference.K and core.ids == reference.ids
    eyes = (m.net.model.visual.parameters() for m in (core, reference))  # not kept: one of them goes
    fine = fine and all(torch.equal(a, b) for a, b in zip(*eyes))
    check(fine, f"REFERENCE={source} differs from {parent} in shape, vision, K or tokens; give its start.")
    core.net.model.visual = reference.net.model.visual  # frozen in both: one copy, one pass
    if CHECKPOINTING:
        checkpoint_layers(core.net)
    model = parallelise(core, PARALLEL, device)
    reference = parallelise(reference, PARALLEL, device) if PARALLEL == "fsdp" else reference
    images = Images(core, cache=True)
    trained = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, weight_decay=WEIGHT_DECAY, fused=True)
    if start:
        load_optimizer(parent, core, optimizer)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    scoring = {"how": {"max_new": MAX_NEW, "batch": TEST_BATCH, "fps": FPS, "max_frames": MAX_FRAMES}}
    scoring |= {"rank": rank, "world": world, "resume": RESUME == "auto"}

    # log, and the scores before
    log = Path(OUT) / "log.jsonl"
    if rank == 0:
        afresh = list(Path(OUT).glob("step_*")) if start == 0 else []
        for old in [*afresh, *[Path(OUT) / "after"] * (start < STEPS)]:  # of another run; of fewer steps
            shutil.rmtree(old, ignore_errors=True)
        lines = log.read_text().splitlines()[:start] if start else []
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(line + "\n" for line in lines))
    count = sum(parameter.numel() for parameter in trained) / 1e6
    say(f"grpo4d: {parent} -> {OUT} | reference {source} | {DATA}, {len(rows)} rows | {world} x {device}")
    say(f"torch {torch.__version__}, transformers {transformers.__version__}, {count:.2f} M trained weights")
    say(" ".join(f"{name}={value}" for name, value in constants.items()))
    say("first question:", rows[0]["text_input"], f"key: {rows[0]['key']}", sep="\n")
    first = reference if source == begun else load_model(begun, device)  # where the policy started
    with whole(first):
        before = {
            name: evaluate.evaluate(first, some, Path(OUT) / "before" / name, **scoring)
            for name, some in held_out.items()
        }
    del first

    for step in range(start, STEPS):
        began = time.time()
        lr = LR * min((step + 1) / max(1, WARMUP), (STEPS - step) / max(1, STEPS - WARMUP))
        optimizer.param_groups[0]["lr"] = lr
        if not CACHE_FEATURES:
            images.kept.clear()

        # 1, 2: questions of this process, by length so that little is padding, G answers to each
        model.eval()
        drawn = rows_of_step(step, len(rows), GLOBAL_BATCH, SEED)
        drawn = [(index, encode_row(core, rows[index], answer=False)) for index in drawn]
        drawn = sorted(drawn, key=lambda one: len(one[1]["ids"]))[rank::world]
        (mine, prompts), groups = zip(*drawn), []
        with whole(core), autocast():
            for at in range(0, len(mine), ROLLOUT_BATCH):
                part = slice(at, at + ROLLOUT_BATCH)
                dies = [dice(SEED, step, index, number) for index in mine[part] for number in range(G)]
                made = generate(core, prompts[part], MAX_NEW, images, TEMPERATURE, generators=dies)
                groups += [made[first : first + G] for first in range(0, len(made), G)]
        rolled = time.time()

        # from here on questions that cost the update as much stand together, so that little is padding
        reads = 1 if PREFIX == "shared" else G  # of a prompt
        cost = [reads * len(p["ids"]) + G * max(len(m["ids"]) for m in g) for p, g in zip(prompts, groups)]
        order = sorted(range(len(mine)), key=cost.__getitem__)
        mine, prompts, groups = ([part[i] for i in order] for part in (mine, prompts, groups))

        # 3, 4: rewards and advantages
        scored = [[reward(rows[i], m, FORMAT_NEEDS_IMAGERY) for m in g] for i, g in zip(mine, groups)]
        rewards = torch.tensor(scored) @ torch.tensor([W_ACC, W_FMT])  # (Q, G)
        advantage = advantages(rewards).to(device)

        # 5 to 7: MU updates on these answers; every process has as many questions, so as many passes
        model.train(CHECKPOINTING)
        kept, sums = {}, torch.zeros(6, dtype=torch.float64, device=device)
        for _ in range(MU):
            for at in range(0, len(mine), MICRO_BATCH):
                part, last = slice(at, at + MICRO_BATCH), at + MICRO_BATCH >= len(mine)
                with contextlib.nullcontext() if last or model is core else model.no_sync(), autocast():
                    if at not in kept:
                        batch, latents = pack(
                            core, images, prompts[part], groups[part], PREFIX, LATENT_REPLAY
                        )
                        with torch.no_grad():
                            ref = reference(batch, latents, True, TEMPERATURE)[0]
                        kept[at] = [batch, latents, ref, None]
                    batch, latents, ref, old = kept[at]
                    logp = model(batch, latents, True, TEMPERATURE)[0]  # (n,)
                    old = kept[at][3] = logp.detach() if old is None else old
                    answer = batch["text_at"] // batch["ids"].shape[1]  # (n,)
                    given = (advantage[part].flatten(), answer, GLOBAL_BATCH * G, EPSILON, BETA, KL)
                    loss, ratio, divergence = grpo_loss(logp, old, ref, *given)
                    (loss * world).backward()  # of processes the mean is taken, Eq. 10 the sum
                sums += token_sums(loss, logp, ratio, divergence, EPSILON).to(device)
            gnorm = full(torch.nn.utils.clip_grad_norm_(core.parameters(), CLIP))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # the log of a step, and at times an answer, scores and a checkpoint
        some = answer_sums(scored, rewards, groups, [batch for batch, *_ in kept.values()])
        entry = {"step": step + 1, "groups": GLOBAL_BATCH} | dict(zip(some, all_sum(some.values(), device)))
        entry |= {name: entry[name] / (GLOBAL_BATCH * G) for name in some if name != "spread"}
        loss, *tokens, n_text = all_sum(sums.tolist(), device)
        entry |= dict(zip(("ratio", "clip", "kl", "entropy"), (x / max(1, n_text) for x in tokens)))
        entry |= {"loss": loss / MU, "gnorm": gnorm.item(), "lr": lr, "seconds": time.time() - began}
        entry["padding"] = 1 - entry.pop("real") / entry.pop("places")  # of what the update reads
        thousands = entry["length"] * GLOBAL_BATCH * G / 1e3  # positions of all answers, latents included
        entry |= {"rollout": thousands / (rolled - began), "update": thousands * MU / (time.time() - rolled)}
        if held_out.get("compound") and EVAL_EVERY and (step + 1) % EVAL_EVERY == 0:
            core.eval()
            with whole(core):
                look = evaluate.evaluate(core, held_out["compound"], **scoring)
            score = look["scores"]["micro"]
            entry["holdout"] = score["accuracy"]
            say(f"HOLDOUT after {step + 1} steps: {100 * score['accuracy']:.1f} % of {score['n']}")
        if rank == 0:
            with open(log, "a") as file:
                file.write(json.dumps(entry) + "\n")
        if (LOG_EVERY and (step + 1) % LOG_EVERY == 0) or step + 1 == STEPS:
            say(log_line(entry, STEPS, W_ACC, W_FMT))
        if SAMPLE_EVERY and step % SAMPLE_EVERY == 0:
            say(shown(rows[mine[0]], groups[0][0], scored[0][0], rewards[0][0]))
        if (SAVE_EVERY and (step + 1) % SAVE_EVERY == 0) or step + 1 == STEPS:
            save_checkpoint(OUT, step + 1, core, constants | came, optimizer)

    # scores after, beside those before; picture and report of the compound questions
    core.eval()
    with whole(core):
        after = {
            name: evaluate.evaluate(core, some, Path(OUT) / "after" / name, **scoring)
            for name, some in held_out.items()
        }
        if rank == 0 and held_out:
            print(compare_table(before, after))
            for name, some in held_out.items():
                out = Path(OUT) / "after" / name
                evaluate.draw(core, some, out, log)
                say(f"{out}/summary.json, {out}/picture.png, {out}/report.html")
    if world > 1:
        dist.destroy_process_group()
