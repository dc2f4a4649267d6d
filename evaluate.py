"""Scoring (paper Sec. 4): answers held-out questions greedily, counts, and draws what the model imagined.

In:  a checkpoint of dift.py or grpo4d.py (MODEL), and rows of generate_data.py or a benchmark's files (DATA).
Out: OUT/results.jsonl (a line per question, written as they finish; a rerun goes on where it stopped),
     OUT/settings.json, OUT/summary.json, OUT/picture.png, OUT/report.html; of DSR-Bench also
     OUT/results_summary.json as the release's. With SEEDS=3 all but picture and page is in OUT/seed_0 to
     OUT/seed_2, and OUT holds the mean and spread.

    python evaluate.py MODEL=out/dift                                      # laptop
    python evaluate.py MODEL=out/dift BENCH=dsi DATA=metadatas VIDEOS=videos FPS=5 BATCH=16    # one GPU
    torchrun --nproc_per_node=2 evaluate.py MODEL=out/dift LATENTS=zero    # two processes, and a control
    python evaluate.py ASK="How does it move?" VIDEO_FILE=x.mp4 OPTIONS="left|right"     # one question

Differs from the paper:
- greedy, in a fixed order: a second run gives the same digits (release: temperature 0.7, top-p 0.9, one
  seed; here SEEDS=3 TEMPERATURE=0.7 TOP_P=0.9 gives mean and spread)
- the frames' seconds may stand before the question (TIMES_IN_PROMPT)
- the parser is strict: one <answer> with a letter, or no answer; the release's rule is counted beside it
- benchmarks are scored by these two rules alone (VLM4D's authors: a language model judges)
- a video's frames pass through JPEG (quality 95) on disk, as the frames of the release's training data
- controls: no, another or a shuffled video; latents zeroed, noised, padded, swapped or true (ours)
- retrieval@1 and the centred cosine say whether the imagined latents are the right ones (ours)
"""

import ast
import base64
import contextlib
import functools
import html
import io
import json
import math
import random
import re
import string
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import stdev

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from assets.tables import read_table
from model import Images, check, encode_row, generate, init_distributed, load_model, newest_checkpoint
from model import read_rows, set_constants, video_grid

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint
DATA = "out/toy"  # folder with test_imagery.jsonl, or one jsonl file; or a benchmark's folder or file
VIDEOS = ""  # folder that the paths of a benchmark's videos start from
OUT = ""  # "": a folder in MODEL's: eval, ask or the benchmark's name, and a suffix for each control
CACHE = "out/frames"  # folder for the frames of decoded videos; may be deleted
# --- data
BENCH = "toy"  # toy | dsr | dyn | vlm4d | dsi
FPS = 1.0  # frames a second of a video (release); DSI-Bench's authors take 5
MAX_FRAMES = 50  # of a video, evenly spaced where there are more (release)
TIMES_IN_PROMPT = False  # True: the seconds of the frames stand before the question (ours)
LIMIT = 0  # questions, the first so many of the file; 0: all
VIDEO = ""  # "" | none | other (another clip's frames) | shuffled (frames in another order) (ours)
ASK = ""  # a question of your own about VIDEO_FILE, in place of all others
VIDEO_FILE = ""  # a video that decord reads, or a folder of frame_* images
OPTIONS = ""  # of ASK: "left|right", 2 to 6 of them
# --- model
LATENTS = ""  # "" | zero | noise | pad | swap (another question's) | oracle (true): what is fed (ours)
MAX_NEW = 512  # new positions of an answer at most, latents included
TEMPERATURE = 0.0  # 0: greedy; 0.7 (release)
TOP_P = 1.0  # share of the probability that is sampled from; 0.9 (release)
SECONDS_PER_PAIR = None  # None: the checkpoint's own; 2.0: as the release evaluates
SUFFIX = ""  # instruction after the question; "": the checkpoint's own
# --- logging
SAMPLES = 8  # answers drawn in the report
# --- system
BATCH = 64  # questions answered at once
RESUME = True  # False: answer all again
SEED = 0  # of sampling, VIDEO=other and shuffled, LATENTS=noise and swap
SEEDS = 1  # runs, with SEED, SEED + 1 ...; more than 1: each in OUT/seed_<its seed>, mean and spread in OUT

CONTROLS = {"VIDEO": "none other shuffled".split(), "LATENTS": "zero noise pad swap oracle".split()}
PLAIN = {"video": "", "latents": "", "max_new": 512, "batch": 64, "seed": 0}  # how evaluate asks unless told
PLAIN |= {"temperature": 0.0, "top_p": 1.0, "fps": 1.0, "max_frames": 50, "times_in_prompt": False}
BENCHES = json.loads((Path(__file__).parent / "assets" / "benchmarks.json").read_text(encoding="utf-8"))
CURVES = "loss ce sim cosine retrieval gnorm lr reward acc fmt holdout length kl entropy".split()  # drawn
PAGE = (Path(__file__).parent / "assets" / "report.html").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"<!-- part (\w+) -->\n(.*?)<!-- end -->", PAGE, flags=re.S))
FILM, HEAT = 194, 128  # pixels: width of a film frame and of a heat map
FRAMES, PAIRS = 8, 4  # film frames and heat maps drawn at most, evenly spaced
COLOURS = {"black": "#260c51", "mid": "#21918c", "white": "#fde725"}  # heat, low to high


# ---------------------------------------------------------------- answers and counts


def parse_answer(text, letters="ABCDEF"):
    """The letter of the one <answer>...</answer>: "B", "(B)", "B. Left" give B; "b", "Back" give None."""
    once = text.count("<answer>") == text.count("</answer>") == 1
    found = re.search(r"<answer>\s*(\()?([A-F])(?(1)\))(?=[.:)\s]|</answer>).*</answer>", text, flags=re.S)
    return found[2] if once and found and found[2] in letters else None


