"""Scoring (paper Sec. 4): answers held-out questions greedily, counts, and draws what the model imagined.

In:  a checkpoint of dift.py or grpo4d.py (MODEL), and rows of generate_data.py or a benchmark's files (DATA).
Out: OUT/results.jsonl (a line per question, written as they finish; a rerun goes on where it stopped),
     OUT/settings.json, OUT/summary.json, OUT/picture.png, OUT/report.html; of DSR-Bench also
     OUT/results_summary.json as the release's.

    python evaluate.py MODEL=out/dift                                      # laptop
    python evaluate.py MODEL=out/dift BENCH=dsi DATA=metadatas VIDEOS=videos FPS=5 BATCH=16    # one GPU
    torchrun --nproc_per_node=2 evaluate.py MODEL=out/dift LATENTS=zero    # two processes, and a control

A question of your own: tools/ask.py. Mean and spread of sampled answers over several seeds: tools/seeds.py.

Differs from the paper:
- greedy, in a fixed order: a second run gives the same digits (release: temperature 0.7, top-p 0.9, one seed)
- the frames' seconds may stand before the question (TIMES_IN_PROMPT)
- the parser is strict: one <answer> with a letter, or no answer; the release's rule is counted beside it
- benchmarks are scored by these two rules alone (VLM4D's authors: a language model judges)
- a video's frames pass through JPEG (quality 95) on disk, as the frames of the release's training data
- controls: no, another or a shuffled video; latents zeroed, noised, padded, swapped or true (ours)
- object@1, moment@1, retrieval@1 and the centred cosine say whether the right latents are imagined (ours)
"""

import dataclasses
import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from lib.benchmarks import known_groups, read_benchmark
from lib.checkpoints import newest_checkpoint
from lib.command_line import override_constants, require
from lib.distributed import all_gather_list, autocast, end_distributed, init_distributed
from lib.files import append_jsonl, evenly_spaced, read_json, read_jsonl, remove_leftovers, to_jsonl
from lib.files import write_json, write_text
from lib.imagery import compare_blocks, index_overlays, learn_readout, load_pixels, mean_of
from lib.imagery import r_squared, same_subtask, split_rows, summarise_imagery
from lib.report import draw_answer, draw_picture, make_page
from lib.safety import release_lock, take_lock
from lib.scores import Result, as_percent, describe_readout, describe_summary, is_dsr, mean
from lib.scores import (
    read_neighbour,
    read_results,
    read_settings,
    release_summary,
    subtasks_in_order,
    three_of_four,
    wilson_interval,
)
from lib.rows import read_twin
from lib.videos import attach_frames, attach_video_rows
from model import VisionCache, encode_row, generate, load_model

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint
DATA = "out/toy"  # folder with test_imagery.jsonl, or one jsonl file; or a benchmark's folder or file
VIDEOS = ""  # folder that the paths of a benchmark's videos start from
OUT = ""  # "": a folder in MODEL's: eval or the benchmark's name, and a suffix for each control
CACHE = "out/frames"  # folder for the frames of decoded videos; may be deleted
# --- data
BENCH = "toy"  # toy, or a benchmark of lib/benchmarks.py: dsr, dyn, vlm4d or dsi
FPS = 1.0  # 1e-6 to 1e3; frames a second of a video (release); DSI-Bench's authors take 5
MAX_FRAMES = 50  # >= 1; of a video, evenly spaced where there are more (release)
TIMES_IN_PROMPT = False  # True: the seconds of the frames stand before the question (ours)
LIMIT = 0  # >= 0; questions, the first so many of the file; 0: all
VIDEO = ""  # "" | none | other (another clip's frames) | shuffled (frames in another order) (ours)
# --- model
LATENTS = ""  # "" | zero | noise | pad | swap (another question's) | oracle (true): what is fed (ours)
MAX_NEW = 512  # 1 to 1e6; new positions of an answer at most, latents included
TEMPERATURE = 0.0  # 0 or 0.01 to 100; 0: greedy; 0.7 (release)
TOP_P = 1.0  # > 0, <= 1; share of the probability that is sampled from; 0.9 (release)
SECONDS_PER_PAIR = None  # > 0, <= 1e6; None: the checkpoint's own; 2.0: as the release evaluates
SUFFIX = ""  # instruction after the question; "": the checkpoint's own; @file reads one
# --- logging
SAMPLES = 8  # >= 1; answers drawn in the report
READOUT = 3000  # >= 0; overlays that the readout is fitted on, at most; 0: no readout
# --- system
BATCH = 64  # >= 1; questions answered at once
RESUME = True  # False: answer all again
FAST = True  # False: exactly the code of model.py, the same numbers
SEED = 0  # >= 0; of sampling, VIDEO=other and shuffled, LATENTS=noise and swap


