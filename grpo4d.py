r"""4DRL (paper Sec. 3.3): GRPO on question-answer pairs, gradient on text tokens only, imagery replayed.

In:  a checkpoint of dift.py (MODEL) and rows of a question, options and a key, no chain of thought (DATA).
Out: OUT/step_*/ (checkpoints), OUT/log.jsonl, OUT/before/ and OUT/after/: answers and scores of held-out
     questions (HOLDOUT in compound/, SINGLES in single/), afterwards with picture and report.

    python grpo4d.py                               # laptop: from out/dift, on the toy's compound questions
    python grpo4d.py MODEL=out/dift_3b DATA=data/rl.jsonl HOLDOUT=data/rl_test.jsonl SINGLES="" STEPS=400 \
        GLOBAL_BATCH=8 LR=1e-6 BETA=0.01 MAX_NEW=1024 ROLLOUT_BATCH=1 MICRO_BATCH=1 \
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

import gc
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import evaluate
from lib.checkpoints import clear_run, linear_warmup_decay, load_optimizer, newest_checkpoint
from lib.checkpoints import open_run, share_vision
from lib.command_line import override_constants, require
from lib.distributed import all_reduce_sum, autocast, end_distributed, full_tensor, init_distributed
from lib.distributed import no_sync, print0, require_shares, whole_weights, wrap_parallel
from lib.fast import checkpoint_layers
from lib.log import add_sums, answer_sums, compare_table, is_due, padding_sums, print_header
from lib.log import show_answer, to_means, weighted_terms
from lib.rows import LATENT_BLOCK, read_rows, rows_of_step
from lib.videos import attach_video_rows
from model import Sample, VisionCache, collate, encode_row, generate, load_model

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint: where the policy starts
REFERENCE = ""  # the frozen model of the KL term; "": where the policy started (paper)
DATA = "out/toy/rl_train.jsonl"  # questions with options and a key
VIDEOS = ""  # folder of the videos of rows that have no frames; "": where the rows say
HOLDOUT = "out/toy/rl_test.jsonl"  # compound questions scored before, during and after; "": none
SINGLES = "out/toy/test_imagery.jsonl"  # single-motion questions, scored before and after; "": none
OUT = "out/grpo4d"  # checkpoints, log, scores
CACHE = "out/frames"  # folder for the frames of decoded videos; may be deleted
# --- data
FPS = 1.0  # 1e-6 to 1e3; frames a second of rows that name only a video (release)
MAX_FRAMES = 50  # >= 1; of such a video, evenly spaced where there are more (release)
HOLDOUT_ROWS = 500  # >= 0; rows of HOLDOUT and of SINGLES that are scored, at most; 0: no scores
TEST_BATCH = 64  # >= 1; of them answered at once on one device
# --- model
LATENT_REPLAY = True  # False feeds pad embeddings at latent positions, as the release does (ablation)
PREFIX = "shared"  # shared: a prompt is read once for its G answers | rows: once for each, the same numbers
# --- optimisation
STEPS = 60  # >= 0; rounds of sampling and updating
GLOBAL_BATCH = 48  # 1 to 1e6; questions of one step over all devices, with G answers each
MICRO_BATCH = 4  # >= 1; questions of one forward pass of the update on one device
MU = 1  # >= 1; updates on the same answers; beyond 1 the ratio leaves 1 and is clipped
LR = 2.5e-4  # > 0, <= 100; peak learning rate (release: 1e-6 for the 3B model)
WARMUP = 10  # >= 0; steps of linear warm-up, then linear decay to zero (ours)
WEIGHT_DECAY = 0.0  # 0 to 1e3; (ours)
CLIP = 1.0  # > 0; largest norm of the gradient (release)
# --- RL
G = 8  # 2 to 1e4; answers to a question, as an advantage is relative to others (release)
ROLLOUT_BATCH = 8  # >= 1; questions answered together on one device
MAX_NEW = 256  # 1 to 1e6; positions of an answer at most, latents included (release: 1024)
TEMPERATURE = 1.0  # 0.01 to 100; of the sampler and of the loss (release)
EPSILON = 0.2  # 0 to 1; the ratio is clipped to 1 - ε … 1 + ε (release)
BETA = 0.04  # >= 0; β, weight of the KL term (release: 0.01)
KL = "k3"  # k3 (ours) | k1: logp - logp_ref, whose gradient on policy is zero on average (release)
REWARD_WEIGHTS = {"acc": 1.0, "fmt": 0.2}  # >= 0; of the parts of `reward`, Eq. 9 (release)
FORMAT_NEEDS_IMAGERY = True  # the format reward asks for a latent block within <think>
# --- logging
LOG_EVERY = 1  # >= 0; steps between printed lines, 0: the last alone; every step goes to the log file
SAMPLE_EVERY = 20  # >= 0; steps between printed sample answers; 0: never
EVAL_EVERY = 30  # >= 0; steps between scores on HOLDOUT; 0: only before and after
SAVE_EVERY = 30  # >= 0; steps between checkpoints; 0: the last alone
# --- system
RESUME = "auto"  # auto: go on from the newest checkpoint in OUT | never: start afresh
CACHE_FEATURES = True  # keep vision features over steps; False: within a step only
PARALLEL = "ddp"  # ddp: each device holds all | fsdp: weights and moments are cut up; with torchrun
CHECKPOINTING = False  # activation checkpointing, with PREFIX=rows: less memory, more time, the same numbers
FAST = True  # False: exactly the code of model.py, the same numbers
SEED = 0  # >= 0; of the order of questions and of the samples

# one step as a line of the log
log_line = (
    "step {step:5d}/{steps} | reward {reward:.3f} = {parts} | spread {spread:.0f}/{groups}"
    " | length {length:.0f} | cut {cut:.2f} | imagery {blocks:.1f} | ratio {ratio:.3f} | clip {clip:.3f}"
    " | kl {kl:.4f} | entropy {entropy:.3f} | loss {loss:.4f} | gnorm {gnorm:.2f} | lr {lr:.1e}"
    " | {seconds:.1f} s | rollout {rollout:.2f}k tok/s | update {update:.2f}k tok/s"
)
# a run goes on only with the same values of these
kept_on_resume = (
    "MODEL REFERENCE DATA LATENT_REPLAY GLOBAL_BATCH MU LR WARMUP WEIGHT_DECAY CLIP G MAX_NEW "
    "FPS MAX_FRAMES TEMPERATURE EPSILON BETA KL REWARD_WEIGHTS FORMAT_NEEDS_IMAGERY SEED"
).split()


@dataclass
class Group:
    """One question of a step and its G answers."""

    index: int  # of its row
    prompt: Sample
    completions: list = field(default_factory=list)  # G Completions
    scores: list = field(default_factory=list)  # {part of the reward: value} of each
    repeat: int = 0  # how often the question stands before in this step: GLOBAL_BATCH may exceed the rows


# ---------------------------------------------------------------- the method


def reward(row, completion, needs_imagery):
    """Eq. 9: the parts of one answer's reward, by name, each 0.0 or 1.0; REWARD_WEIGHTS weighs them.

    acc: the strict parser finds the key. fmt: one <think> part with a whole latent block in it, then one
    <answer>, the end of turn, and nothing else.
    """
    text = completion.text
    letter = evaluate.parse_answer(text, "".join(row.options))

    # one <think>, one <answer>, and imagery in the first
    parts = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*<\|im_end\|>", text, re.S)
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    has_format = parts is not None and all(text.count(tag) == 1 for tag in tags)
    if has_format and needs_imagery:
        blocks = LATENT_BLOCK.finditer(parts[1])
        is_whole = any(latents and end for latents, end in (block.groups() for block in blocks))
        has_format = is_whole and len(completion.latents) > 0  # tokens that spell a block are none
    # another part is added here, with its weight in REWARD_WEIGHTS
    return {"acc": float(letter == row.key), "fmt": float(has_format)}


def advantages(rewards):
    """Eq. 9: A_i = (R_i - mean) / (std + 1e-4) in each group: (Q, G) -> (Q, G), exactly 0 without spread."""
    # rounding would leave a tiny deviation in a group of equal rewards, and the division make it large
    deviation = rewards - rewards.mean(dim=1, keepdim=True)
    all_alike = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    deviation = deviation.masked_fill(all_alike, 0)
    return deviation / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_loss(logp, old, ref, advantage, answer, count, epsilon, beta, kl="k3"):
    """Eq. 10 -> (loss (), ratio (n,), kl (n,)), over the tokens of all T_i, one answer after the other.

    L = -1/count Σ_i 1/|T_i| Σ_{t in T_i} [min(ρA, clip(ρ)A) - β KL_t].
    logp, old, ref (n,): log-probabilities under the policy, under the policy that sampled, and under the
    frozen DIFT model; answer (n,): which answer a token is of; advantage (B,); count: answers of the step on
    all devices, those with an empty T_i included. For T_0 of 2 tokens and T_1 of 1: answer [0, 0, 1].
    Latents have no log-probability, for a vector is not drawn from a distribution: no switch puts them here.
    """
    # the gain of a token, no larger than with the ratio clipped
    ratio = (logp - old).exp()  # (n,) ρ
    A = advantage[answer]  # (n,)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    gain = torch.minimum(ratio * A, clipped * A)

    # how far the policy is from the frozen model
    d = ref - logp
    divergence = d.exp() - d - 1 if kl == "k3" else -d  # (n,) KL_t

    # the mean over the |T_i| tokens of each answer, then over all answers of the step
    lengths = torch.zeros_like(advantage).index_add_(0, answer, torch.ones_like(A))  # (B,)
    loss = -((gain - beta * divergence) / lengths[answer]).sum() / count
    return loss, ratio, divergence


def answer_sample(prompt, completion):
    """An answer as a Sample that goes on where its prompt stops; is_text is T_i, empty if truncated.

    ids          The  sky  <start>  .  .  <end>  turns  <im_end>
    is_latent     0    0     0      1  1    0      0       0
    is_text       1    1     1      0  0    0      1       1
    """
    n = len(completion.ids)
    is_sampled = torch.tensor(completion.is_sampled)
    positions = prompt.positions.max() + 1 + torch.arange(n)
    return Sample(
        ids=torch.tensor(completion.ids),
        positions=positions.expand(3, -1),
        is_text=torch.zeros_like(is_sampled) if completion.truncated else is_sampled,
        is_latent=torch.tensor(completion.is_latent),
        is_visual=torch.zeros(n, dtype=torch.bool),
        is_real=torch.ones(n, dtype=torch.bool),
        source=prompt.source,
    )


def join_samples(prompt, answer):
    """A prompt and an answer to it as one Sample."""
    names = ("ids", "positions", "is_text", "is_latent", "is_visual", "is_real")
    joined = {name: torch.cat([getattr(prompt, name), getattr(answer, name)], dim=-1) for name in names}
    return Sample(**joined, video=prompt.video, source=prompt.source)


def pack(model, vision, groups, prefix, replay):
    """G answers to each of some questions as one Batch, and the latents (n, D) to be seen in them.

    shared: rows are answers, batch.prompts is what they go on from. rows: prompt and answer in one.
    """
    # a row for each answer, and the latents in the order of the rows
    samples = []
    latents = []
    for group in groups:
        for completion in group.completions:
            answer = answer_sample(group.prompt, completion)
            samples.append(answer if prefix == "shared" else join_samples(group.prompt, answer))
            latents.append(completion.latents)
    pad_id = model.token_id["pad"]
    batch = vision.prepare(collate(samples, pad_id))
    # padded on the left, so that all prompts end where the answers begin
    if prefix == "shared":
        prompts = [group.prompt for group in groups]
        batch.prompts = vision.prepare(collate(prompts, pad_id, side="left"))

    latents = torch.cat(latents).to(model.device)  # (n, D)
    if not replay:
        # release: pad embeddings where the latents were, as an ablation
        weight = full_tensor(model.qwen.get_input_embeddings().weight.detach())
        latents = weight[model.token_id["latent_pad"]].expand_as(latents)
    return batch, latents


# ---------------------------------------------------------------- a step's questions and answers


def answer_generator(seed, step, question, number):
    """The random numbers of one answer, whatever the number of devices or the batch."""
    state = random.Random(f"{seed} {step} {question} {number}").getrandbits(60)
    return torch.Generator().manual_seed(state)


def draw_questions(policy, rows, step, c, rank, world):
    """The questions of a step that are this process's -> [Group], by length so that little is padding."""
    groups = []
    drawn = rows_of_step(step, len(rows), c.GLOBAL_BATCH, c.SEED)
    for place, index in enumerate(drawn):
        prompt = encode_row(policy, rows[index], answer=False)
        groups.append(Group(index, prompt, repeat=drawn[:place].count(index)))
    groups.sort(key=lambda group: len(group.prompt.ids))
    return groups[rank::world]


