"""Makes the bundled tiny base anew: pretraining rows, a random network, and stage by stage its weights.

In:  nothing; the toy world and the job pool of generate_data.py, the training of dift.py
Out: OUT/rows/pretrain{,_test}.jsonl   rows that ground ("track", "cells") and bind option letters ("near",
                                       "far", "options"), beside a small toy set of every other kind
     OUT/rows/stage_*.jsonl            what each stage learns from
     OUT/random/                       the tokenizer and a network of random weights
     OUT/eyes/                         the same, its visual encoder trained by itself
     OUT/<stage>/step_*/               checkpoints; the last stage's is a base like assets/tiny

    python -m tools.make_tiny                                                 # 110 minutes on two cores
    python -m tools.make_tiny CLIPS=8 OPTION_ROWS=60 MOST_STEPS=2 OUT=out/trial     # does it run at all

Not a stage that a user runs. The visual encoder learns first, by a head that is thrown away, what each of its
tokens shows. Each of STAGES is a run of dift.py without imagery (K=0, vision frozen) that starts where the
one before ended; in "flow", which has no rows, the visual encoder alone learns to tell how the picture moves
between the two frames of a token. A killed run continues when started again.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

import generate_data
from lib import vocabulary
from lib.checkpoints import linear_warmup_decay
from lib.clips import Clip, Draft
from lib.command_line import override_constants, require
from lib.geometry import bin_word, centroid_and_area, describe_location, project, view_width
from lib.images import patchify
from lib.jobs import Job, run_jobs
from lib.place import place_directions
from lib.ray_tracer import camera_rays
from model import PROMPT_END, PROMPT_START, SUFFIX, load_model

# --- paths
OUT = "out/tiny"  # folder that is written
# --- data
CLIPS = 8000  # >= 1; clips of pretrain.jsonl
TEST_CLIPS = 200  # >= 1; clips of pretrain_test.jsonl
OPTION_ROWS = 48000  # >= 1; text-only rows: near drills, far drills, "pick the option", "bind" by turns
OPTION_TEST_ROWS = 800  # >= 1; of them in pretrain_test.jsonl
TOY_CLIPS = (300, 300, 100, 10)  # >= 1; train, test, rl_train, rl_test: for the tokenizer, to measure chance
THINGS = (3, 5)  # >= 1, rising; fewest and most things of one "track" row
P_TRACK = (1.0, 1.0, 1.0, 0.4)  # 0 to 1; chances of a clip's rows: words, words, pixels, colour
# --- model
VOCAB = 1024  # >= 300; entries of the tokenizer
CONFIG = "assets/tiny_network.json"  # the network's shape, below the repository's root
# --- optimisation
EYES = (3000, 2000, 2e-3)  # > 0; clips, steps and peak LR of the visual encoder's own training
PLACE = (0.3, 2.0)  # 0 to 100; what is left of the cells' own features, and of what all others grow to
FLOW_SIZE = 1.5  # > 0; length of the features that tell the optical flow, per unit of its code
EYES_BATCH = 16  # >= 1; clips of one of its steps
STAGES = [  # name, kinds of rows ("plain": far drills of short options), steps, peak LR, supervised
    ("grounding", "grounding", 1000, 2e-3, "all"),
    ("words", "grounding colour far options", 400, 1.5e-3, "all"),
    ("near", "near", 600, 1.5e-3, "letters"),
    ("plain", "near plain", 500, 1.5e-3, "letters"),
    ("far", "near far", 400, 1.5e-3, "letters"),
    ("options", "far options", 300, 1e-3, "letters"),
    ("mixture", "grounding fine cells colour near far options", 1200, 1.5e-3, "all"),
    ("letters", "near far options", 300, 1e-3, "letters"),
    ("again", "grounding fine cells colour near far options", 300, 1e-3, "all"),
    ("polish", "grounding colour options", 300, 7e-4, "all"),
    ("flow", "", 1500, 3e-3, ""),  # the visual encoder alone
    ("place", "", 0, 0, ""),  # its last layer, in closed form
    ("settle", "grounding fine cells colour near far options", 200, 1.5e-3, "all"),
    ("slots", "near far options", 200, 1e-3, "letters"),
    ("last", "grounding colour near far options", 250, 1e-3, "all"),
    ("bind", "far options bind", 300, 3e-4, "letters"),
    ("final", "grounding colour near far options bind", 150, 1e-3, "all"),
    ("compound", "options bind", 400, 5e-4, "letters"),
    ("whole", "grounding colour near far options bind", 600, 1e-3, "all"),
]
MOST_STEPS = 0  # >= 0; steps of a stage at most, for a trial; 0: as STAGES says
GLOBAL_BATCH = 32  # >= 1; rows of one step
MICRO_BATCH = 4  # >= 1; rows of one forward pass
# --- logging
LOG_EVERY = 50  # >= 0; steps between printed lines
SAVE_EVERY = 100  # >= 0; steps between checkpoints
# --- system
SEED = 1  # >= 0; of clips and rows; the network's weights are drawn with 0
PROCESSES = 2  # 1 to 1000; of torchrun; the result does not depend on it beyond rounding
WORKERS = os.cpu_count()  # 1 to 1000; processes that make clips; the files do not depend on it

root = Path(__file__).parent.parent
# what long options have, as grep would find it in a row's line
long_options = r" and [A-Z]|First |\[[0-9]|Camera: |Getting |Speeding|Slowing|Constant|Maintaining"
# what OUT/rows depends on
rows_by = "CLIPS TEST_CLIPS OPTION_ROWS OPTION_TEST_ROWS TOY_CLIPS THINGS P_TRACK SEED".split()


def data_constants(c):
    """The constants that generate_data.py makes toy clips by, in this tool's folder."""
    data = override_constants(vars(generate_data), [])
    data.OUT = str(Path(c.OUT) / "rows")
    data.SEED = c.SEED
    data.WORKERS = c.WORKERS
    data.P_OBJECT_CLIP = 0.5
    data.P_FOLLOW = 0.0
    return data