@dataclass(frozen=True)
class Settings:
    """How questions are asked. Not set: as the constants above say, also for dift.py and grpo4d.py."""

    video: str = VIDEO
    latents: str = LATENTS
    max_new: int = MAX_NEW
    batch: int = BATCH
    seed: int = SEED
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    fps: float = FPS
    max_frames: int = MAX_FRAMES
    times_in_prompt: bool = TIMES_IN_PROMPT


def to_settings(values):
    """Settings from a dict with some of their names, such as those of a settings.json."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: values[name] for name in names if name in values})


# ---------------------------------------------------------------- the letter of an answer

# release: these words are cut out before its rule looks for a letter
OPENINGS = re.compile(
    "The best answer is|The correct answer is|The answer is|The answer|"
    "The best option is|The correct option is|Best answer:|Best option:|Answer:|Option:"
)


def parse_answer(text, letters="ABCDEF"):
    """The letter of the one <answer>...</answer>: "B", "(B)", "B. Left" give B; "b", "Back" give None."""
    # a letter, or one in brackets; after it a word must end, so that "Back" is no answer
    is_single = text.count("<answer>") == text.count("</answer>") == 1
    found = re.search(r"<answer>\s*(\()?([A-F])(?(1)\))(?=[.:)\s]|</answer>).*</answer>", text, flags=re.S)
    if not is_single or not found or found[2] not in letters:
        return None
    return found[2]


def release_answer(text, letters="ABCD"):
    """Release: the first of the letters in <answer>, else in the whole text: "Analyzing" gives A; or "".

    The release also retries with the latent tokens removed; left out, as they contain no capital letters.
    """
    # what stands in the tags is searched first, then all of the text
    text = text.split("<|im_end|>")[0]
    tagged = re.search("<answer>(.*?)</answer>", text, flags=re.S | re.I)
    for part in [tagged[1], text] if tagged else [text]:
        found = re.search(f"[{letters}]", OPENINGS.sub("", part))
        if found:
            return found[0]
    return ""


def score_answer(row, index, completion, K):
    """What was generated for a row, the index-th -> Result by both rules, its latents (n, K, D) in blocks."""
    # a benchmark's question may have several right letters, a question of one's own has none
    keys = list(row.key or "")
    letters = "".join(row.options)
    text = completion.text
    answer = parse_answer(text, letters)
    pred = release_answer(text, f"ABCD{letters}")
    # a last block that was cut off is not counted
    latents = completion.latents.float().cpu()  # (positions, D)
    blocks = len(latents) // K if K else 0
    result = Result(
        row=index,
        source=Path(row.source).name,
        id=row.id,
        subtask=row.subtask,
        options=len(row.options),
        key=row.key,
        answer=answer,
        correct=answer in keys,
        pred=pred,
        hit=int(pred in keys),
        truncated=bool(completion.truncated),
        blocks=blocks,
        tokens=len(completion.ids),
        text=text,
        latents=latents[: blocks * K].view(blocks, K, latents.shape[-1]),
    )
    # DSR-Bench's rows are written with the fields that the release writes
    if row.release_fields:
        result.release_fields = {**row.release_fields, "question": row.text_input, "raw": text}
    return result


# ---------------------------------------------------------------- counting


def score_results(results):
    """n; strict: correct, accuracy, its interval; release: its share; chance (mean of 1 / options)."""
    n = len(results)
    correct = sum(result.correct for result in results)
    blocks = [block for result in results for block in result.imagery]
    low, high = wilson_interval(correct, n)
    return {
        "n": n,
        "correct": correct,
        "accuracy": correct / max(n, 1),
        "low": low,
        "high": high,
        "release": mean(result.hit for result in results),
        "note": "",
        "chance": mean(1 / result.options for result in results),
        "object": mean_of(blocks, "object"),
        "moment": mean_of(blocks, "moment"),
        "retrieval": mean_of(blocks, "retrieval"),
    }


def summarise(results):
    """Results -> scores by subtask, group and "micro"; macros (mean over subtasks); counts over answers."""
    versions = three_of_four(results)  # of DSI-Bench
    subtasks = subtasks_in_order(results)
    version_subtasks = subtasks_in_order(versions)

    # name of a score -> the subtasks that it counts
    parts = {name: [name] for name in subtasks + version_subtasks}
    parts.update(known_groups())
    parts["micro"] = subtasks
    parts["micro, 3 of 4"] = version_subtasks

    # a group of which there is no question is left out
    scores = {}
    for name, members in parts.items():
        some = [result for result in results + versions if result.subtask in members]
        if some:
            scores[name] = score_results(some)

    return {
        "scores": scores,
        "macro": mean(scores[name]["accuracy"] for name in subtasks),
        "release_macro": mean(scores[name]["release"] for name in subtasks),
        "differ": mean((result.answer or "") != result.pred for result in results),
        "no_answer": sum(result.answer is None for result in results),
        "cut": sum(result.truncated for result in results),
        "blocks": mean(result.blocks for result in results),
        "tokens": mean(result.tokens for result in results),
        "imagery": summarise_imagery(results),
    }


def print_table(summary):
    """Prints the scores, a line each, and the rest."""
    print(f"{'':20}     n  right       %   95 % interval  release  chance  object@1  moment@1  retrieval")
    line = "{:20}{n:6d}{correct:7.5g}{accuracy:>8}{low:>8} - {high:>5}{release:>9}{chance:>8}"
    line += "{:>10}{:>10}{:>11}  {note}"
    for name, score in summary["scores"].items():
        found = []
        for comparison in ("object", "moment", "retrieval"):
            share = score[comparison]
            found.append("" if share is None else f"{share:.3f}")
        print(line.format(name, *found, **as_percent(score)).rstrip())
    print("\n".join(describe_summary(summary)))


# ---------------------------------------------------------------- controls: what is shown, what is fed


def choose_other(rows, index, seed):
    """A row as in same_subtask, chosen by (seed, index); exits if there is none."""
    others = same_subtask(rows, index)
    needs = "this control needs another clip with a question of this subtask; there is none"
    require(others, f"{rows[index].source}: {needs}.")
    return random.Random(f"{seed} {index}").choice(others)


def apply_video_control(rows, index, settings):
    """The row as VIDEO shows it: without frames, with another clip's, or with its own in another order.

    With times_in_prompt the question begins with the times of the frames that are shown.
    """
    row = rows[index]
    frames = list(row.image_input)
    times = row.times
    # the true overlays stay those of the row: the imagery is compared with what it should have been
    if settings.video == "none":
        frames, times = [], []
    if settings.video == "other":
        other = rows[choose_other(rows, index, settings.seed)]
        frames, times = other.image_input, other.times
    if settings.video == "shuffled":
        needs = "VIDEO=shuffled needs two frames or more"
        require(len(set(frames)) > 1, f"{row.source}: {needs}; drop the row.")
        # the times stay as they were, so that only the order of the frames changes
        shuffler = random.Random(f"{settings.seed} {index}")
        while frames == row.image_input:
            shuffler.shuffle(frames)
    question = row.text_input
    if settings.times_in_prompt and times:
        seconds = ", ".join(f"{time:.1f}" for time in times)
        question = f"The frames of the video were taken at {seconds} seconds.\n{question}"
    return dataclasses.replace(row, image_input=frames, times=times, text_input=question)


def make_feed(kind, indices, tables, pad, K, seed):
    """What generate feeds in latent blocks, feed(own (B, D), block (B,), k (B,)) -> (B, D); None for "".

    indices: of the rows, they seed the noise; pad (D,); tables: per row the latents (n, K, D) to swap in
    (from the first again when there are more blocks) or the true ones (its own stay when there are more).
    Rows outside a block, whose k is K or more, keep what they have.
    """

    def replaced(own, row, block, k):
        """One latent (D,)."""
        if kind == "pad":
            return pad.to(own)
        # noise of the same norm, by question, block and place: it does not depend on batch-mates
        if kind == "noise":
            number = random.Random(f"{seed} {indices[row]} {block} {k}").getrandbits(60)
            noise = torch.randn(len(own), generator=torch.Generator().manual_seed(number)).to(own)
            return noise * own.norm() / noise.norm()
        if kind == "swap" and len(tables[row]):
            return tables[row][block % len(tables[row]), k].to(own)
        if kind == "oracle":
            return tables[row][block, k].to(own) if block < len(tables[row]) else own
        return torch.zeros_like(own)  # zero, and swap where there are no latents to swap in

    def feed(own, block, k):
        """The latents of all rows (B, D)."""
        # a row that is in no block has a k of K or more
        latents = own.clone()
        for row, (number, place) in enumerate(zip(block.tolist(), k.tolist())):
            if place < K:
                latents[row] = replaced(own[row], row, number, place)
        return latents

    return feed if kind else None


# ---------------------------------------------------------------- were the right latents imagined?


class TrueLatents:
    """Eq. 5 for the overlays of rows: truth(indices) -> list of (n, K, D); each overlay is pooled once."""

    def __init__(self, model, rows, vision=None):
        self.model = model
        self.rows = rows
        self.vision = vision if vision and vision.keep else VisionCache(model)
        self.moments = index_overlays(rows)  # the overlays of each moment, by thing
        self.pooled = {}  # overlay file -> (K, D)

    @torch.no_grad()
    def encode(self, files, source):
        """The true latents (n, K, D) of n overlays, which are encoded together."""
        missing = [path for path in dict.fromkeys(files) if path not in self.pooled]
        self.vision.encode_missing([(path,) for path in missing], source)
        # the features are in the cache now, and are pooled as they are in training
        for path in missing:
            entry = self.vision.store[(path,)]
            latents = self.model.pool(entry.features.to(self.model.device), entry.grid)
            self.pooled[path] = latents.float().cpu()
        none = torch.zeros(0, self.model.K, self.model.config.text_config.hidden_size)
        return torch.stack([self.pooled[path] for path in files]) if files else none

    def __call__(self, indices):
        """The true latents of the rows of these indices, whose overlays are encoded together."""
        # a model without latents has nothing to compare
        overlays = [self.rows[i].image_output if self.model.K else [] for i in indices]
        self.encode([path for own in overlays for path in own], self.rows[indices[0]].source)
        return [self.encode(own, self.rows[i].source) for i, own in zip(indices, overlays)]


# ---------------------------------------------------------------- answering


def answer(model, rows, indices, settings, truth, vision=None):
    """Answers the rows of the given indices together -> their Results, with latents.

    swap: the latents come from a first, plain pass over a question of the same subtask on another clip.
    """
    # latents that two of the controls feed in the place of the model's own
    tables = None
    if settings.latents == "oracle":
        tables = truth(indices)
    if settings.latents == "swap":
        donors = [choose_other(rows, i, settings.seed) for i in indices]
        plain = dataclasses.replace(settings, latents="")
        tables = [result.latents for result in answer(model, rows, donors, plain, truth, vision)]
    feed = make_feed(settings.latents, indices, tables, model.pad_embedding(), model.K, settings.seed)

    # an answer depends on the seed and the question, not on its batch-mates
    generators = []
    for i in indices:
        number = random.Random(f"{settings.seed} {i}").getrandbits(60)
        generators.append(torch.Generator().manual_seed(number))

    # the prompts, and what the model writes after them
    shown = [apply_video_control(rows, i, settings) for i in indices]
    samples = [encode_row(model, row, answer=False) for row in shown]
    sampling = (settings.temperature, settings.top_p, generators)
    with autocast(model.device):
        completions = generate(model, samples, settings.max_new, vision, *sampling, feed)
    return [score_answer(rows[i], i, given, model.K) for i, given in zip(indices, completions)]


def plan_batches(rows, indices, size):
    """The indices in batches of similar length, the longest first, always in the same order."""

    def length(i):
        return -len(rows[i].image_input), -len(rows[i].text_input), i

    order = sorted(indices, key=length)
    return [order[start : start + size] for start in range(0, len(order), size)]


def describe_run(model, rows, settings):
    """What the answers in one folder share: weights (a sum over some of each, as bf16), questions, settings.

    FSDP on a GPU hands out bf16 copies of the weights, whose sum must be that of the checkpoint.
    """
    # the first weights of each tensor are enough to tell two checkpoints apart
    weights = sum(x.flatten()[:1000].bfloat16().double().sum().item() for x in model.qwen.parameters())
    questions = zlib.crc32("".join(row.text_input for row in rows).encode())
    shared = {"weights": weights, "questions": questions, **vars(settings)}
    # but for rounding, answers do not depend on the size of the batches
    shared.pop("batch")
    for name in ("prompt_suffix", "seconds_per_pair"):
        shared[name] = getattr(model.config, name)
    return shared


def open_folder(out, run, resume, rank, count):
    """The results that `out` holds -> {index: Result}; exits on another run's, or a row >= `count`."""
    file = out / "settings.json"
    if rank == 0:
        take_lock(out)
        remove_leftovers(out)
    stored = read_settings(out)
    done = {}
    if resume and stored is not None:
        # a folder from before TIMES_IN_PROMPT existed was answered without times
        stored = {"times_in_prompt": False, **stored}
        for name, value in run.items():
            before = stored.get(name)
            differs = f"{file}: the answers there are of {name}={before!r}, this run has {value!r}"
            advice = f"set another OUT, or delete {out} to answer again"
            require(before == value, f"{differs}; {advice}.")
        for index, entry in read_results(out / "results.jsonl", count).items():
            done[index] = Result.from_json(entry)
    if rank == 0:
        save_results(out, done)
        write_text(file, json.dumps(run))
        print(f"{out}: {len(done)} answers are there already")
    return done


