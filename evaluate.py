"""Scoring (paper Sec. 4): answers held-out questions greedily, counts, and draws what the model imagined.

In:  a checkpoint of dift.py or grpo4d.py (MODEL), and rows of generate_data.py (DATA).
Out: OUT/results.jsonl (a line per question, written as they finish; a rerun goes on where it stopped),
     OUT/settings.json, OUT/summary.json, OUT/picture.png, OUT/report.html

    python evaluate.py MODEL=out/dift                                      # laptop
    python evaluate.py MODEL=out/dift BATCH=256                            # one GPU
    torchrun --nproc_per_node=2 evaluate.py MODEL=out/dift LATENTS=zero    # two processes, and a control

Differs from the paper:
- greedy, in a fixed order: a second run gives the same digits (release: temperature 0.7, top-p 0.9)
- the parser is strict: one <answer> with a letter, or no answer (release: the first capital A-F anywhere)
- controls: no, another or a shuffled video; latents zeroed, noised, padded, swapped or true (ours)
- retrieval@1 and the centred cosine say whether the imagined latents are the right ones (ours)
"""

import base64
import functools
import html
import io
import itertools
import json
import math
import random
import re
import string
import textwrap
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from model import (
    Images,
    check,
    encode_row,
    generate,
    init_distributed,
    load_model,
    newest_checkpoint,
    read_rows,
    set_constants,
    video_grid,
)

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint
DATA = "out/toy"  # folder with test_imagery.jsonl, or one jsonl file
OUT = ""  # "": MODEL's folder + /eval, and a suffix for each control, such as eval_video-none
# --- data
LIMIT = 0  # questions, the first so many of the file; 0: all
VIDEO = ""  # "" | none | other (another clip's frames) | shuffled (frames in another order) (ours)
# --- model
LATENTS = ""  # "" | zero | noise | pad | swap (another question's) | oracle (true): what is fed (ours)
MAX_NEW = 512  # new positions of an answer at most, latents included
# --- logging
SAMPLES = 8  # answers drawn in the report
# --- system
BATCH = 64  # questions answered at once
RESUME = True  # False: answer all again
SEED = 0  # of VIDEO=other and shuffled, LATENTS=noise and swap

CONTROLS = {"VIDEO": "none other shuffled".split(), "LATENTS": "zero noise pad swap oracle".split()}
PLAIN = {"video": "", "latents": "", "max_new": 512, "batch": 64, "seed": 0}  # how evaluate asks unless told
GROUPS = {"camera (both)": ("camera_single", "camera_pair")}  # subtasks that are also counted together
CURVES = "loss ce sim cosine retrieval gnorm lr".split()  # fields of log.jsonl that the report draws
CURVES += "reward acc fmt holdout length kl entropy".split()  # and of 4DRL
TEMPLATE = Path(__file__).parent / "assets" / "report.html"
FILM, HEAT = 194, 128  # pixels: width of a film frame and of a heat map
FRAMES, PAIRS = 8, 4  # film frames and heat maps drawn at most, evenly spaced
COLOURS = [(38, 12, 81), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)]  # heat, low to high


# ---------------------------------------------------------------- answers and counts