def sample_answers(policy, vision, groups, step, c):
    """Fills in the completions: G answers to each question, sampled by the policy, imagery included."""
    for start in range(0, len(groups), c.ROLLOUT_BATCH):
        part = groups[start : start + c.ROLLOUT_BATCH]
        prompts = [group.prompt for group in part]
        generators = []
        for group in part:
            numbers = range(group.repeat * c.G, (group.repeat + 1) * c.G)
            generators += [answer_generator(c.SEED, step, group.index, n) for n in numbers]
        answers = generate(policy, prompts, c.MAX_NEW, vision, c.TEMPERATURE, generators=generators)
        for number, group in enumerate(part):
            group.completions = answers[number * c.G : (number + 1) * c.G]


def update_cost(group, c):
    """Tokens that the update computes for a question: its prompt, once or G times, and padded answers."""
    longest = max(len(completion.ids) for completion in group.completions)
    reads = 1 if c.PREFIX == "shared" else c.G
    return reads * len(group.prompt.ids) + c.G * longest


def total_rewards(groups, weights):
    """Eq. 9: R = Σ weight · part of each answer -> (Q, G); exits if the parts are not those weighed."""
    totals = []
    for group in groups:
        for parts in group.scores:
            names = f"reward() gives {', '.join(parts)}, REWARD_WEIGHTS has {', '.join(weights)}"
            require(set(parts) == set(weights), f"{names}; give each part one weight.")
        totals.append([sum(weights[name] * parts[name] for name in weights) for parts in group.scores])
    return torch.tensor(totals)