def save_results(out, done):
    """Writes all results so far, in order of their rows."""
    in_order = [done[index].to_json() for index in sorted(done)]
    write_text(out / "results.jsonl", to_jsonl(in_order))


def evaluate(model, rows, out=None, settings=None, limit=0, resume=True, rank=0, world=1, vision=None):
    """Answers the first `limit` rows (0: all) and counts -> summary.

    Without `out` nothing is written. Batches are dealt out to the processes, which all hold the whole model.
    A batch that a kill cut short is answered whole, so that each row keeps its batch-mates.
    """
    settings = settings or Settings()
    out = Path(out) if out else None

    # each question needs a key; one whose video is missing is left out, and counted
    first = rows[: limit or None]
    for row in first:
        has_key = row.skip_reason or (row.key and set(row.key) <= set(row.options))
        require(has_key, f"{row.source}: there are no options with a key to score by; drop the row.")
    skipped = [f"{row.source}: {row.skip_reason}" for row in first if row.skip_reason]
    asked = [index for index, row in enumerate(first) if not row.skip_reason]
    require(asked, f"No question of {len(first)} has a video; {skipped[:1]}; set VIDEOS.")

    # what is left to answer: whole batches
    run = describe_run(model, rows, settings)
    done = open_folder(out, run, resume, rank, len(rows)) if out else {}
    batches = plan_batches(rows, asked, settings.batch)
    batches = [batch for batch in batches if not done.keys() >= set(batch)]
    truth = TrueLatents(model, rows, vision)

    was_training = model.training
    model.eval()
    for start in range(0, len(batches), world):
        # each process answers one batch; then all hold the results of all
        mine = []
        if start + rank < len(batches):
            mine = answer(model, rows, batches[start + rank], settings, truth, vision)
        for result in mine:
            result.imagery = compare_blocks(rows, result.row, result.latents, truth)
            result.latents = None
        new = [result for result in all_gather_list(mine) if result.row not in done]
        for result in new:
            done[result.row] = result
        if out and rank == 0:
            append_jsonl(out / "results.jsonl", [result.to_json() for result in new])
            right = mean(result.correct for result in done.values())
            print(f"evaluate {len(done):5d}/{len(asked)} | {right:6.1%} right", flush=True)
    model.train(was_training)

    # the scores, over the answers of this run and those that were there before
    results = [done[index] for index in asked]
    summary = summarise(results)
    summary["settings"] = run
    summary["left_out"] = skipped
    if skipped:
        summary["scores"]["micro"]["note"] = f"{len(skipped)} left out: no video, or a bad row"
    if out and rank == 0:
        save_results(out, done)
        write_json(out / "summary.json", summary)
        if is_dsr(results[0].subtask):
            write_json(out / "results_summary.json", release_summary(results, summary))
        release_lock(out)
    return summary