def release_answer(text, letters="ABCD"):
    """Release: the first of the letters in <answer>, else in the whole text: "Analyzing" gives A; or "".

    Its third try, without the latent tokens, cannot find more: they hold no capital.
    """
    text, openings = text.split("<|im_end|>")[0], "|".join(BENCHES["openings"])
    tagged = re.search("<answer>(.*?)</answer>", text, flags=re.S | re.I)
    said = "".join(re.sub(openings, "", part) for part in ([tagged[1], text] if tagged else [text]))
    return re.search(rf"[{letters}]|\Z", said)[0]


def judge(row, index, answer, K):
    """What generate gave for a row -> its line of results.jsonl, and `latents` (n, K, D) of whole blocks.

    `answer` and `correct` are by the strict rule, `pred` and `hit` by the release's.
    """
    letters, keys, text = "".join(row["options"]), list(row["key"] or ""), answer["text"]
    letter, pred = parse_answer(text, letters), release_answer(text, f"ABCD{letters}")
    fed = answer["latents"].float().cpu()
    blocks = len(fed) // K if K else 0
    result = {"row": index, "where": Path(row["where"]).name, "id": row["id"], "subtask": row["subtask"]}
    result |= {"options": len(row["options"]), "key": row["key"], "answer": letter}
    result |= {"correct": letter in keys, "pred": pred, "hit": int(pred in keys)}
    result |= {"cut": bool(answer["cut"]), "blocks": blocks, "tokens": len(answer["ids"]), "text": text}
    asked = {"video_path": row.get("video_path"), "question": row["text_input"], "raw": text}
    result |= row["told"] | asked if row.get("told") else {}
    return result | {"latents": fed[: blocks * K].view(blocks, K, fed.shape[-1])}


def wilson(correct, n, z=1.959964):
    """Wilson's 95 % interval of a share: (8, 10) -> (0.490, 0.943); n = 0 -> (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, room = correct / n, z * z / n
    half = z * math.sqrt(share * (1 - share) / n + room / (4 * n))
    return max(0.0, (share + room / 2 - half) / (1 + room)), min(1.0, (share + room / 2 + half) / (1 + room))


def mean(values):
    """Mean of some numbers; None if there are none."""
    return sum(found) / len(found) if (found := list(values)) else None


def count(results):
    """n; strict: correct, accuracy, its interval; release: its share; chance (mean of 1 / options)."""
    n, correct = len(results), sum(result["correct"] for result in results)
    low, high = wilson(correct, n)
    score = {"n": n, "correct": correct, "accuracy": correct / max(n, 1), "low": low, "high": high}
    score |= {"release": mean(result["hit"] for result in results), "note": ""}
    found = [block["retrieval"] for result in results for block in result["imagery"]]
    return score | {"chance": mean(1 / result["options"] for result in results), "retrieval": mean(found)}


def three_of_four(results):
    """DSI-Bench: the four versions of a question (one `twin`) as one that is right where three are.

    Not counted where a version is missing. Chance is that of three or four hits: 4p³(1 - p) + p⁴.
    """
    for twin in {result.get("twin") for result in results} - {None}:
        four = [result for result in results if result.get("twin") == twin]
        if len(four) == 4:
            p, name = 1 / four[0]["options"], f"{four[0]['subtask']}, 3 of 4"
            one = {rule: sum(result[rule] for result in four) >= 3 for rule in ("correct", "hit")}
            yield one | {"subtask": name, "options": 1 / (p**3 * (4 - 3 * p)), "imagery": []}


def in_order(results):
    """The subtasks of some results, in the order of their benchmark, else of the alphabet."""
    known = [name for subtasks in BENCHES["subtasks"].values() for name in subtasks.values()]
    return sorted({r["subtask"] for r in results}, key=lambda x: (x in known and known.index(x), x))


def summarise(results, groups=BENCHES["groups"]):
    """Results -> scores by subtask, group and "micro"; macros (mean over subtasks); counts over answers."""
    grouped = list(three_of_four(results))
    subtasks, versions = in_order(results), in_order(grouped)
    parts = {x: (x,) for x in subtasks + versions} | groups | {"micro": subtasks, "micro, 3 of 4": versions}
    members = {name: [r for r in results + grouped if r["subtask"] in part] for name, part in parts.items()}
    scores = {name: count(some) for name, some in members.items() if some}
    summary = {"scores": scores, "macro": mean(scores[name]["accuracy"] for name in subtasks)}
    summary["release_macro"] = mean(scores[name]["release"] for name in subtasks)
    summary["differ"] = mean((r["answer"] or "") != r["pred"] for r in results)
    summary |= {"no_answer": sum(r["answer"] is None for r in results), "cut": sum(r["cut"] for r in results)}
    summary |= {name: mean(result[name] for result in results) for name in ("blocks", "tokens")}
    blocks = [block for result in results for block in result["imagery"]]
    imagery = {name: mean(block[name] for block in blocks) for name in ("retrieval", "chance")}
    imagery["cosine"] = [mean(column) for column in zip(*(block["cosine"] for block in blocks))]
    return summary | {"imagery": {"compared": len(blocks)} | imagery}


def average(values):
    """Mean of numbers, or of dicts and lists entry by entry: [{"a": 1}, {"a": 2}] -> {"a": 1.5}.

    None and empty lists do not count; what is alike in all stays as it is.
    """
    if isinstance(values[0], dict):
        return {name: average([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], list):
        return [average(column) for column in zip(*filter(None, values))]
    return values[0] if len(set(values)) == 1 else mean(value for value in values if value is not None)


def over_seeds(summaries):
    """The summaries of runs with several seeds over the same questions -> one with their means and spreads.

    `..._spread`: standard deviation of runs (divisor: runs - 1). The interval is for the mean share and the n
    questions, which more seeds do not make more.
    """
    summary = average(summaries) | {"settings": summaries[0]["settings"], "seeds": len(summaries)}
    summary |= {f"{x}_spread": stdev(one[x] for one in summaries) for x in ("macro", "release_macro")}
    for name, score in summary["scores"].items():
        for rule in ("accuracy", "release"):
            score[f"{rule}_spread"] = stdev(one["scores"][name][rule] for one in summaries)
        score["low"], score["high"] = wilson(score["correct"], score["n"])
        score["note"] += " ± {accuracy_spread:.1%}, release ± {release_spread:.1%}".format(**score)
    return summary


def release_summary(results, summary):
    """DSR-Bench: what the release writes as its summary, by its rule; no question: null."""
    n, lost, scores = len(results), len(summary["left_out"]), summary["scores"]
    told = {"total": n + lost, "eval_count": n, "skipped": lost, "accuracy": scores["micro"]["release"]}
    told["correct"] = sum(result["hit"] for result in results)
    hits = {x: [r["hit"] for r in results if r["subtask"] == x] for x in BENCHES["subtasks"]["dsr"].values()}
    for field, pool in {"accuracy": mean, "correct": sum, "total": len}.items():
        told[f"subtask_{field}"] = {name: pool(some) for name, some in hits.items()}
    return told | {"subtask_macro_avg": summary["release_macro"], "subtask_columns_order": [*hits, "Avg"]}


def describe(summary):
    """The part of a summary that is no table, as lines of text with the names of summary.json."""
    imagery, number = summary["imagery"], (int, float)
    parts = [[f"{k} {x:.4g}" for k, x in d.items() if isinstance(x, number)] for d in (summary, imagery)]
    cosine = f"centred cosine per latent {' '.join(f'{value:.3f}' for value in imagery['cosine'])}"
    return [*map(", ".join, parts), cosine] if imagery["compared"] else [", ".join(parts[0])]


# ---------------------------------------------------------------- benchmarks


def parse_options(value):
    """Options in any shape -> {"A": "left", ...}: list, array, dict, text of one, "A: left; B: right"."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, SyntaxError):  # else no text of a list
        value = ast.literal_eval(value.strip())
    if isinstance(value, (str, int, float)):
        value = dict(re.findall(r"\b([A-F]):\s*(.*?)\s*(?=;\s*[A-F]:|$)", str(value), flags=re.S))
    pairs = value.items() if isinstance(value, dict) else zip("ABCDEFG", value)
    return {str(key): re.sub(rf"^\(?{key}[.):]\s+", "", str(text)) for key, text in pairs if text is not None}