@torch.no_grad()
def token_sums(loss, logp, ratio, divergence, epsilon):
    """Sums over the tokens of all T_i for the log; -logp of sampled tokens estimates the entropy."""
    return {
        "loss": loss.double(),
        "ratio": ratio.sum().double(),
        "clip": ((ratio - 1).abs() > epsilon).sum(),
        "kl": divergence.sum().double(),
        "entropy": -logp.sum().double(),
        "n_text": len(logp),
    }


# ---------------------------------------------------------------- set-up


def check_constants(c, world):
    """Ends the program with one sentence on constants that do not go together."""
    require_shares(c.GLOBAL_BATCH, world)
    has_cache = c.PREFIX == "rows" or not c.CHECKPOINTING
    require(has_cache, "CHECKPOINTING=True drops all caches, which PREFIX=shared needs; set PREFIX=rows.")


def score_files(model, held_out, out, scoring):
    """Scores each file of held-out rows into a folder of its own -> {name: summary}."""
    with whole_weights(model):
        return {
            name: evaluate.evaluate(model, rows, Path(out) / name, **scoring)
            for name, rows in held_out.items()
        }


if __name__ == "__main__":
    c = override_constants(globals())
    rank, world, device = init_distributed()
    check_constants(c, world)

    # data
    video_options = (c.VIDEOS, rank, world, c.CACHE, c.FPS, c.MAX_FRAMES)
    rows = attach_video_rows(read_rows(c.DATA), *video_options)
    require(rows, f"DATA={c.DATA}: no row's video could be used; set VIDEOS to their folder.")
    for row in rows:
        has_key = row.key in row.options
        require(has_key, f"{row.source}: there are no options with a key to reward by; drop the row.")
    held_out = {}
    for name, file in {"compound": c.HOLDOUT, "single": c.SINGLES}.items():
        if file and c.HOLDOUT_ROWS:
            held_out[name] = attach_video_rows(read_rows(file, c.HOLDOUT_ROWS), *video_options)

    # the policy, from the newest checkpoint in OUT or from MODEL, and the frozen reference
    run = open_run(c.OUT, c.RESUME, vars(c), kept_on_resume, rows)
    start_path = run.record.get("start_path") or str(newest_checkpoint(c.MODEL))
    reference_path = run.record.get("reference_path") or str(newest_checkpoint(c.REFERENCE or start_path))
    # kept, for the folder of another run may get a newer checkpoint
    run.record.update(start_path=start_path, reference_path=reference_path)
    parent = run.folder or start_path
    policy = load_model(parent, device, fast=c.FAST)
    reference = load_model(reference_path, device, fast=c.FAST).requires_grad_(False)
    require(policy.K, f"{parent} has no latents (latent_size 0); choose a checkpoint of dift.py with K > 0.")
    share_vision(policy, reference, parent, reference_path)
    if c.CHECKPOINTING:
        checkpoint_layers(policy.qwen)
    model = wrap_parallel(policy, c.PARALLEL, device)
    if c.PARALLEL == "fsdp":
        reference = wrap_parallel(reference, c.PARALLEL, device)
    vision = VisionCache(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, c.LR, weight_decay=c.WEIGHT_DECAY, fused=True)
    if run.start:
        load_optimizer(parent, policy, optimizer)

    # log, and the scores before: of the model where the policy started
    clear_run(run, unfinished=run.start < c.STEPS, results="after")
    print0(f"grpo4d: {parent} -> {c.OUT} | reference {reference_path} | {c.DATA}, {len(rows)} rows")
    print_header(c, trained, world, device)
    print0("first question:", rows[0].text_input, f"key: {rows[0].key}", sep="\n")
    settings = evaluate.Settings(max_new=c.MAX_NEW, batch=c.TEST_BATCH, fps=c.FPS, max_frames=c.MAX_FRAMES)
    scoring = {"settings": settings, "resume": c.RESUME == "auto", "rank": rank, "world": world}
    first = reference if reference_path == start_path else load_model(start_path, device, fast=c.FAST)
    before = score_files(first, held_out, Path(c.OUT) / "before", scoring)
    del first
    gc.collect()

    for step in range(run.start, c.STEPS):
        began = time.time()
        lr = linear_warmup_decay(step, c.STEPS, c.WARMUP, c.LR)
        optimizer.param_groups[0]["lr"] = lr
        if not c.CACHE_FEATURES:
            vision.clear()

        # 1, 2: questions, and G answers to each
        policy.eval()
        groups = draw_questions(policy, rows, step, c, rank, world)
        with whole_weights(policy), autocast(device):
            sample_answers(policy, vision, groups, step, c)
        sampled = time.time()

        # 3, 4: rewards and advantages; from here on sorted by cost of the update: little is padding
        groups.sort(key=lambda group: update_cost(group, c))
        for group in groups:
            row = rows[group.index]
            group.scores = [reward(row, answer, c.FORMAT_NEEDS_IMAGERY) for answer in group.completions]
        rewards = total_rewards(groups, c.REWARD_WEIGHTS)  # (Q, G)
        advantage = advantages(rewards).to(device)

        # 5: the answers again, with the very latents that were fed, under the frozen reference
        policy.train(c.CHECKPOINTING)  # training mode is needed for checkpointing alone
        batches = []
        for start in range(0, len(groups), c.MICRO_BATCH):
            part = slice(start, start + c.MICRO_BATCH)
            batch, latents = pack(policy, vision, groups[part], c.PREFIX, c.LATENT_REPLAY)
            with torch.no_grad(), autocast(device):
                ref = reference(batch, latents, forbid=True, temperature=c.TEMPERATURE)[0]  # (n,)
            batches.append((batch, latents, ref, advantage[part].flatten()))

        # 6, 7: MU updates on them; every process has as many questions, so as many passes
        sums = {**answer_sums(groups, rewards), **padding_sums(batch for batch, *_ in batches)}
        old_logp = {}  # log-probabilities before the first update, of each micro-batch
        for _ in range(c.MU):
            for number, (batch, latents, ref, A) in enumerate(batches):
                with no_sync(model, when=number + 1 < len(batches)):
                    with autocast(device):
                        logp = model(batch, latents, forbid=True, temperature=c.TEMPERATURE)[0]  # (n,)
                        old = old_logp.setdefault(number, logp.detach())
                        answer = batch.text_at // batch.ids.shape[1]  # (n,): the row of each token
                        loss, ratio, divergence = grpo_loss(
                            logp, old, ref, A, answer, c.GLOBAL_BATCH * c.G, c.EPSILON, c.BETA, c.KL
                        )
                    (loss * world).backward()  # DDP takes the mean over processes, Eq. 10 the sum
                add_sums(sums, token_sums(loss, logp, ratio, divergence, c.EPSILON))
            gnorm = full_tensor(torch.nn.utils.clip_grad_norm_(policy.parameters(), c.CLIP))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # log
        entry = {"step": step + 1, **to_means(all_reduce_sum(sums, device), c)}
        entry.update(gnorm=gnorm.item(), lr=lr, seconds=time.time() - began)
        thousands = entry["length"] * c.GLOBAL_BATCH * c.G / 1e3  # positions of all answers, latents included
        entry["rollout"] = thousands / (sampled - began)
        entry["update"] = thousands * c.MU / (time.time() - sampled)
        if held_out.get("compound") and c.EVAL_EVERY and (step + 1) % c.EVAL_EVERY == 0:
            policy.eval()
            with whole_weights(policy):
                summary = evaluate.evaluate(policy, held_out["compound"], **scoring)
            score = summary["scores"]["micro"]
            entry["holdout"] = score["accuracy"]
            print0(f"HOLDOUT after {step + 1} steps: {100 * score['accuracy']:.1f} % of {score['n']}")
        run.write(entry)
        if is_due(step, c.LOG_EVERY, c.STEPS):
            parts = weighted_terms(entry, c.REWARD_WEIGHTS, c.REWARD_WEIGHTS, digits=2)
            print0(log_line.format(**entry, steps=c.STEPS, parts=parts))
        if c.SAMPLE_EVERY and step % c.SAMPLE_EVERY == 0:
            print0(show_answer(rows[groups[0].index], groups[0], rewards[0, 0]))
        if is_due(step, c.SAVE_EVERY, c.STEPS):
            run.save(step + 1, policy, optimizer)

    # scores after, beside those before; picture and report of each kind of question
    policy.eval()
    after = score_files(policy, held_out, Path(c.OUT) / "after", scoring)
    if held_out:
        with whole_weights(policy):
            if rank == 0:
                print(compare_table(before, after))
                for name, some in held_out.items():
                    out = Path(c.OUT) / "after" / name
                    evaluate.draw(policy, some, out, run.log)
                    print0(f"{out}/summary.json, {out}/picture.png, {out}/report.html")
    end_distributed()