# ---------------------------------------------------------------- picture and report


def score_readout(model, rows, indices, settings, readout):
    """R² of a readout (lib/imagery.py) on the overlays of these rows: of true latents, of imagined ones."""
    truth = TrueLatents(model, rows)
    true = {"latents": [], "files": []}
    imagined = {"latents": [], "files": []}
    for batch in plan_batches(rows, indices, settings.batch):
        for result in answer(model, rows, batch, settings, truth):
            files = rows[result.row].image_output
            true["latents"].extend(truth([result.row])[0])
            true["files"].extend(files)
            # more blocks, or fewer, may be imagined than there are overlays
            imagined["latents"].extend(result.latents[: len(files)])
            imagined["files"].extend(files[: len(result.latents)])

    shares = []
    for part in (true, imagined):
        share = None
        if part["files"]:
            pixels = load_pixels(part["files"], rows[indices[0]].source)
            share = r_squared(readout, torch.stack(part["latents"]), pixels)
        shares.append(share)
    return {"true_r2": shares[0], "imagined_r2": shares[1], "rows": len(indices)}


def draw_row(model, rows, index, settings, readout=None):
    """Answers a row and draws that, its imagery as a readout (lib/imagery.py) shows it -> Drawing."""
    truth = TrueLatents(model, rows)
    result = answer(model, rows, [index], settings, truth)[0]
    shown = apply_video_control(rows, index, settings)
    return draw_answer(shown, result, truth([index])[0], readout)