def find_keys(answer, options):
    """All letters that are right, for an answer as text or letter: "left" or "A" -> "AC" if C says so too."""
    said, texts = str(answer).strip().lower(), {x: text.strip().lower() for x, text in options.items()}
    named = re.match(r"\(?([a-f])(?=[.):]|$)", said)
    wanted = said if said in texts.values() else named and texts.get(named[1].upper())
    return "".join(letter for letter, text in texts.items() if text == wanted)


def place(bench, raw, path):
    """An entry's kind, which is a key of the benchmark's subtasks, and its video's path below VIDEOS."""
    video = str(raw.get("video"))
    if bench == "dsr":
        return str(raw["type"]).strip().lower(), f"{video.removesuffix('.mp4')}.mp4"
    if bench == "dyn":
        scene, _, kind = path.stem.rpartition("_")
        return kind, f"{path.parent.name}/{scene}"
    if bench == "vlm4d":
        video = video.rpartition("resolve/main/")[2]
        made_up = video.startswith("videos_synthetic/") and re.match("no( |$)", str(raw["answer"]).lower())
        return "no" if made_up else str(Path(video).parent), video
    return str(raw["type"]), f"{raw.get('aug', path.stem)}/{video}"


def ask_row(where, question, options):
    """A question and its options {"A": "left", ...} -> a row without frames and without a key."""
    text = "\n".join([f"{question}\n", *(f"{letter}. {text}" for letter, text in options.items())])
    row = {"where": where, "id": where, "subtask": "asked", "key": None, "options": options, "video": where}
    return row | {"text_input": text, "text_output": "", "image_output": [], "clip": where, "told": {}}


def bench_row(bench, raw, path, n):
    """A benchmark file's n-th entry -> a row like read_rows', frames aside; key: all right letters."""
    where = f"{path}:{n}"
    check(isinstance(raw, dict), f"{where}: an entry must be an object, not a {type(raw).__name__}.")
    raw = {BENCHES["columns"].get(name, name): value for name, value in raw.items() if value is not None}
    missing = ", ".join(name for name in BENCHES["needs"][bench] if name not in raw)
    check(not missing, f"{where}: there is no {missing}, so it is no row of BENCH={bench}.")
    kind, video = place(bench, raw, path)
    subtask = BENCHES["subtasks"][bench].get(kind)
    check(subtask, f"{where}: '{kind}' is no kind of question of BENCH={bench}.")
    options = parse_options(raw["options"])
    fine = 2 <= len(options) <= 6 and "ABCDEF".startswith("".join(options))
    check(fine, f"{where}: a question has 2 to 6 options, this one has {raw['options']!r}.")
    key = find_keys(raw["answer"], options)
    check(key, f"{where}: the answer {raw['answer']!r} is none of the options {options}.")
    row = ask_row(where, raw["question"], options) | {"subtask": subtask, "key": key, "video": video}
    row["told"] = {"index": n - 1, "video_id": video.removesuffix(".mp4"), "gt": key[0], "subtask_type": kind}
    return row | {"id": str(raw.get("id", where)), "clip": str(raw.get("video", video))}