# ---------------------------------------------------------------- rows about clips


def track(clip, name, in_pixels, data):
    """A thing, the sun or the horizon -> an entry per frame pair: "left upper small" or "x 20 y 36"."""
    describe = describe_horizon if name == "horizon" else describe_thing
    entries = []
    for start in range(0, len(clip.times), 2):
        entries.append(describe(clip, name, slice(start, start + 2), in_pixels, data))
    return ", ".join(entries)


def describe_thing(clip, name, pair, in_pixels, data):
    """Where a thing is in a frame pair."""
    location = centroid_and_area(clip.masks[name][pair], clip.least_area)
    if location is None or not in_pixels:
        return describe_location(location)
    side = clip.frames.shape[1]
    x, y = (4 * round(share * side / 4) for share in location[:2])
    return f"x {x} y {y}"


def describe_horizon(clip, name, pair, in_pixels, data):
    """How high the horizon is in a frame pair, and which of its ends is lower."""
    right, up, forward = clip.scene.rot[pair, 1].mean(0)  # the vertical part of the camera's axes
    y = 0.5 + forward / up / view_width(data.HFOV)
    if not 0 <= y <= 1:
        return "hidden"
    slope = np.degrees(np.arctan2(right, up))
    lower_end = "level"
    if slope < -6:
        lower_end = "sloping-left"
    if slope > 6:
        lower_end = "sloping-right"
    side = clip.frames.shape[1]
    height = f"y {4 * round(y * side / 4)}" if in_pixels else bin_word(vocabulary.Y_WORDS, y)
    return f"{height} {lower_end}"


def cells(clip, part):
    """What covers most of each cell of 14 pixels, if a quarter at least: "1.2: green hidden sun green", ...

    A line per row of cells of each frame pair ("pair.row"); part 0 names the things' colours, 1 their shapes.
    """
    masks = np.stack(list(clip.masks.values()))  # (things, T, H, W)
    words = [(name.split() * 2)[part] for name in clip.masks]  # the sun is "sun" in both
    words.append("hidden")
    side = masks.shape[2] // 14
    edge = masks.shape[2] // side
    whole = masks[:, :, : side * edge, : side * edge]
    lines = []
    for start in range(0, len(clip.times), 2):
        pair = whole[:, start : start + 2].mean(1).reshape(-1, side, edge, side, edge)
        cover = pair.mean((2, 4))  # (things, side, side)
        found = np.where(cover.max(0) >= 0.25, cover.argmax(0), -1)
        for number, row in enumerate(found, 1):
            lines.append(f"{start // 2 + 1}.{number}: {' '.join(words[thing] for thing in row)}")
    return "\n".join(lines)