def parse_answer(text, letters="ABCDEF"):
    """The letter of the one <answer>...</answer>: "B", "(B)", "B. Left" give B; "b", "Back" give None."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    letter = r"\s*(?:\(([A-F])\)|([A-F]))(?=[.:)\s]|</answer>)"
    found = re.search(f"<answer>{letter}.*</answer>", text, flags=re.S)
    letter = (found[1] or found[2]) if found else None
    return letter if letter and letter in letters else None


def judge(row, index, answer, K):
    """What generate gave for a row -> its line of results.jsonl, and `latents` (n, K, D) of whole blocks."""
    letter = parse_answer(answer["text"], "".join(row["options"]))
    fed = answer["latents"].float().cpu()
    blocks = len(fed) // K if K else 0
    result = {"row": index, "where": Path(row["where"]).name, "id": row["id"], "subtask": row["subtask"]}
    result |= {"options": len(row["options"]), "key": row["key"], "answer": letter}
    result |= {"correct": letter == row["key"], "cut": bool(answer["cut"]), "blocks": blocks}
    result |= {"tokens": len(answer["ids"]), "text": answer["text"]}
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
    values = list(values)
    return sum(values) / len(values) if values else None


def count(results):
    """n, correct, accuracy, its interval, chance (mean of 1 / options) and retrieval@1 of some results."""
    n, correct = len(results), sum(result["correct"] for result in results)
    low, high = wilson(correct, n)
    score = {"n": n, "correct": correct, "accuracy": correct / max(n, 1), "low": low, "high": high}
    score["chance"] = mean(1 / result["options"] for result in results)
    score["retrieval"] = mean(block["retrieval"] for result in results for block in result["imagery"])
    return score


def summarise(results, groups=GROUPS):
    """Results -> scores by subtask, group and "micro"; macro (mean over subtasks); counts over answers."""
    subtasks = sorted({result["subtask"] for result in results})
    parts = {name: (name,) for name in subtasks} | groups | {"micro": subtasks}
    scores = {name: count([r for r in results if r["subtask"] in part]) for name, part in parts.items()}
    summary = {"scores": {name: score for name, score in scores.items() if score["n"]}}
    summary["macro"] = mean(scores[name]["accuracy"] for name in subtasks)
    summary |= {"no_answer": sum(r["answer"] is None for r in results), "cut": sum(r["cut"] for r in results)}
    summary |= {name: mean(result[name] for result in results) for name in ("blocks", "tokens")}
    blocks = [block for result in results for block in result["imagery"]]
    names = ("retrieval", "chance", "norm_fed", "norm_true")
    imagery = {"compared": len(blocks)} | {name: mean(block[name] for block in blocks) for name in names}
    imagery["cosine"] = [mean(column) for column in zip(*(block["cosine"] for block in blocks))]
    return summary | {"imagery": imagery}


def describe(summary):
    """The part of a summary that is no table, as lines of text with the names of summary.json."""
    names, imagery = ("macro", "no_answer", "cut", "blocks", "tokens"), dict(summary["imagery"])
    lines = [", ".join(f"{name} {summary[name]:.4g}" for name in names)]
    cosine = " ".join(f"{value:.3f}" for value in imagery.pop("cosine"))
    lines.append(", ".join(f"{name} {value:.4g}" for name, value in imagery.items() if value is not None))
    return [*lines, f"centred cosine per latent {cosine}"] if imagery["compared"] else lines[:1]


# ---------------------------------------------------------------- controls


def alike(rows, index):
    """Indices of the questions of a row's subtask on other clips."""
    clip, subtask = rows[index]["clip"], rows[index]["subtask"]
    return [i for i, row in enumerate(rows) if row["subtask"] == subtask and row["clip"] != clip]


def other_clip(rows, index, seed):
    """One of those, chosen by (seed, index); exits if there is none."""
    others, where = alike(rows, index), rows[index]["where"]
    check(others, f"{where}: this control needs another clip with a question of this subtask; there is none.")
    return random.Random(f"{seed} {index}").choice(others)


def see(rows, index, video, seed):
    """The row as VIDEO shows it: without frames, with another clip's, or with its own in another order."""
    row, frames = rows[index], list(rows[index]["image_input"])
    if video == "none":
        return row | {"image_input": [], "times": []}
    if video == "other":
        other = rows[other_clip(rows, index, seed)]
        return row | {"image_input": other["image_input"], "times": other["times"]}
    if video == "shuffled":
        check(len(set(frames)) > 1, f"{row['where']}: VIDEO=shuffled needs two frames or more; drop the row.")
        order = random.Random(f"{seed} {index}")
        while frames == row["image_input"]:
            order.shuffle(frames)
    return row | {"image_input": frames}


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
        if kind == "pad":
            return pad.to(hidden)
        if kind == "swap" and len(tables[row]):
            return tables[row][block % len(tables[row]), k].to(hidden)
        if kind == "oracle":
            return tables[row][block, k].to(hidden) if block < len(tables[row]) else hidden
        return torch.zeros_like(hidden)  # zero, and swap from an answer without imagery

    def feed(hidden, block, k):
        places = enumerate(zip(hidden, block.tolist(), k.tolist()))
        return torch.stack([one(h, row, b, j) if j < K else h for row, (h, b, j) in places])

    return feed if kind else None