def join_versions(rows):
    """DSI-Bench: the n-th rows of all versions, which are folders of videos, are one question: `twin` n.

    Of one file with all versions (metadata_4aug.csv) the order is not known, so it is checked.
    """
    turns, asked, files = {}, {}, {row["where"].rpartition(":")[0] for row in rows}
    for row in rows:
        version, same = row["video"].partition("/")[0], (row["clip"], row["subtask"])
        turns[version] = row["told"]["twin"] = turns.get(version, 0) + 1
        fine = len(files) > 1 or asked.setdefault(turns[version], same) == same
        check(fine, f"{row['where']}: its versions stand in different orders; give the four files instead.")


def read_bench(bench, data):
    """The rows of a benchmark's files, or of generate_data.py, in order; data: the folder, or one file."""
    if bench == "toy":
        return read_rows(data if data.endswith(".jsonl") else Path(data) / "test_imagery.jsonl")
    check(bench in BENCHES["files"], f"BENCH={bench} is none of toy, {', '.join(BENCHES['files'])}.")
    names, whole = BENCHES["files"][bench], Path(data)
    paths = [whole] if whole.is_file() else [p for name in names for p in sorted(whole.rglob(name))]
    paths = [path for path in paths if "frame_sampling" not in path.name]  # Dyn-Bench's, no questions
    check(paths, f"DATA={data} holds no {' or '.join(names)}; set it to the benchmark's folder or file.")
    rows = [bench_row(bench, raw, path, n) for path in paths for n, raw in enumerate(read_table(path), 1)]
    if bench == "dsi":
        join_versions(rows)
    return rows


def decode(video, fps, most):
    """Frames of a video at 0, 1 / fps ... seconds, thinned to `most`: [(seconds, PIL image)]."""
    check(find_spec("decord"), "Videos need decord: pip install decord==0.6.0, on ARM eva-decord.")
    reader = import_module("decord").VideoReader(str(video))
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(float)
    wanted = np.arange(times[0], times[-1] + 1e-6, 1 / fps)
    taken = thin(np.unique(np.searchsorted(times, wanted - 1e-6)).tolist(), most)
    return [(times[i], Image.fromarray(frame)) for i, frame in zip(taken, reader.get_batch(taken).asnumpy())]


def sample_frames(video, root, cache, fps, most):
    """A video's frames [(file, seconds)], and why there are none, or "". Decoded once, kept in `cache`.

    A folder counts as a video of its frame_* images, 1 / fps seconds apart (Dyn-Bench, which has no times).
    """
    path = Path(root) / video
    if path.is_dir():
        images = [(str(image), number / fps) for number, image in enumerate(sorted(path.glob("frame_*")))]
        return thin(images, most), "" if images else f"{path} holds no frame_*"
    if not path.is_file():
        return [], f"there is no {path}"
    facts = f"{video} {path.stat().st_size} {path.stat().st_mtime_ns} {fps} {most}"
    folder = Path(cache).absolute() / f"{path.stem}_{zlib.crc32(facts.encode()):08x}"
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if not folder.is_dir():
        try:
            frames = decode(path, fps, most)
        except Exception as error:  # decord raises many kinds; each means that this file cannot be used
            return [], f"{path} cannot be decoded ({type(error).__name__})"
        unfinished.mkdir(parents=True, exist_ok=True)
        for time, frame in frames:
            frame.save(unfinished / f"{time:09.3f}.jpg", quality=95, subsampling=0)
        unfinished.rename(folder)
    return [(str(image), float(image.stem)) for image in sorted(folder.glob("*.jpg"))], ""


def add_frames(rows, rank=0, world=1, **how):
    """Gives rows their image_input and times, or `lost`, why they have none; processes share the decoding."""
    videos = sorted({row["video"] for row in rows})[rank::world]
    found = dict(gather([(video, sample_frames(video, **how)) for video in videos], world))
    for row in rows:
        frames, row["lost"] = found[row["video"]]
        row["video_path"] = str(Path(how["root"]) / row["video"])
        row["image_input"], row["times"] = [path for path, _ in frames], [time for _, time in frames]


def film(rows, videos, rank=0, world=1, fps=1.0, most=50):
    """Gives rows that name only a video (4DRL) its frames, `fps` a second up to `most` -> rows not lost."""
    filmed = [row for row in rows if row.get("video")]
    for row in filmed:
        row["video"] = str(Path(videos) / Path(row["video"]).name) if videos else row["video"]
    add_frames(filmed, rank, world, root="", cache=CACHE, fps=fps, most=most)
    lost = [row for row in filmed if row["lost"]]
    if lost and rank == 0:
        print(f"{len(lost)} of {len(rows)} questions are left out; {lost[0]['where']}: {lost[0]['lost']}.")
    return [row for row in rows if not row.get("lost")]


# ---------------------------------------------------------------- controls


def alike(rows, index):
    """Indices of the questions of a row's subtask on other clips."""
    same = [i for i, row in enumerate(rows) if row["subtask"] == rows[index]["subtask"]]
    return [i for i in same if rows[i]["clip"] != rows[index]["clip"] and not rows[i].get("lost")]


def other_clip(rows, index, seed):
    """One of those, chosen by (seed, index); exits if there is none."""
    others, where = alike(rows, index), rows[index]["where"]
    check(others, f"{where}: this control needs another clip with a question of this subtask; there is none.")
    return random.Random(f"{seed} {index}").choice(others)