def draw(model, rows, out, log="", samples=8, train_rows=None, overlays=3000):
    """Answers some rows of `out` again, right and wrong ones, and draws out/picture.png and out/report.html.

    log: the training run's log.jsonl, for the curves. The imagery is drawn by a readout, fitted on at most so
    many overlays of train_rows, or of half of the rows if those are few; its R² goes to out/summary.json.
    The report also shows the scores of the controls that stand beside `out`, such as eval_video-none.
    """
    out = Path(out)
    summary = read_json(out / "summary.json")
    settings = to_settings(summary["settings"])

    # tools/seeds.py keeps the answers of each seed in a folder of their own
    folder = out / f"seed_{settings.seed}" if "seeds" in summary else out
    results = list(read_results(folder / "results.jsonl").values())

    # the readout sees none of the rows that it is shown on
    answered = [result["row"] for result in results]
    fitted, held_out = split_rows(rows, train_rows, answered)
    readout = learn_readout(TrueLatents(model, rows), fitted, overlays)
    if readout:
        summary["readout"] = score_readout(model, rows, held_out[:64], settings, readout)
        write_json(out / "summary.json", summary)
        print(describe_readout(summary["readout"]))
    shown = set(held_out if readout else answered)

    # right and wrong answers, half of each, evenly spaced over the file
    drawings = []
    for correct in (True, False):
        those = [result["row"] for result in results if result["correct"] == correct]
        indices = [index for index in those if index in shown]
        for index in evenly_spaced(indices, max(1, samples // 2)):
            drawings.append(draw_row(model, rows, index, settings, readout))
    if settings.video != "none":
        # the right answer with most imagery, and a wrong one
        right = [drawing for drawing in drawings if drawing.result.correct] or drawings
        most = max(right, key=lambda drawing: len(drawing.blocks))
        pictured = [most] if drawings[-1] is most else [most, drawings[-1]]
        draw_picture(pictured).save(out / "picture.png")

    # controls of the same weights only, not of another run's
    for file in sorted(out.parent.glob(f"{out.name}_*/summary.json")):
        other = read_neighbour(file)
        if other and other["settings"]["weights"] == summary["settings"]["weights"]:
            summary["scores"][file.parent.name] = other["scores"]["micro"]
    page = make_page(summary, drawings, read_jsonl(log) if log else [])
    write_text(out / "report.html", page)


# ---------------------------------------------------------------- the script, as tools/seeds.py runs it too


def load_questions(c, rank, world):
    """The rows of DATA, with their frames as far as they are needed."""
    rows = read_benchmark(c.BENCH, c.DATA, c.VIDEOS)
    has_overlays = any(row.image_output for row in rows)
    require(has_overlays or c.LATENTS != "oracle", f"LATENTS=oracle needs true overlays; {c.DATA} has none.")
    sampling = {"cache": c.CACHE, "fps": c.FPS, "most": c.MAX_FRAMES}
    if c.BENCH == "toy":
        return attach_video_rows(rows, c.VIDEOS, rank, world, **sampling)
    # these two controls need the frames of other questions, also of those after the first LIMIT
    needs_others = c.VIDEO == "other" or c.LATENTS == "swap"
    needed = rows if needs_others else rows[: c.LIMIT or None]
    attach_frames(needed, rank, world, root=c.VIDEOS, **sampling)
    return rows


def output_folder(c, name):
    """OUT, or a folder in MODEL's with this name and a suffix for each control: eval_video-none."""
    for control in ("VIDEO", "LATENTS"):
        value = getattr(c, control)
        if value:
            name = f"{name}_{control.lower()}-{value}"
    return Path(c.OUT or Path(c.MODEL) / name)


def report(c, model, rows, out, summary):
    """Prints the scores, draws the picture and the page, and says where all of it is."""
    print_table(summary)
    log = newest_checkpoint(c.MODEL).parent / "log.jsonl"
    # a benchmark has no training questions with overlays
    train_rows = read_twin(c.DATA) if c.BENCH == "toy" and c.READOUT else []
    draw(model, rows, out, log, c.SAMPLES, train_rows, c.READOUT)
    names = ["summary.json", "picture.png", "report.html"]
    # where nothing was seen there is no picture
    if c.VIDEO == "none":
        names.remove("picture.png")
    print(", ".join(f"{out}/{name}" for name in names))


if __name__ == "__main__":
    c = override_constants(globals())
    rank, world, device = init_distributed()
    rows = load_questions(c, rank, world)
    model = load_model(c.MODEL, device, suffix=c.SUFFIX, fast=c.FAST, seconds_per_pair=c.SECONDS_PER_PAIR)
    out = output_folder(c, "eval" if c.BENCH == "toy" else c.BENCH)
    settings = to_settings({name.lower(): value for name, value in vars(c).items()})
    summary = evaluate(model, rows, out, settings, c.LIMIT, c.RESUME, rank, world)
    if rank == 0:
        report(c, model, rows, out, summary)
    end_distributed()