# ---------------------------------------------------------------- what was imagined


def true_latents(model, row, images=None):
    """Eq. 5 for all overlays of a row -> (n, K, D)."""
    if not row["image_output"] or not model.K:
        return torch.zeros(0, model.K, model.net.config.text_config.hidden_size)
    images = images if images and images.cache else Images(model, cache=True)
    images.fill([(path,) for path in dict.fromkeys(row["image_output"])], row["where"], model.banned.device)
    return torch.stack([images.kept[(path,)][1].float() for path in row["image_output"]])


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

    truth(index) -> (n, K, D). Blocks beyond the true ones, and rows without a gallery, are not compared.
    """
    blocks = []
    for block in range(min(len(fed), len(rows[index]["image_output"]))):
        gallery = gallery_of(rows, index, block)
        if len(gallery) > 1:
            true = torch.stack([truth(i)[block] for i in gallery])  # (G, K, D), its own first
            hit, cosine = retrieval(fed[block : block + 1], true)
            norms = [x.norm(dim=-1).mean().item() for x in (fed[block], true[0])]
            one = {"retrieval": hit.item(), "chance": 1 / len(gallery), "cosine": cosine[0].tolist()}
            blocks.append(one | {"norm_fed": norms[0], "norm_true": norms[1]})
    return blocks


# ---------------------------------------------------------------- answering


def answer(model, rows, batch, how, truth, images=None):
    """Answers the rows of the given indices together -> their results, with `latents`; how: see PLAIN.

    swap: the latents come from a first, plain pass over a question of the same subtask on another clip.
    """
    tables = [truth(i) for i in batch] if how["latents"] == "oracle" else None
    if how["latents"] == "swap":
        donors = [other_clip(rows, i, how["seed"]) for i in batch]
        plain = answer(model, rows, donors, how | {"latents": ""}, truth, images)
        tables = [result["latents"] for result in plain]
    samples = [encode_row(model, see(rows, i, how["video"], how["seed"]), answer=False) for i in batch]
    pad = model.net.get_input_embeddings().weight[model.ids["latent_pad"]]
    feed = make_feed(how["latents"], batch, tables, pad, model.K, how["seed"])
    device = model.banned.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        answers = generate(model, samples, how["max_new"], images=images, feed=feed)
    return [judge(rows[i], i, given, model.K) for i, given in zip(batch, answers)]


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
    entries = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def to_lines(results):
    """Results as text, one JSON object a line."""
    return "".join(json.dumps(result) + "\n" for result in results)


def write(path, text):
    """Writes a file under a temporary name, then renames it."""
    path.with_suffix(".tmp").write_text(text, encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def settings_of(model, rows, how):
    """What the answers in one folder share: weights (a sum over the first of each), questions, how."""
    weights = sum(weight.flatten()[0].item() for weight in model.net.state_dict().values())
    questions = zlib.crc32("".join(row["text_input"] for row in rows).encode())
    same = {name: how[name] for name in ("video", "latents", "max_new", "seed")}
    return {"weights": weights, "questions": questions, **same}


def open_folder(out, settings, resume, rank):
    """The results that `out` holds -> {index: result}; refuses other settings, drops a line cut short."""
    file = out / "settings.json"
    old = json.loads(file.read_text()) if resume and file.is_file() else {}
    for name in old:
        was, now = old[name], settings.get(name)
        told = f"{file}: the answers there are of {name}={was!r}, this run has {now!r}"
        check(was == now, f"{told}; set another OUT, or RESUME=False to answer all again.")
    done = {result["row"]: result for result in read_lines(out / "results.jsonl")} if old else {}
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        write(out / "results.jsonl", to_lines(done.values()))
        write(file, json.dumps(settings))
    return done


def evaluate(model, rows, out=None, how=None, limit=0, resume=True, rank=0, world=1, images=None):
    """Answers the first `limit` rows (0: all), by `how` where it differs from PLAIN, and counts -> summary.

    Without `out` nothing is written. Batches are dealt out to the processes, which all hold the whole model.
    A batch that a kill cut short is answered whole, so that each row keeps its batch-mates.
    """
    how, out = PLAIN | (how or {}), Path(out) if out else None
    asked = range(min(limit or len(rows), len(rows)))
    for row in rows[: len(asked)]:
        check(row["key"] in row["options"], f"{row['where']}: no options with a key to score by; drop it.")
    settings, was_training = settings_of(model, rows, how), model.training
    done = open_folder(out, settings, resume, rank) if out else {}
    todo = [batch for batch in plan(rows, asked, how["batch"]) if not done.keys() >= set(batch)]
    say = print if out and rank == 0 else lambda *words, **how: None
    say(f"{out}: {len(done)} answers are there already, {len(todo)} batches to go")
    truth = functools.cache(lambda i: true_latents(model, rows[i], images))
    model.eval()
    for at in range(0, len(todo), world):
        mine = answer(model, rows, todo[at + rank], how, truth, images) if at + rank < len(todo) else []
        for result in mine:
            result["imagery"] = compare(rows, result["row"], result.pop("latents"), truth)
        new = {result["row"]: result for result in gather(mine, world) if result["row"] not in done}
        done |= new
        if out and rank == 0:
            with open(out / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(to_lines(new.values()))
        say(f"evaluate {len(done):5d} | {100 * count(done.values())['accuracy']:5.1f} % right", flush=True)
    model.train(was_training)
    summary = summarise([done[i] for i in asked]) | {"settings": settings}
    if out and rank == 0:
        write(out / "results.jsonl", to_lines(done[i] for i in sorted(done)))
        write(out / "summary.json", json.dumps(summary, indent=1))
    return summary


def print_table(summary):
    """Prints the scores, a line each, and the rest."""
    print(f"{'':20}{'n':>6}{'right':>7}{'%':>8}{'95 % interval':>16}{'chance':>8}{'retrieval':>11}")
    for name, s in summary["scores"].items():
        percent = {key: 100 * s[key] for key in ("accuracy", "low", "high", "chance")}
        share = "{accuracy:8.1f}{low:8.1f} - {high:5.1f}{chance:8.1f}".format(**percent)
        found = "" if s["retrieval"] is None else f"{s['retrieval']:11.3f}"
        print(f"{name:20}{s['n']:6d}{s['correct']:7d}{share}{found}")
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
        size = (width, round(width * image.height / image.width))
        image = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    if heat is not None:
        steps = np.linspace(0, 1, len(COLOURS))
        heat = np.stack([np.interp(heat, steps, channel) for channel in zip(*COLOURS)], axis=-1)  # (h, w, 3)
        heat = Image.fromarray(heat.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        image = Image.blend(image.convert("L").convert("RGB"), heat, 0.6)
    font = ImageFont.load_default(24)
    ImageDraw.Draw(image).text((5, 2), label, "white", font, stroke_width=2, stroke_fill="black")
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


def words(text, colour, width=780):
    """Text as an image of a width."""
    text = "\n".join(textwrap.fill(line, width // 10) for line in text.split("\n"))
    image = Image.new("RGB", (width, 29 * text.count("\n") + 32), "white")
    ImageDraw.Draw(image).multiline_text((0, 0), text, colour, ImageFont.load_default(20), spacing=8)
    return image


def video_tokens(model, row, images):
    """Visual tokens of a row's video (t, h, w, D), and the mean of its frame pairs as latents (K, D)."""
    key, (t, h, w) = tuple(row["image_input"]), video_grid(row, model.net.config)
    images.fill([key], row["where"], model.banned.device)
    pairs = images.kept[key][0].float().chunk(t)  # (h·w, D) each
    pooled = torch.stack([model.pool(pair, (1, h, w)) for pair in pairs])  # (t, K, D)
    merge = model.net.config.vision_config.spatial_merge_size
    return torch.stack(pairs).unflatten(1, (h // merge, -1)), F.normalize(pooled, dim=-1).mean(dim=0)


def draw_film(row):
    """The frames with their times, four in a line."""
    frames = thin(list(zip(row["image_input"], row["times"])), FRAMES)
    tiles = [tile(path, FILM, f"{time:g} s") for path, time in frames]
    return stack([stack(tiles[at : at + 4], down=False) for at in range(0, len(tiles), 4)])


def draw_block(row, maps, overlay):
    """The true overlay, beside it the heat maps (1 or 2, t, h, w) of the made and the true latents."""
    pair = math.ceil(len(row["image_input"]) / maps.shape[1])
    frames = list(zip(row["image_input"][::pair], row["times"][::pair]))
    lines = []
    for name, line in zip(("made", "true"), maps.numpy()):
        shown = thin(list(zip(frames, line)), PAIRS)
        tiles = [tile(path, HEAT, f"{name} {time:g} s", heat) for (path, time), heat in shown]
        lines.append(stack(tiles, down=False))
    beside = [tile(overlay, 2 * HEAT + 4, "true overlay")] if overlay else []
    return stack([*beside, stack(lines)], down=False)


def depict(model, rows, result, how, truth, images):
    """What is drawn of an answer: {"row", "result", "film": [image], "blocks": [image]}."""
    index, blocks = result["row"], []
    row, true = see(rows, index, how["video"], how["seed"]), truth(index)
    if row["image_input"] and len(result["latents"]):
        tokens, common = video_tokens(model, row, images)
        for number, made in enumerate(result["latents"]):
            known = number < len(true)  # the model may imagine more blocks than there are true ones
            maps = heat_maps(torch.stack([made, true[number]] if known else [made]), tokens, common)
            blocks.append(draw_block(row, maps, row["image_output"][number] if known else None))
    film = [draw_film(row)] if row["image_input"] else []
    return {"row": row, "result": result, "film": film, "blocks": blocks}


def verdict(row, result):
    """The key and the answer as one line."""
    given = f"{result['answer']}. {row['options'][result['answer']]}" if result["answer"] else "nothing"
    return f"Key: {result['key']}. {row['options'][result['key']]} | answered: {given}"


def picture(samples):
    """Some answers side by side: verdict, question, film strip, and the heat maps of each imagined block."""
    columns = []
    for sample in samples:
        row, result = sample["row"], sample["result"]
        line = words(verdict(row, result), "darkgreen" if result["correct"] else "firebrick")
        question = words(row["text_input"], "black")
        columns.append(stack([line, question, *sample["film"], *sample["blocks"]], gap=12))
    return stack(columns, down=False, gap=40)


# ---------------------------------------------------------------- the report


class Html(str):
    """Text that is HTML already; what is not gets escaped when a part of the template is filled in."""


def fill(part, **fields):
    """A part of the template with its $fields -> Html."""
    safe = {name: x if isinstance(x, Html) else html.escape(str(x)) for name, x in fields.items()}
    return Html(part.substitute(safe))


def show(part, name, image):
    """An image inside the page itself."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return fill(part, name=name, bytes=base64.b64encode(file.getvalue()).decode())


def curve(part, name, entries):
    """One logged field as a line of SVG; nothing where it has fewer than two finite values."""
    points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
    points = thin([(step, value) for step, value in points if math.isfinite(value)], 400)
    if len(points) < 2:
        return Html()
    steps, values = zip(*points)
    low, high = min(values), max(values)
    box = f"{steps[0]} {-high:.6g} {steps[-1] - steps[0]} {max(high - low, 1e-9):.6g}"  # SVG's y points down
    line = " ".join(f"{step},{-value:.6g}" for step, value in points)
    numbers = {"low": f"{low:.3g}", "high": f"{high:.3g}", "last": f"{values[-1]:.3g}"}
    return fill(part, name=name, box=box, points=line, steps=steps[-1], **numbers)


def sample_card(parts, sample):
    """One question, its film strip, and the answer's text with heat maps where the latent blocks are."""
    row, result = sample["row"], sample["result"]
    block = r"<\|latent_start\|>(?:<\|latent_pad\|>)*(?:<\|latent_end\|>)?"
    first, *texts = re.split(block, result["text"].removesuffix("<|im_end|>").strip())
    images = [show(parts["image"], "imagery", image) for image in sample["blocks"]]
    pieces = [fill(parts["text"], text=first)]
    for text, image in itertools.zip_longest(texts, images[: len(texts)], fillvalue="[imagery]"):
        pieces += [image, fill(parts["text"], text=text)]
    fields = {"subtask": result["subtask"], "where": result["where"], "question": row["text_input"]}
    fields |= {"mark": "right" if result["correct"] else "wrong", "verdict": verdict(row, result)}
    fields["film"] = Html("".join(show(parts["image"], "film strip", image) for image in sample["film"]))
    return fill(parts["sample"], spoken=Html("".join(pieces)), **fields)


def report(summary, samples, entries):
    """The whole page, self-contained: images and curves inside, no script, nothing fetched."""
    found = re.findall(r"<!-- part (\w+) -->\n(.*?)<!-- end -->", TEMPLATE.read_text("utf-8"), flags=re.S)
    parts = {name: string.Template(text) for name, text in found}
    pieces = {"facts": [fill(parts["fact"], text=line) for line in describe(summary)], "bars": []}
    for name, score in summary["scores"].items():
        percent = {key: f"{100 * score[key]:.1f}" for key in ("accuracy", "low", "high", "chance")}
        width = f"{100 * (score['high'] - score['low']):.1f}"
        pieces["bars"].append(fill(parts["bar"], name=name, n=score["n"], width=width, **percent))
    pieces["curves"] = [curve(parts["curve"], name, entries) for name in CURVES]
    pieces["samples"] = [sample_card(parts, sample) for sample in samples]
    pieces = {name: Html("".join(piece)) for name, piece in pieces.items()}
    return fill(parts["page"], settings=json.dumps(summary["settings"]), **pieces)


def draw(model, rows, out, log="", samples=8):
    """Answers some rows of `out` again, right and wrong ones, and draws out/picture.png and out/report.html.

    log: the training run's log.jsonl, for the curves.
    """
    out, images = Path(out), Images(model, cache=True)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    how, results, chosen = PLAIN | summary["settings"], read_lines(out / "results.jsonl"), []
    for correct in (True, False):
        some = [result["row"] for result in results if result["correct"] == correct]
        chosen += thin(some, max(1, samples // 2))
    truth = functools.cache(lambda i: true_latents(model, rows[i], images))
    answers = answer(model, rows, chosen, how, truth, images)
    drawn = [depict(model, rows, result, how, truth, images) for result in answers]
    picture([drawn[0], drawn[-1]]).save(out / "picture.png")
    write(out / "report.html", report(summary, drawn, read_lines(log) if log else []))


if __name__ == "__main__":
    constants = set_constants(globals())
    for name, known in CONTROLS.items():
        value = constants[name]
        check(value in ("", *known), f"{name}={value} is none of {', '.join(known)}; leave it out for none.")
    rank, world, device = init_distributed()
    rows = read_rows(DATA if DATA.endswith(".jsonl") else Path(DATA) / "test_imagery.jsonl")
    model = load_model(MODEL, device)
    suffix = "".join(f"_{name.lower()}-{constants[name]}" for name in CONTROLS if constants[name])
    out = Path(OUT or Path(MODEL) / f"eval{suffix}")
    how = {name: constants[name.upper()] for name in PLAIN}
    summary = evaluate(model, rows, out, how, LIMIT, RESUME, rank, world)
    if rank == 0:
        print_table(summary)
        draw(model, rows, out, newest_checkpoint(MODEL).parent / "log.jsonl", SAMPLES)
        print(f"{out}/summary.json, {out}/picture.png, {out}/report.html")
    if world > 1:
        dist.destroy_process_group()