def see(rows, index, video, seed, timed=False):
    """The row as VIDEO shows it: without frames, with another clip's, or with its own in another order.

    timed: the question begins with the times of the frames that are shown.
    """
    row, frames = rows[index], list(rows[index]["image_input"])
    if video in ("none", "other"):
        other = rows[other_clip(rows, index, seed)] if video == "other" else {"image_input": [], "times": []}
        row = row | {name: other[name] for name in ("image_input", "times")}
    if video == "shuffled":
        check(len(set(frames)) > 1, f"{row['where']}: VIDEO=shuffled needs two frames or more; drop the row.")
        order = random.Random(f"{seed} {index}")
        while frames == row["image_input"]:
            order.shuffle(frames)
        row = row | {"image_input": frames}
    seconds = ", ".join(f"{time:.1f}" for time in row["times"]) if timed else ""  # "" too without frames
    return row | {"text_input": (seconds and BENCHES["times"].format(seconds)) + row["text_input"]}


def make_feed(kind, names, tables, pad, K, seed):
    """What generate feeds in latent blocks, feed(hidden (B, D), block (B,), k (B,)) -> (B, D); None for "".

    names: of the rows, they seed the noise; pad (D,); tables: per row the latents (n, K, D) to swap in (from
    the first again when there are more blocks) or the true ones (the hidden state stays when there are more).
    Rows outside a block, whose k is K or more, keep their hidden state.
    """

    def one(hidden, row, block, k):
        if kind == "noise":
            number = random.Random(f"{seed} {names[row]} {block} {k}").getrandbits(60)
            noise = torch.randn(len(hidden), generator=torch.Generator().manual_seed(number)).to(hidden)
            return noise * hidden.norm() / noise.norm()
        if kind == "swap" and len(tables[row]):
            return tables[row][block % len(tables[row]), k].to(hidden)
        if kind == "oracle":
            return tables[row][block, k].to(hidden) if block < len(tables[row]) else hidden
        return pad.to(hidden) if kind == "pad" else torch.zeros_like(hidden)  # also: no latents to swap in

    def feed(hidden, block, k):
        places = enumerate(zip(hidden, block.tolist(), k.tolist()))
        return torch.stack([one(h, row, b, j) if j < K else h for row, (h, b, j) in places])

    return feed if kind else None


# ---------------------------------------------------------------- what was imagined


def true_latents(model, rows, indices, images=None):
    """Eq. 5 for all overlays of the rows of the given indices, encoded together -> list of (n, K, D)."""
    images = images or Images(model, cache=True)
    names = [[(path,) for path in rows[i]["image_output"] if model.K] for i in indices]
    distinct = list(dict.fromkeys(name for own in names for name in own))
    images.fill(distinct, rows[indices[0]]["where"], model.banned.device)
    none = torch.zeros(0, model.K, model.net.config.text_config.hidden_size)
    return [torch.cat([none, *(images.kept[name]["latents"][None].float() for name in own)]) for own in names]


def centre(x, gallery):
    """Unit vectors less the gallery's mean one at their latent index: (n, K, D), (G, K, D) -> (n, K, D).

    Pooled features share one direction, so the plain cosine of any two is near 1.
    """
    common = F.normalize(gallery, dim=-1).mean(dim=0)  # (K, D)
    return F.normalize(F.normalize(x, dim=-1) - common, dim=-1)


def retrieval(generated, true):
    """Are latents nearest to their own true ones? (n, K, D), (G, K, D) -> hit (n,), cosine (n, K).

    true[i] is row i's own. A hit: the centred cosine, mean over K, is higher with true[i] than with any other
    of the G, which should be of one kind and each of another clip; a tie is a miss. Chance is 1/G.
    """
    cosine = torch.einsum("nkd,gkd->ngk", centre(generated, true), centre(true, true))
    near = cosine.mean(dim=-1)  # (n, G)
    others = near.clone().fill_diagonal_(-torch.inf)
    return near.diagonal() > others.amax(dim=1), cosine.diagonal().T


def gallery_of(rows, index, block, size=64):
    """The row, and others of its subtask with this block, each of another clip -> up to `size` indices."""
    have = [i for i in alike(rows, index) if len(rows[i]["image_output"]) > block]
    return [index, *{rows[i]["clip"]: i for i in have}.values()][:size]


def compare(rows, index, fed, truth):
    """Imagined blocks (n, K, D) of a row against the true ones of their ordinal in its gallery -> [dict].

    truth(indices) -> list of (n, K, D). Blocks beyond the true ones, and rows without a gallery, are not.
    """
    for block in range(min(len(fed), len(rows[index]["image_output"]))):
        gallery = gallery_of(rows, index, block)
        if len(gallery) > 1:
            true = torch.stack([z[block] for z in truth(gallery)])  # (G, K, D), its own first
            hit, cosine = retrieval(fed[block : block + 1], true)
            yield {"retrieval": hit.item(), "chance": 1 / len(gallery), "cosine": cosine[0].tolist()}


# ---------------------------------------------------------------- answering


def answer(model, rows, batch, how, truth, images=None):
    """Answers the rows of the given indices together -> their results, with `latents`; how: see PLAIN.

    swap: the latents come from a first, plain pass over a question of the same subtask on another clip.
    """
    tables = truth(batch) if how["latents"] == "oracle" else None
    if how["latents"] == "swap":
        donors, plain = [other_clip(rows, i, how["seed"]) for i in batch], how | {"latents": ""}
        tables = [made["latents"] for made in answer(model, rows, donors, plain, truth, images)]
    seen = [see(rows, i, how["video"], how["seed"], how["times_in_prompt"]) for i in batch]
    samples = [encode_row(model, row, answer=False) for row in seen]
    # by seed and question, not by batch-mates
    dice = [torch.Generator().manual_seed(random.Random(f"{how['seed']} {i}").getrandbits(60)) for i in batch]
    pad = model.net.get_input_embeddings().weight[model.ids["latent_pad"]]
    feed = make_feed(how["latents"], batch, tables, pad, model.K, how["seed"])
    with torch.autocast(model.banned.device.type, torch.bfloat16, enabled=model.banned.is_cuda):
        made = generate(model, samples, how["max_new"], images, how["temperature"], how["top_p"], dice, feed)
    return [judge(rows[i], i, given, model.K) for i, given in zip(batch, made)]