def pretrain_rows(rng, clip, c, data):
    """A clip -> by P_TRACK "track" rows in words and pixels, and colour; two "cells" rows; none on motion."""
    drafts = []
    names = [*clip.static, *clip.moving]
    for number, subtask in enumerate(["grounding", "grounding", "fine", "colour"]):
        most = rng.integers(c.THINGS[0], c.THINGS[1] + 1)
        chosen = rng.permutation([*names, "sun", "horizon"])[:most].tolist()
        end = " in pixels." if subtask == "fine" else "."
        question = f"Track the {', the '.join(chosen[:-1])} and the {chosen[-1]}{end}"
        thought = ""
        lines = [f"{name}: {track(clip, name, subtask == 'fine', data)}" for name in chosen]
        answer = "\n".join(lines)
        if subtask == "colour":
            colour, shape = names[rng.integers(len(names))].split()
            options = generate_data.draw_options(rng, "colour", colour)
            question, _, key = generate_data.shuffle_options(rng, f"Which colour is the {shape}?", options)
            thought, answer = f"The {shape} is {colour}.", f"{key}. {colour}"
        row = generate_data.base_row(clip, f"{subtask}{number}", question, thought, answer, subtask)
        if rng.random() < c.P_TRACK[number]:
            drafts.append(Draft(row, subtask))
    for part, kind in enumerate(["colour", "shape"]):
        question = f"What {kind} is in each part of the frame?"
        row = generate_data.base_row(clip, f"cells{part}", question, "", cells(clip, part), "cells")
        drafts.append(Draft(row, "cells"))
    return drafts


# ---------------------------------------------------------------- rows of text alone


def draw_motions(rng, kind):
    """Labels of two motions of a compound question, and what kind of question the second would be alone."""
    axes = rng.permutation(6)[:2]
    one, two = (vocabulary.MOVES[2 * axis + rng.integers(2)] for axis in axes)
    if kind == "sequence":
        return one, two, "camera"
    return one, list(vocabulary.DIRECTIONS)[rng.integers(10)], "direction"