def plan(rows, asked, size):
    """The asked indices in batches of similar length, the longest first, always in the same order."""
    order = sorted(asked, key=lambda i: (-len(rows[i]["image_input"]), -len(rows[i]["text_input"]), i))
    return [order[at : at + size] for at in range(0, len(order), size)]


def gather(mine, world):
    """The results of all processes as one list, from each one's own."""
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    return [result for part in parts for result in part]


def read_lines(path):
    """The entries of a jsonl file; none if there is no file. A line that a kill cut short is left out."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def to_lines(results):
    """Results as text, one JSON object a line."""
    return "".join(json.dumps(result) + "\n" for result in results)


def write(path, text):
    """Writes a file, in a new folder where there is none, under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def settings_of(model, rows, how):
    """What the answers in one folder share: weights (a sum over some of each, as bf16), questions, how.

    FSDP on a GPU hands out bf16 copies of the weights, whose sum must be that of the checkpoint.
    """
    weights = sum(x.flatten()[:1000].bfloat16().double().sum().item() for x in model.net.parameters())
    questions = zlib.crc32("".join(row["text_input"] for row in rows).encode())
    same = how | {name: getattr(model.net.config, name) for name in ("prompt_suffix", "seconds_per_pair")}
    return {"weights": weights, "questions": questions} | {x: same[x] for x in same if x != "batch"}


def open_folder(out, settings, resume, rank):
    """The results that `out` holds -> {index: result}; refuses other settings, drops a line cut short."""
    file = out / "settings.json"
    old = PLAIN | json.loads(file.read_text()) if resume and file.is_file() else {}
    for name in settings if old else ():
        told = f"{file}: the answers there are of {name}={old.get(name)!r}, this run has {settings[name]!r}"
        check(old.get(name) == settings[name], f"{told}; set another OUT, or delete {out} to answer again.")
    done = {result["row"]: result for result in read_lines(out / "results.jsonl")} if old else {}
    if rank == 0:
        write(out / "results.jsonl", to_lines(done.values()))
        write(file, json.dumps(settings))
        print(f"{out}: {len(done)} answers are there already")
    return done


def evaluate(model, rows, out=None, how=None, limit=0, resume=True, rank=0, world=1, images=None):
    """Answers the first `limit` rows (0: all), by `how` where it differs from PLAIN, and counts -> summary.

    Without `out` nothing is written. Batches are dealt out to the processes, which all hold the whole model.
    A batch that a kill cut short is answered whole, so that each row keeps its batch-mates.
    """
    how, out = PLAIN | (how or {}), Path(out) if out else None
    first = rows[: limit or None]
    bad = [row["where"] for row in first if not row["key"] or set(row["key"]) - set(row["options"])]
    check(not bad, f"{''.join(bad[:1])}: no options with a key to score by; drop it.")
    lost = [f"{row['where']}: {row['lost']}" for row in first if row.get("lost")]
    asked = [i for i, row in enumerate(first) if not row.get("lost")]
    check(asked, f"No question of {len(first)} has a video; {lost[:1]}; set VIDEOS.")
    settings, was_training = settings_of(model, rows, how), model.training
    done = open_folder(out, settings, resume, rank) if out else {}
    todo = [batch for batch in plan(rows, asked, how["batch"]) if not done.keys() >= set(batch)]
    kept = images if images and images.cache else Images(model, cache=True)  # overlays, encoded once
    truth = functools.partial(true_latents, model, rows, images=kept)
    model.eval()
    for at in range(0, len(todo), world):
        mine = answer(model, rows, todo[at + rank], how, truth, images) if at + rank < len(todo) else []
        for result in mine:
            result["imagery"] = list(compare(rows, result["row"], result.pop("latents"), truth))
        new = {result["row"]: result for result in gather(mine, world) if result["row"] not in done}
        done |= new
        if out and rank == 0:
            with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(to_lines(new.values()))
            right = mean(result["correct"] for result in done.values())
            print(f"evaluate {len(done):5d}/{len(asked)} | {right:6.1%} right", flush=True)
    model.train(was_training)
    results = [done[i] for i in asked]
    summary = summarise(results) | {"settings": settings, "left_out": lost}
    summary["scores"]["micro"]["note"] = f"{len(lost)} left out: no video" if lost else ""
    if out and rank == 0:
        write(out / "results.jsonl", to_lines(done[i] for i in sorted(done)))
        write(out / "summary.json", json.dumps(summary, indent=1))
        if first[0]["subtask"] in BENCHES["subtasks"]["dsr"].values():
            write(out / "results_summary.json", json.dumps(release_summary(results, summary), indent=1))
    return summary


def in_percent(score):
    """A score with its shares as text, in percent."""
    return score | {x: f"{100 * score[x]:.1f}" for x in ("accuracy", "low", "high", "release", "chance")}


def print_table(summary):
    """Prints the scores, a line each, and the rest."""
    print(f"{'':20}     n  right       %   95 % interval  release  chance  retrieval")
    line = "{:20}{n:6d}{correct:7.5g}{accuracy:>8}{low:>8} - {high:>5}{release:>9}{chance:>8}{}  {note}"
    for name, score in summary["scores"].items():
        found = "" if score["retrieval"] is None else f"{score['retrieval']:11.3f}"
        print(line.format(name, found, **in_percent(score)).rstrip())
    print("\n".join(describe(summary)))


# ---------------------------------------------------------------- the picture


def thin(items, most):
    """At most `most` items, evenly spaced, the first and the last among them."""
    last, count = len(items) - 1, min(most, len(items))
    return [items[round(i * last / max(count - 1, 1))] for i in range(count)]