def option_question(rng, size):
    """Options of one text-only question, drawn as the questions about clips draw theirs, truth first."""
    shares = vocabulary.OPTION_SHARES
    kind = str(rng.choice(list(shares), p=list(shares.values())))
    if kind in ("both", "sequence"):
        one, two, _ = draw_motions(rng, kind)
        noun = list(vocabulary.SHAPES)[rng.integers(4)]
        return generate_data.compound_options(rng, kind, one, two, noun)
    if kind == "box":
        low = [0, 0, size // 7, size // 7]
        high = [size // 2, size // 2, size // 3, size // 3]
        x, y, w, h = rng.integers(low, high)
        return generate_data.box_options(rng, [x, y, x + w, y + h], size, size)
    label = str(rng.choice(vocabulary.VOCABULARY[kind]))
    return generate_data.draw_options(rng, kind, label)


def drill(rng, near, size):
    """Labels of option lists with their letters, many to a row: dense practice in binding -> two texts.

    Near: each of three lists is copied before its labels are asked, "blueB" and "blue", newline, "B" in turn.
    Far: of the one list of the question, by all kinds of labels, up to "blue.</think>", newline, "<answer>B".
    """
    question = ["Write labels and find their letters."]
    answer = []
    labels = [
        *vocabulary.COLOURS,
        *vocabulary.MOVES,
        *vocabulary.DIRECTIONS,
        *vocabulary.VOCABULARY["follow"],
    ]
    gaps = ("", "\n") if near else ("", "\n", ".\n", ".</think>\n<answer>")
    for _ in range(3 if near else 1):
        if near or rng.random() < 0.5:
            options = rng.permutation(labels)[:4].tolist()
        else:
            options = option_question(rng, size)
        listed, lettered, _ = generate_data.shuffle_options(rng, "", options)
        asked = zip(rng.choice(list(lettered), 6 if near else 8), gaps * 4)
        pairs = "\n".join(f"{lettered[letter]}{gap}{letter}" for letter, gap in asked)
        question.append(listed.strip())
        answer.append(f"{listed.strip()}\n{pairs}" if near else pairs)
    return "\n\n".join(question), "\n\n".join(answer)


def bind_texts(rng):
    """A motion question with its reasoning, but no video, to learn its letter alone -> three texts.

    The labels are drawn at random and stand in the reasoning, so nothing is said about motion.
    """
    kinds = ["single", "pair", "direction", "distance", "speed", "follow", "follow", "both", "sequence"]
    kind = str(rng.choice(kinds))
    thing = f"{rng.choice(list(vocabulary.COLOURS))} {rng.choice(list(vocabulary.SHAPES))}"
    count = int(rng.integers(2, 4))
    if kind == "follow":
        thing = f"{rng.choice(list(vocabulary.SLOTS))} {thing}"
        count = int(rng.integers(3, 14))
    times = [generate_data.format_seconds(second) for second in range(1, 2 * count, 2)]

    # what the reasoning says, and the options; it ends with both motions of two
    asked = "camera" if kind in ("single", "pair") else kind
    if kind in ("both", "sequence"):
        one, two, second = draw_motions(rng, kind)
        options = generate_data.compound_options(rng, kind, one, two, thing.split()[-1])
        said = [("camera", times, one), (second, times, two), (kind, [], options[0])]
    else:
        label = str(rng.choice(vocabulary.VOCABULARY[kind]))
        options = generate_data.draw_options(rng, kind, label)
        said = [(asked, times, label)]
    thoughts = []
    for motion, when, label in said:
        phrases = vocabulary.phrases_for(motion)
        thoughts.append(generate_data.write_thought(rng, phrases, thing, when, label, " "))
    ask = vocabulary.phrases_for(asked)["ask"]
    question = generate_data.pick_phrase(rng, ask, thing=thing, a=times[0], b=times[-1])
    question, _, key = generate_data.shuffle_options(rng, question, options)
    return question, " ".join(thoughts), f"{key}. {options[0]}"


def option_row(split, number, seed, size):
    """A text-only row, by turns: a near drill, a far drill, a question that names the option to pick."""
    rng = np.random.default_rng([seed, vocabulary.SPLITS.index(split), number, 1])
    subtask = ("near", "far", "options", "bind")[number % 4]
    if subtask == "bind":
        question, thought, answer = bind_texts(rng)
    elif subtask == "options":
        label, *others = option_question(rng, size)
        question = f'Pick the option that says "{label}".'
        question, _, key = generate_data.shuffle_options(rng, question, [label, *others])
        phrases = vocabulary.phrases_for("options")["end"]
        thought = generate_data.pick_phrase(rng, phrases, label=label)
        answer = f"{key}. {label}"
    else:
        thought = ""
        question, answer = drill(rng, subtask == "near", size)
    clip = Clip(f"{split}_text")
    row = generate_data.base_row(clip, f"{number:06d}", question, thought, answer, subtask)
    if subtask == "bind":
        row["supervise"] = "letters"
    return Draft(row, subtask)


# ---------------------------------------------------------------- rows: who makes them, what a stage sees


def process_job(job, c, data):
    """generate_data's job: clips of the pretraining splits get rows of their own."""
    make_rows = functools.partial(pretrain_rows, c=c, data=data) if job.split.startswith("pretrain") else None
    return generate_data.process_job(job, data, make_rows)


def make_rows(c, data):
    """Writes OUT/rows: the toy set's files and pretrain{,_test}.jsonl, unless they are there already."""
    out = Path(data.OUT)
    recorded = {name: getattr(c, name) for name in rows_by}
    if generate_data.open_folder(out, recorded):
        return
    jobs = []
    for split, count in zip(vocabulary.SPLITS, [*c.TOY_CLIPS, c.CLIPS, c.TEST_CLIPS]):
        jobs += [Job(split, number) for number in range(count)]
    results = run_jobs(jobs, functools.partial(process_job, c=c, data=data), c.WORKERS)
    drafts, dropped, _ = generate_data.collect(results)
    for split, count in (("pretrain", c.OPTION_ROWS), ("pretrain_test", c.OPTION_TEST_ROWS)):
        drafts[split] += [option_row(split, number, c.SEED, data.SIZE) for number in range(count)]
    generate_data.write_files(out, drafts, dropped, recorded)
    print(f"\n{out} is ready.")


def kinds_of(line):
    """Kinds of a row, given as its line: its subtask, and "plain" too for a far drill of short options."""
    subtask = json.loads(line)["subtask"]
    is_plain = subtask == "far" and not re.search(long_options, line)
    return {subtask, "plain"} if is_plain else {subtask}


def write_stage_rows(path, lines, kinds, supervise):
    """Writes the lines of these kinds; their field `supervise` says what the text loss sees."""
    with open(path, "w", encoding="utf-8") as file:
        for line, tags in lines:
            if not tags & set(kinds.split()):
                continue
            if supervise != "all":
                row = json.loads(line)
                row["supervise"] = supervise
                line = json.dumps(row) + "\n"
            file.write(line)


# ---------------------------------------------------------------- the network


def make_network(out, data, config=root / "assets" / "tiny_network.json", vocab=1024, seed=0, prompts=1 / 30):
    """Trains a byte-level BPE on the rows of `data`/*.jsonl, draws random weights, writes a checkpoint.

    The tokenizer has Qwen's special tokens; the latent ones come with the first dift.py run, as for a Qwen.
    """
    texts = [SUFFIX, PROMPT_START + PROMPT_END]
    for file in sorted(Path(data).glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            texts += [value for value in json.loads(line).values() if isinstance(value, str)]
    # the words around every question, so often for each text of the rows that they take few tokens
    around = re.split(r"<\|\w+\|>", PROMPT_START + SUFFIX + PROMPT_END)
    for _ in range(int(len(texts) * prompts)):
        texts += around
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    specials = [f"<|{name}|>" for name in names]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab, new_special_tokens=specials)
    template = root / "assets" / "tiny" / "chat_template.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")

    config = Qwen2_5_VLConfig.from_pretrained(config)
    config.text_config.vocab_size = 64 * math.ceil((len(tokenizer) + 3) / 64)  # spare rows, as Qwen2.5-VL has
    for name in names[2:]:
        token = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        setattr(config, f"{name.removesuffix('_pad')}_token_id", token)
    torch.manual_seed(seed)
    qwen = QwenVL._from_config(config, attn_implementation="sdpa")
    qwen.save_pretrained(out)
    tokenizer.save_pretrained(out)

    # "<answer>A" and "blueA" must hold the very token "A" that begins an option's line
    file = Path(out) / "tokenizer.json"
    table = json.loads(file.read_text())
    glued = re.compile("[^Ġ-][A-F]$")
    merges = table["model"]["merges"]
    table["model"]["merges"] = [merge for merge in merges if not glued.search("".join(merge))]
    file.write_text(json.dumps(table))


# ---------------------------------------------------------------- eyes: the visual encoder alone


def covers(masks, names, is_lit):
    """Masks (things, n, H, W) of one frame pair -> (side², classes): what covers each cell, and where it is.

    Classes: each colour, each shape, sun, sky, highlighted (`is_lit` (things,) 0 or 1), of the first and of
    the last frame; then each column, each row.
    """
    side = masks.shape[2] // 14
    edge = masks.shape[2] // side
    whole = masks[:, [0, -1], : side * edge, : side * edge]
    shares = whole.reshape(-1, 2, side, edge, side, edge).mean((3, 5)).reshape(len(names), 2, -1)
    words = [*vocabulary.COLOURS, *vocabulary.SHAPES, "sun", "sky"]
    has = np.array([[word in name.split() for word in words] + [lit] for name, lit in zip(names, is_lit)])
    column = np.tile(np.eye(side), (side, 1))  # (side², side)
    row = np.repeat(np.eye(side), side, 0)
    found = [shares[:, 0].T @ has, shares[:, 1].T @ has, column, row]
    return np.concatenate(found, 1).astype(np.float32)


def flow(clip, patching, hfov):
    """A clip -> optical flow from first to last frame of each pair, (pairs · side², 2 · patches of a token).

    In pixels, the mean of each patch's. The ground moves as its geometry says, sky and mountains as at
    infinity, a thing as a card at the depth of its centre.
    """
    pos, rot, size = clip.scene.pos, clip.scene.rot, clip.frames.shape[1]
    patch, merge, _ = patching
    side = size // (patch * merge)
    rays = camera_rays(rot, size, hfov).astype(float)  # (3, T, H, W)
    spots = (np.arange(size) + 0.5) / size
    pairs = []
    for t in range(0, len(pos), 2):
        # what each pixel of the first frame shows, where it is at the time of the second
        ray, start = rays[:, t], pos[t][:, None, None]
        depth = np.where(ray[1] < -1e-3, pos[t, 1] / np.maximum(-ray[1], 1e-3), 1e4)  # (H, W)
        points = start + ray * np.minimum(depth, 1e4)  # (3, H, W), of the world
        for thing in clip.scene.things:
            mask, path = clip.masks[thing.name][t], thing.path
            step = (path[t + 1] - path[t])[:, None, None]
            card = start + ray * ((path[t] - pos[t]) @ rot[t, :, 2]) + step
            points = np.where(mask, card, points)

        # where the second frame shows it
        turned = rot[[t + 1]].repeat(size**2, 0)
        x, y, depth = project(points.reshape(3, -1).T, pos[t + 1], turned, hfov)
        moved = np.stack([x.reshape(size, size) - spots, y.reshape(size, size) - spots[:, None]])
        moved = np.where(depth.reshape(size, size) > 1e-2, moved, 0).clip(-6 / size, 6 / size) * size
        edge = side * merge * patch
        parts = moved[:, :edge, :edge].reshape(2, side, merge, patch, side, merge, patch).mean((3, 6))
        pairs.append(parts.transpose(1, 3, 2, 4, 0).reshape(side * side, -1))
    return np.concatenate(pairs).astype(np.float32)


def sights(number, data, patching):
    """A clip -> its video and two overlays of its things: patches, grid, covers, optical flow of each."""
    clip, _, _ = generate_data.toy_clip(data, "train", number)
    rng = np.random.default_rng([data.SEED, number, 2])
    names = [*clip.masks, "sky"]
    masks = np.stack(list(clip.masks.values()))  # (things, T, H, W)
    sky = (camera_rays(clip.scene.rot, masks.shape[2], data.HFOV)[1] > 0) & ~masks.any(0)
    masks = np.concatenate([masks, sky[None]])
    nothing = np.zeros(len(names))
    pairs = [covers(masks[:, start : start + 2], names, nothing) for start in range(0, len(clip.frames), 2)]
    found = [(*patchify(clip.frames, *patching), np.concatenate(pairs), flow(clip, patching, data.HFOV))]
    width = found[0][3].shape[1]
    for frame in rng.integers(0, len(clip.frames), 2):
        chosen = names.index(rng.choice([*clip.static, *clip.moving]))
        is_lit = np.eye(len(names))[chosen]
        mask = masks[chosen, frame]
        image = generate_data.overlay(clip.frames[frame], mask, data.ALPHA, data.OVERLAY_COLOUR)
        cover = covers(masks[:, frame : frame + 1], names, is_lit)
        still = np.zeros((len(cover), width), np.float32)
        found.append((*patchify(image[None], *patching), cover, still))
    return found


def all_sights(c, data, patching):
    """The sights of the first clips, made by all workers."""
    do = functools.partial(sights, data=data, patching=patching)
    return run_jobs(range(c.EYES[0]), do, c.WORKERS)


def load_eyes(parent):
    """A checkpoint as a Thinker whose visual encoder may be trained."""
    model = load_model(parent, K=0, pooling="grid")
    model.qwen.model.visual.requires_grad_(True)
    return model


def save_eyes(model, clips, out):
    """Writes a Thinker, its visual tokens centred."""
    centre(model, clips)
    model.qwen.save_pretrained(out)
    model.tokenizer.save_pretrained(out)


def draw_sights(clips, seeds, count):
    """The sights of some clips, drawn by these seeds."""
    chosen = np.random.default_rng(seeds).integers(0, len(clips), count)
    return [sight for number in chosen for sight in clips[number]]


def train_eyes(parent, out, c, clips):
    """Teaches the visual encoder, by a linear head that is thrown away, what each visual token shows.

    A Qwen2.5-VL is not trained from blind eyes either: from the words of the answers alone the encoder told
    colours apart no better after 5,000 steps than at random.
    """
    _, steps, peak = c.EYES
    torch.manual_seed(0)
    model = load_eyes(parent)
    head = torch.nn.Linear(model.config.text_config.hidden_size, clips[0][0][2].shape[1])
    optimizer = torch.optim.AdamW([*model.qwen.model.visual.parameters(), *head.parameters()], lr=peak)
    for step in range(steps):
        some = draw_sights(clips, [c.SEED, step], c.EYES_BATCH)
        true = torch.from_numpy(np.concatenate([sight[2] for sight in some]))  # (N, classes)
        said = head(features_of(model, some))  # (N, classes)
        loss = F.binary_cross_entropy_with_logits(said, true)
        optimizer.param_groups[0]["lr"] = linear_warmup_decay(step, steps, 20, peak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % c.LOG_EVERY == 0 or step + 1 == steps:
            colours = len(vocabulary.COLOURS)
            said, shown = said[:, :colours], true[:, :colours]
            right = (said.argmax(1) == shown.argmax(1))[shown.amax(1) > 0.25].float().mean()
            least = F.binary_cross_entropy(true, true)  # cells covered in part keep it from zero
            print(f"eyes {step + 1}/{steps} | loss {loss:.4f}, at best {least:.4f} | colours {right:.3f}")
    save_eyes(model, clips, out)


def features_of(model, some):
    """Features (N, D) of the visual tokens of some sights."""
    pixels = torch.cat([sight[0] for sight in some])
    return torch.cat(model.encode(pixels, [sight[1] for sight in some]))


@torch.no_grad()
def centre(model, clips):
    """Makes visual tokens as long as a final hidden state and takes off the direction they share.

    Eq. 6 compares the two, and what all tokens share would leave the cosine next to nothing to learn from.
    """
    last = model.qwen.model.visual.merger.mlp[2]
    features = features_of(model, [sight for clip in clips[:200] for sight in clip])
    mean = features.mean(0)
    scale = len(mean) ** 0.5 / (features - mean).norm(dim=1).mean()
    last.weight *= scale
    last.bias.sub_(mean).mul_(scale)


def flow_code(shift):
    """Flow of tokens' patches (N, 8) in pixels -> (N, 10): squashed, to show slow things, and its mean."""
    mean = shift.view(len(shift), -1, 2).mean(1)
    return torch.cat([torch.tanh(shift / 0.8), mean / 1.7], 1)


@torch.no_grad()
def covering_directions(model, clips):
    """Directions of the features that tell the covers, the others, and the first ones' mean square.

    (D, n), (D, D - n), (): by ridge regression from features to covers.
    """
    some = [sight for clip in clips[:300] for sight in clip]
    features = features_of(model, some)
    cover = torch.from_numpy(np.concatenate([sight[2] for sight in some]))
    features, cover = features - features.mean(0), cover - cover.mean(0)
    ridge = features.T @ features + 0.01 * len(features) * torch.eye(features.shape[1])
    spread, size, _ = torch.linalg.svd(torch.linalg.solve(ridge, features.T @ cover))
    count = (size > 0.02 * size[0]).sum()
    covering, rest = spread[:, :count], spread[:, count:]
    return covering, rest, (features @ covering).pow(2).mean()


def train_flow(parent, out, steps, peak, c, clips):
    """Teaches the visual encoder to tell optical flow as well, without changing what `parent` reads in it.

    Told only what covers each token, it forgets how the picture moves between a token's two frames. Ten
    directions of the features, at right angles to those that tell the covers, are trained to be the flow's
    code; tokens with a thing in them weigh four times as much as others.
    """
    torch.manual_seed(0)
    old, model = load_eyes(parent), load_eyes(parent)
    covering, rest, energy = covering_directions(old, clips)
    flowing = rest @ torch.linalg.qr(torch.randn(rest.shape[1], 10))[0]  # (D, 10)
    optimizer = torch.optim.AdamW(model.qwen.model.visual.parameters(), lr=peak)
    for step in range(steps):
        some = draw_sights(clips, [c.SEED, step, 4], c.EYES_BATCH)
        cover, shift = (torch.from_numpy(np.concatenate([sight[n] for sight in some])) for n in (2, 3))
        has_thing = cover[:, : len(vocabulary.COLOURS)].sum(1) > 0.1
        weight = 1 + 3 * has_thing.float()
        features = features_of(model, some)
        with torch.no_grad():
            before = features_of(old, some)
        changed = ((features - before) @ covering).pow(2).mean() / energy
        error = (features @ flowing / c.FLOW_SIZE - flow_code(shift)).pow(2).mean(1)
        missed = weight @ error / weight.sum()
        optimizer.param_groups[0]["lr"] = linear_warmup_decay(step, steps, 20, peak)
        optimizer.zero_grad()
        (5 * changed + 2 * missed).backward()
        torch.nn.utils.clip_grad_norm_(model.qwen.model.visual.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % c.LOG_EVERY == 0 or step + 1 == steps:
            print(f"flow {step + 1}/{steps} | covers changed {changed:.4f} | flow missed {missed:.4f}")
    save_eyes(model, clips, out)


# ---------------------------------------------------------------- place: what all images share


@torch.no_grad()
def shrink_place(parent, out, c, clips):
    """Makes what a visual token shows stand out against where it is, in the merger's last layer.

    Most of the variance is a token's place, in few directions. With their projection P, the mean m, and
    (s, g) of PLACE: W' = g (I - (1 - s) P) W and b' = g (I - (1 - s) P) (b - m).
    """
    model = load_eyes(parent)
    videos = [clip[0] for clip in clips[:300]]
    t, h, w = videos[0][1]
    cells = len(videos[0][2]) // t
    features = features_of(model, videos)
    mean, directions, before = place_directions(features, cells)
    left, gain = c.PLACE
    shrink = torch.eye(len(mean)) - (1 - left) * directions.T @ directions
    last = model.qwen.model.visual.merger.mlp[2]
    last.weight.copy_(gain * shrink @ last.weight)
    last.bias.copy_(gain * shrink @ (last.bias - mean))
    _, _, after = place_directions(features_of(model, videos), cells)
    print(f"place | share of the variance between cells: {before:.3f}, now {after:.3f}")
    model.qwen.save_pretrained(out)
    model.tokenizer.save_pretrained(out)


# ---------------------------------------------------------------- stages


def run_stage(c, name, parent, data, steps, lr):
    """Runs dift.py without imagery on a stage's rows, on PROCESSES processes."""
    constants = {
        "MODEL": parent,
        "DATA": data,
        "OUT": Path(c.OUT) / name,
        "STEPS": steps,
        "LR": lr,
        "K": 0,
        "EVAL_EVERY": 0,
        "TEST_ROWS": 0,
        "GLOBAL_BATCH": c.GLOBAL_BATCH,
        "MICRO_BATCH": c.MICRO_BATCH,
        "BETA2": 0.999,  # the bundled base was made with it
        "SAVE_EVERY": c.SAVE_EVERY,
        "LOG_EVERY": c.LOG_EVERY,
    }
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={c.PROCESSES}"]
    command.append(str(root / "dift.py"))
    command += [f"{key}={value}" for key, value in constants.items()]
    done = subprocess.run(command)
    require(done.returncode == 0, f"The stage {name} failed, see above; the same command goes on there.")


def main():
    """Makes what is not there yet, in order; each part is made under a temporary name, then renamed."""
    c = override_constants(globals())
    data = data_constants(c)
    config = root / c.CONFIG
    vision = json.loads(config.read_text())["vision_config"]
    # pixels of a patch, patches of a token's side, frames of a token
    patching = [vision[f"{name}_size"] for name in ("patch", "spatial_merge", "temporal_patch")]
    out = Path(c.OUT)
    make_rows(c, data)
    if not (out / "random").exists():
        make_network(out / "random.part", out / "rows", config, c.VOCAB)
        (out / "random.part").rename(out / "random")
    if not (out / "eyes").exists():
        train_eyes(out / "random", out / "eyes.part", c, all_sights(c, data, patching))
        (out / "eyes.part").rename(out / "eyes")

    parent = out / "eyes"
    lines = (out / "rows" / "pretrain.jsonl").read_text().splitlines(keepends=True)
    tagged = [(line, kinds_of(line)) for line in lines]
    for name, kinds, steps, lr, supervise in c.STAGES:
        steps = min(steps, c.MOST_STEPS or steps)
        if not kinds:
            if not (out / name).exists():
                clips = all_sights(c, data, patching)
                if name == "place":
                    shrink_place(parent, out / f"{name}.part", c, clips)
                else:
                    train_flow(parent, out / f"{name}.part", steps, lr, c, clips)
                (out / f"{name}.part").rename(out / name)
        elif not (out / name / f"step_{steps:06d}" / "config.json").exists():
            file = out / "rows" / f"stage_{name}.jsonl"
            write_stage_rows(file, tagged, kinds, supervise)
            run_stage(c, name, parent, file, steps, lr)
        parent = out / name
    print(f"Made {parent}. Measure it: python -m tools.measure_base MODEL={parent} DATA={out / 'rows'}")


if __name__ == "__main__":
    main()