def heat_maps(blocks, tokens, common):
    """Where and when a video looks like latent blocks: (m, K, D), (t, h, w, D), (K, D) -> (m, t, h, w).

    Unit vectors less what the clip has in common (`common` per latent index, the mean over time per place):
    their inner product, the largest over K. So what stays the same is dark; each of the m maps spans 0 to 1.
    """
    blocks, tokens = F.normalize(blocks, dim=-1) - common, F.normalize(tokens, dim=-1)
    maps = torch.einsum("mkd,thwd->mthwk", blocks, tokens - tokens.mean(dim=0)).amax(dim=-1)
    maps = maps - maps.amin(dim=(1, 2, 3), keepdim=True)
    return maps / maps.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


def tile(path, width, label, heat=None):
    """An image scaled to a width, with a label; in grey under its heat map (h, w) in 0..1 if there is one."""
    with Image.open(path) as image:
        image = ImageOps.scale(image.convert("RGB"), width / image.width, Image.Resampling.LANCZOS)
    if heat is not None:
        heat = Image.fromarray((255 * heat).astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
        image = Image.blend(image.convert("L").convert("RGB"), ImageOps.colorize(heat, **COLOURS), 0.6)
    ImageDraw.Draw(image).text((5, 2), label, "white", font_size=24, stroke_width=2, stroke_fill="black")
    return image


def stack(images, down=True, gap=4):
    """Images under one another, or side by side, on white."""
    width, height = zip(*(image.size for image in images))
    room = gap * (len(images) - 1)
    size = (max(width), sum(height) + room) if down else (sum(width) + room, max(height))
    sheet, at = Image.new("RGB", size, "white"), 0
    for image in images:
        sheet.paste(image, (0, at) if down else (at, 0))
        at += gap + (image.height if down else image.width)
    return sheet


def video_tokens(model, row, images):
    """Visual tokens of a row's video (t, h, w, D), and the mean of its frame pairs as latents (K, D)."""
    key, (t, h, w) = tuple(row["image_input"]), video_grid(row, model.net.config)
    images.fill([key], row["where"], model.banned.device)
    pairs = images.kept[key]["features"].float().chunk(t)  # (h·w, D) each
    pooled = torch.stack([model.pool(pair, (1, h, w)) for pair in pairs])  # (t, K, D)
    merge = model.net.config.vision_config.spatial_merge_size
    return torch.stack(pairs).unflatten(1, (h // merge, -1)), F.normalize(pooled, dim=-1).mean(dim=0)


def draw_block(row, maps, overlays):
    """The true overlay, if any, and the heat maps (1 or 2, t, h, w) of the made and the true latents."""
    pair, lines = math.ceil(len(row["image_input"]) / maps.shape[1]), []
    for name, line in zip(("made", "true"), maps.numpy()):
        shown = thin(list(zip(row["image_input"][::pair], row["times"][::pair], line)), PAIRS)
        lines.append(stack([tile(x, HEAT, f"{name} {at:g} s", heat) for x, at, heat in shown], down=False))
    return [*(tile(path, 2 * HEAT + 4, "true overlay") for path in overlays), stack(lines)]


def depict(model, rows, index, how):
    """Answers a row and draws that: {"row", "result", "film": [image], "blocks": [[image]]}."""
    images, blocks = Images(model, cache=True), []
    truth = functools.partial(true_latents, model, rows, images=images)
    result = answer(model, rows, [index], how, truth, images)[0]
    row, true = see(rows, index, how["video"], how["seed"], how["times_in_prompt"]), truth([index])[0]
    if row["image_input"] and len(result["latents"]):
        tokens, common = video_tokens(model, row, images)
        for number, made in enumerate(result["latents"]):
            own = slice(number, number + 1)  # nothing, where more blocks are imagined than are true
            maps = heat_maps(torch.cat([made[None], true[own]]), tokens, common)
            blocks.append(draw_block(row, maps, row["image_output"][own]))
    shown = thin(list(zip(row["image_input"], row["times"])), FRAMES)
    film = [tile(path, FILM, f"{time:g} s") for path, time in shown]
    return {"row": row, "result": result, "film": film, "blocks": blocks}


def verdict(row, result):
    """The key and the answer as one line."""
    named = {None: "nothing"} | {letter: f"{letter}. {text}" for letter, text in row["options"].items()}
    keys = " or ".join(named[letter] for letter in result["key"] or "")
    return (f"Key: {keys} | " if keys else "") + f"answered: {named[result['answer']]}"


# ---------------------------------------------------------------- the report


def fill(part, raw=(), /, **fields):
    """A part of the template with its $fields: those of `raw` are HTML already, the others get escaped."""
    safe = {name: html.escape(str(value)) for name, value in fields.items()}
    return string.Template(PARTS[part]).substitute(safe, **dict(raw))


def show(name, image):
    """An image inside the page itself."""
    image.save(file := io.BytesIO(), "JPEG", quality=88)
    return fill("image", name=name, bytes=base64.b64encode(file.getvalue()).decode())


def curve(name, entries):
    """One logged field as a line of SVG; nothing where it has fewer than two finite values."""
    points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
    points = thin([(step, value) for step, value in points if math.isfinite(value)], 400)
    if len(points) < 2:
        return ""
    steps, values = zip(*points)  # SVG's y points down
    box = f"{steps[0]} {-max(values):.6g} {steps[-1] - steps[0]} {max(np.ptp(values), 1e-9):.6g}"
    line = " ".join(f"{step},{-value:.6g}" for step, value in points)
    return fill("curve", name=name, box=box, points=line, steps=steps[-1], last=f"{values[-1]:.3g}")


def sample_card(sample):
    """One question, its film strip, and the answer's text with heat maps where the latent blocks are."""
    row, result = sample["row"], sample["result"]
    block = r"\s*&lt;\|latent_start\|&gt;(&lt;\|latent_pad\|&gt;)*(&lt;\|latent_end\|&gt;)?\s*"
    drawn = ["".join(show("imagery", image) for image in images) for images in sample["blocks"]]
    imagery = iter([fill("imagery", {"images": images}) for images in drawn])
    said = html.escape(result["text"].removesuffix("<|im_end|>").strip())
    raw = {"spoken": re.sub(block, lambda _: next(imagery, " [imagery] "), said)}
    raw["film"] = "".join(show("frame", image) for image in sample["film"])
    mark = ("right" if result["correct"] else "wrong") if result["key"] else "asked"
    fields = {"mark": mark, "question": row["text_input"], "verdict": verdict(row, result)}
    return fill("sample", raw, **result | fields)


def report(summary, samples, entries):
    """The whole page, self-contained: images and curves inside, no script, nothing fetched."""
    scores, results = summary.get("scores", {}), [sample["result"] for sample in samples]
    pieces = {"facts": [fill("fact", text=line) for line in describe(summary)] if scores else []}
    pieces["bars"] = [fill("bar", name=name, **in_percent(score)) for name, score in scores.items()]
    pieces["filters"] = [fill("filter", name=name) for name in in_order(results)]
    pieces["curves"] = [curve(name, entries) for name in CURVES]
    pieces["samples"] = [sample_card(sample) for sample in samples]
    pieces = {name: "".join(piece) for name, piece in pieces.items()}
    return fill("page", pieces, settings=json.dumps(summary["settings"]))


def draw(model, rows, out, log="", samples=8):
    """Answers some rows of `out` again, right and wrong ones, and draws out/picture.png and out/report.html.

    log: the training run's log.jsonl, for the curves. The report also shows the scores of the controls that
    stand beside `out`, such as eval_video-none.
    """
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    how, chosen = PLAIN | summary["settings"], []
    results = read_lines((out / f"seed_{how['seed']}" if "seeds" in summary else out) / "results.jsonl")
    for correct in (True, False):
        chosen += thin([r["row"] for r in results if r["correct"] == correct], max(1, samples // 2))
    drawn = [depict(model, rows, index, how) for index in chosen]
    if how["video"] != "none":
        parts = [(one["film"][:4], one["film"][4:], *one["blocks"]) for one in (drawn[0], drawn[-1])]
        columns = [stack([stack(x, down=False) for x in part if x], gap=12) for part in parts]
        stack(columns, down=False, gap=40).save(out / "picture.png")
    for file in sorted(out.parent.glob(f"{out.name}_*/summary.json")):
        other = json.loads(file.read_text(encoding="utf-8"))
        if other["settings"]["weights"] == summary["settings"]["weights"]:  # not of weights of another run
            summary["scores"][file.parent.name] = other["scores"]["micro"]
    write(out / "report.html", report(summary, drawn, read_lines(log) if log else []))


if __name__ == "__main__":
    constants = set_constants(globals())
    for name, known in CONTROLS.items():
        check(constants[name] in ("", *known), f"{name}={constants[name]} is none of {', '.join(known)}.")
    varied = SEEDS == 1 or (SEEDS > 1 and (TEMPERATURE > 0 or VIDEO or LATENTS))
    check(varied, f"SEEDS={SEEDS}: take 1, or more with a TEMPERATURE above 0, as greedy answers are alike.")
    rank, world, device = init_distributed()
    kind = "ask" if ASK else BENCH if BENCH != "toy" else "eval"
    check(kind == "eval" or LATENTS != "oracle", "LATENTS=oracle needs true overlays; there are none here.")
    options = dict(zip("ABCDEF", OPTIONS.split("|"))) if OPTIONS else {}
    check(not OPTIONS or 2 <= len(OPTIONS.split("|")) <= 6, f"OPTIONS={OPTIONS}: give 2 to 6, as left|right.")
    rows = [ask_row(VIDEO_FILE, ASK, options)] if ASK else read_bench(BENCH, DATA)
    if kind != "eval":
        some = rows if VIDEO == "other" or LATENTS == "swap" else rows[: LIMIT or None]
        add_frames(some, rank, world, root="" if ASK else VIDEOS, cache=CACHE, fps=FPS, most=MAX_FRAMES)
    else:
        rows = film(rows, VIDEOS, rank, world, FPS, MAX_FRAMES)
    model = load_model(MODEL, device, suffix=SUFFIX, seconds_per_pair=SECONDS_PER_PAIR)
    suffix = "".join(f"_{name.lower()}-{constants[name]}" for name in CONTROLS if constants[name])
    out = Path(OUT or Path(MODEL) / f"{kind}{suffix}")
    how = {name: constants[name.upper()] for name in PLAIN}
    if ASK:
        check(not rows[0]["lost"], f"VIDEO_FILE: {rows[0]['lost']}.")
        drawn = depict(model, rows, 0, how)
        print(drawn["result"]["text"], verdict(rows[0], drawn["result"]), out / "report.html", sep="\n")
        write(out / "report.html", report({"settings": settings_of(model, rows, how)}, [drawn], []))
    else:
        runs = {SEED + n: out / f"seed_{SEED + n}" if SEEDS > 1 else out for n in range(SEEDS)}
        found = [evaluate(model, rows, runs[n], how | {"seed": n}, LIMIT, RESUME, rank, world) for n in runs]
        if rank == 0:
            summary = over_seeds(found) if SEEDS > 1 else found[0]
            write(out / "summary.json", json.dumps(summary, indent=1))
            print_table(summary)
            draw(model, rows, out, newest_checkpoint(MODEL).parent / "log.jsonl", SAMPLES)
            print(f"{out}/summary.json,", f"{out}/picture.png," * (VIDEO != "none"), f"{out}/report.html")
    if world > 1:
        dist.destroy_process_group()
