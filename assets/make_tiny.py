"""Makes the bundled tiny base anew: pretraining rows, a random network, and stage by stage its weights.

In:  nothing; the toy world and the job pool of generate_data.py, the training of dift.py
Out: OUT/rows/pretrain{,_test}.jsonl   rows that ground ("track", "cells") and bind option letters ("near",
                                       "far", "options"), beside a small toy set of every other kind
     OUT/rows/stage_*.jsonl            what each stage learns from
     OUT/random/                       the tokenizer and a network of random weights
     OUT/eyes/                         the same, its visual encoder trained by itself
     OUT/<stage>/step_*/               checkpoints; the last stage's is what assets/tiny holds

    python assets/make_tiny.py                                                # 70 minutes on two cores
    python assets/make_tiny.py CLIPS=8 OPTION_ROWS=60 MOST_STEPS=2 OUT=out/trial    # does it run at all

Not a stage that a user runs. The visual encoder learns first, by a head that is thrown away, what each of its
tokens shows. Each of STAGES is a run of dift.py without imagery (K=0, vision frozen) that starts where the
one before ended; in "flow", which has no rows, the visual encoder alone learns to tell how the picture moves
between the two frames of a token. A killed run continues when started again.
"""

import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate_data as gd
from dift import lr_at
from model import PROMPT, SUFFIX, check, load_model, patchify, set_constants

# paths
OUT = "out/tiny"  # folder that is written
# data
CLIPS = 8000  # clips of pretrain.jsonl
TEST_CLIPS = 200  # clips of pretrain_test.jsonl
OPTION_ROWS = 36000  # text-only rows: near drills, far drills, "pick the option" by turns
OPTION_TEST_ROWS = 600  # of them in pretrain_test.jsonl
TOY_CLIPS = (300, 300, 100, 10)  # train, test, rl_train, rl_test: for the tokenizer and to measure chance
THINGS = (3, 5)  # fewest and most things of one "track" row
P_TRACK = (1.0, 1.0, 1.0, 0.4)  # chances of a clip's rows: words, words, pixels, colour
# model
VOCAB = 1024  # entries of the tokenizer
CONFIG = str(gd.ASSETS / "tiny_network.json")  # the network's shape
# optimisation
EYES = (3000, 2000, 2e-3)  # clips, steps and peak LR of the visual encoder's own training
FLOW_SIZE = 1.5  # length of the features that tell the optical flow, per unit of its code
EYES_BATCH = 16  # clips of one of its steps
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
    ("settle", "grounding fine cells colour near far options", 200, 1.5e-3, "all"),
    ("last", "grounding colour near far options", 250, 1e-3, "all"),
]
MOST_STEPS = 0  # steps of a stage at most, for a trial; 0: as STAGES says
GLOBAL_BATCH = 32  # rows of one step
MICRO_BATCH = 4  # rows of one forward pass
# logging
LOG_EVERY = 50  # steps between printed lines
SAVE_EVERY = 100  # steps between checkpoints
# system
SEED = 1  # of clips and rows; the network's weights are drawn with 0
PROCESSES = 2  # of torchrun; the result does not depend on it beyond rounding
WORKERS = os.cpu_count()  # processes that make clips; the files do not depend on it

# of the network's visual encoder: pixels of a patch, patches of a token's side, frames of a token
PATCH = [
    json.loads(Path(CONFIG).read_text())["vision_config"][f"{name}_size"]
    for name in ("patch", "spatial_merge", "temporal_patch")
]
# what long options have, as grep would find it in a row's line
LONG = r" and [A-Z]|First |\[[0-9]|Camera: |Getting |Speeding|Slowing|Constant|Maintaining"
# what OUT/rows depends on
ROWS_BY = "CLIPS TEST_CLIPS OPTION_ROWS OPTION_TEST_ROWS TOY_CLIPS THINGS P_TRACK SEED".split()

# ---------------------------------------------------------------- rows about clips


def track(clip, name, in_pixels):
    """A thing, the sun or the horizon -> an entry per frame pair: "left upper small" or "x 20 y 36"."""
    entries, side = [], clip["frames"].shape[1]
    for start in range(0, len(clip["times"]), 2):
        pair = slice(start, start + 2)
        if name == "horizon":
            right, up, forward = clip["rot"][pair, 1].mean(0)  # the vertical part of the camera's axes
            y, slope = 0.5 + forward / up / gd.view_width(gd.HFOV), np.degrees(np.arctan2(right, up))
            lower_end = "sloping-left" if slope < -6 else "sloping-right" if slope > 6 else "level"
            height = f"y {4 * round(y * side / 4)}" if in_pixels else gd.fifth(gd.Y_WORDS, y)
            entries.append(f"{height} {lower_end}" if 0 <= y <= 1 else "hidden")
        else:
            spot = gd.where(clip["masks"][name][pair])
            x, y = (4 * round(share * side / 4) for share in (spot or (0, 0))[:2])
            entries.append(f"x {x} y {y}" if in_pixels and spot else gd.spell_spot(spot))
    return ", ".join(entries)


def cells(clip, part):
    """What covers most of each cell of 14 pixels, if a quarter at least: "1.2: green hidden sun green", ...

    A line per row of cells of each frame pair ("pair.row"); part 0 names the things' colours, 1 their shapes.
    """
    lines, masks = [], np.stack(list(clip["masks"].values()))  # (things, T, H, W)
    words = [(name.split() * 2)[part] for name in clip["masks"]] + ["hidden"]  # the sun is "sun" in both
    side = masks.shape[2] // 14
    edge = masks.shape[2] // side
    whole = masks[:, :, : side * edge, : side * edge]
    for start in range(0, len(clip["times"]), 2):
        pair = whole[:, start : start + 2].mean(1).reshape(-1, side, edge, side, edge)
        cover = pair.mean((2, 4))  # (things, side, side)
        found = np.where(cover.max(0) >= 0.25, cover.argmax(0), -1)
        for number, row in enumerate(found, 1):
            lines.append(f"{start // 2 + 1}.{number}: {' '.join(words[thing] for thing in row)}")
    return "\n".join(lines)


def pretrain_rows(rng, clip):
    """A clip -> by P_TRACK "track" rows in words and pixels, and colour; two "cells" rows; none on motion."""
    rows, names = [], [*clip["static"], *clip["moving"]]
    for number, subtask in enumerate(["grounding", "grounding", "fine", "colour"]):
        most = rng.integers(THINGS[0], THINGS[1] + 1)
        chosen = rng.permutation([*names, "sun", "horizon"])[:most].tolist()
        end = " in pixels." if subtask == "fine" else "."
        question = f"Track the {', the '.join(chosen[:-1])} and the {chosen[-1]}{end}"
        thought, answer = "", "\n".join(f"{name}: {track(clip, name, subtask == 'fine')}" for name in chosen)
        if subtask == "colour":
            colour, shape = names[rng.integers(len(names))].split()
            options = gd.draw_options(rng, "colour", colour)
            question, _, key = gd.spell(rng, f"Which colour is the {shape}?", options)
            thought, answer = f"The {shape} is {colour}.", f"{key}. {colour}"
        row = gd.base_row(clip, f"{subtask}{number}", question, thought, answer, subtask)
        rows += [{"row": row, "label": subtask}] if rng.random() < P_TRACK[number] else []
    for part, kind in enumerate(["colour", "shape"]):
        question = f"What {kind} is in each part of the frame?"
        row = gd.base_row(clip, f"cells{part}", question, "", cells(clip, part), "cells")
        rows.append({"row": row, "label": "cells"})
    return rows


# ---------------------------------------------------------------- rows of text alone


def option_question(rng):
    """Options of one text-only question, drawn as the questions about clips draw theirs, truth first."""
    kind = str(rng.choice(list(gd.WORDS["option_shares"]), p=list(gd.WORDS["option_shares"].values())))
    if kind in ("both", "sequence"):
        one, two = (gd.MOVES[2 * axis + rng.integers(2)] for axis in rng.permutation(6)[:2])
        second = two if kind == "sequence" else list(gd.DIRECTIONS)[rng.integers(10)]
        return gd.compound_options(rng, kind, one, second, list(gd.SHAPES)[rng.integers(4)])
    if kind == "box":
        side = gd.SIZE
        x, y, w, h = rng.integers([0, 0, side // 7, side // 7], [side // 2, side // 2, side // 3, side // 3])
        return gd.box_options(rng, [x, y, x + w, y + h], side, side)
    return gd.draw_options(rng, kind, str(rng.choice(gd.VOCABULARY[kind])))


def drill(rng, near):
    """Labels of option lists with their letters, many to a row: dense practice in binding -> two texts.

    Near: each of three lists is copied before its labels are asked, "blueB" and "blue", newline, "B" in turn.
    Far: of the one list of the question, by all kinds of labels, up to "blue.</think>", newline, "<answer>B".
    """
    question, answer = ["Write labels and find their letters."], []
    labels = [*gd.COLOURS, *gd.MOVES, *gd.DIRECTIONS]
    gaps = ("", "\n") if near else ("", "\n", ".\n", ".</think>\n<answer>")
    for _ in range(3 if near else 1):
        options = rng.permutation(labels)[:4].tolist() if near or rng.random() < 0.5 else option_question(rng)
        listed, lettered, _ = gd.spell(rng, "", options)
        asked = zip(rng.choice(list(lettered), 6 if near else 8), gaps * 4)
        pairs = "\n".join(f"{lettered[letter]}{gap}{letter}" for letter, gap in asked)
        question.append(listed.strip())
        answer.append(f"{listed.strip()}\n{pairs}" if near else pairs)
    return "\n\n".join(question), "\n\n".join(answer)


def option_row(split, number):
    """A text-only row, by turns: a near drill, a far drill, a question that names the option to pick."""
    rng = np.random.default_rng([SEED, gd.SPLITS.index(split), number, 1])
    subtask = ("near", "far", "options")[number % 3]
    if subtask == "options":
        label, *others = option_question(rng)
        question, _, key = gd.spell(rng, f'Pick the option that says "{label}".', [label, *others])
        thought, answer = gd.pick(rng, gd.PHRASES["options"]["end"], label=label), f"{key}. {label}"
    else:
        thought, (question, answer) = "", drill(rng, subtask == "near")
    row = gd.base_row({"name": f"{split}_text"}, f"{number:06d}", question, thought, answer, subtask)
    return {"row": row, "label": subtask}


# ---------------------------------------------------------------- rows: who makes them, what a stage sees


def work(job):
    """generate_data's job: clips of the pretraining splits get rows of their own."""
    return gd.work(job, pretrain_rows if job[0].startswith("pretrain") else None)


def start_worker(mine, toy):
    """Gives a worker process this file's constants and those set in generate_data.py."""
    globals().update(mine)
    gd.start_worker(toy)


def make_rows(out, constants):
    """Writes OUT/rows: the toy set's files and pretrain{,_test}.jsonl, unless they are there already."""
    toy = {"OUT": str(out), "SEED": SEED, "WORKERS": WORKERS, "P_OBJECT_CLIP": 0.5}
    vars(gd).update(toy)
    if gd.open_folder(out, constants):
        return
    counts = zip(gd.SPLITS, [*TOY_CLIPS, CLIPS, TEST_CLIPS])
    jobs = [(split, number, "") for split, count in counts for number in range(count)]
    items, dropped = gd.run_jobs(jobs, work, start_worker, [constants, toy])
    for split, count in (("pretrain", OPTION_ROWS), ("pretrain_test", OPTION_TEST_ROWS)):
        items[split] += [option_row(split, number) for number in range(count)]
    gd.write_files(out, items, dropped, constants)
    print(f"\n{out} is ready.")


def kinds_of(line):
    """Kinds of a row, given as its line: its subtask, and "plain" too for a far drill of short options."""
    subtask = json.loads(line)["subtask"]
    return {subtask, "plain"} if subtask == "far" and not re.search(LONG, line) else {subtask}


# ---------------------------------------------------------------- the network


def make_network(out, data, config=CONFIG, vocab=VOCAB, seed=0, prompts=1 / 30):
    """Trains a byte-level BPE on the rows of `data`/*.jsonl, draws random weights, writes a checkpoint.

    The tokenizer has Qwen's special tokens; the latent ones come with the first dift.py run, as for a Qwen.
    """
    texts = [SUFFIX, PROMPT.format(video="", text="")]
    for file in sorted(Path(data).glob("*.jsonl")):
        rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
        texts += [value for row in rows for value in row.values() if isinstance(value, str)]
    # the words around every question, so often for each text of the rows that they take few tokens
    texts += re.split(r"<\|\w+\|>", PROMPT.format(video="", text=SUFFIX)) * int(len(texts) * prompts)
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    specials = [f"<|{name}|>" for name in names]
    tok = Qwen2Tokenizer().train_new_from_iterator(texts, vocab, new_special_tokens=specials)
    tok.chat_template = (gd.ASSETS / "chat_template.jinja").read_text()
    config = Qwen2_5_VLConfig.from_pretrained(config)
    config.text_config.vocab_size = 64 * math.ceil((len(tok) + 3) / 64)  # spare rows, as Qwen2.5-VL has them
    for name in names[2:]:
        setattr(config, f"{name.removesuffix('_pad')}_token_id", tok.convert_tokens_to_ids(f"<|{name}|>"))
    torch.manual_seed(seed)
    net = QwenVL._from_config(config, attn_implementation="sdpa")
    net.save_pretrained(out)
    tok.save_pretrained(out)
    file = Path(out) / "tokenizer.json"
    table, glued = json.loads(file.read_text()), re.compile("[^Ġ-][A-F]$")
    # "<answer>A" and "blueA" must hold the very token "A" that begins an option's line
    table["model"]["merges"] = [x for x in table["model"]["merges"] if not glued.search("".join(x))]
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
    cells = whole.reshape(-1, 2, side, edge, side, edge).mean((3, 5)).reshape(len(names), 2, -1)
    words = [*gd.COLOURS, *gd.SHAPES, "sun", "sky"]
    has = np.array([[word in name.split() for word in words] + [lit] for name, lit in zip(names, is_lit)])
    column, row = np.tile(np.eye(side), (side, 1)), np.repeat(np.eye(side), side, 0)  # (side², side) each
    return np.concatenate([cells[:, 0].T @ has, cells[:, 1].T @ has, column, row], 1).astype(np.float32)


def flow(clip):
    """A clip -> optical flow from first to last frame of each pair, (pairs · side², 2 · patches of a token).

    In pixels, the mean of each patch's. The ground moves as its geometry says, sky and mountains as at
    infinity, a thing as a card at the depth of its centre.
    """
    pos, rot, size = clip["pos"], clip["rot"], clip["frames"].shape[1]
    patch, merge, _ = PATCH
    side, pairs = size // (patch * merge), []
    rays = gd.camera_rays(rot, size, gd.HFOV).astype(float)  # (3, T, H, W)
    spots = (np.arange(size) + 0.5) / size
    for t in range(0, len(pos), 2):
        ray, start = rays[:, t], pos[t][:, None, None]
        depth = np.where(ray[1] < -1e-3, pos[t, 1] / np.maximum(-ray[1], 1e-3), 1e4)  # (H, W)
        points = start + ray * np.minimum(depth, 1e4)  # (3, H, W), of the world
        for thing in clip["things"]:
            mask, path = clip["masks"][thing["name"]][t], thing["path"]
            card = start + ray * ((path[t] - pos[t]) @ rot[t, :, 2]) + (path[t + 1] - path[t])[:, None, None]
            points = np.where(mask, card, points)
        x, y, depth = gd.project(
            points.reshape(3, -1).T, pos[t + 1], rot[[t + 1]].repeat(size**2, 0), gd.HFOV
        )
        moved = np.stack([x.reshape(size, size) - spots, y.reshape(size, size) - spots[:, None]])
        moved = np.where(depth.reshape(size, size) > 1e-2, moved, 0).clip(-6 / size, 6 / size) * size
        moved = moved[:, : side * merge * patch, : side * merge * patch]
        parts = moved.reshape(2, side, merge, patch, side, merge, patch).mean((3, 6))
        pairs.append(parts.transpose(1, 3, 2, 4, 0).reshape(side * side, -1))
    return np.concatenate(pairs).astype(np.float32)


def sights(number):
    """A clip -> its video and two overlays of its things: patches, grid, covers, optical flow of each."""
    (clip, _), *_ = gd.toy_clip("train", number)[0]
    rng, names, frames = np.random.default_rng([SEED, number, 2]), [*clip["masks"], "sky"], clip["frames"]
    masks = np.stack(list(clip["masks"].values()))  # (things, T, H, W)
    sky = (gd.camera_rays(clip["rot"], masks.shape[2], gd.HFOV)[1] > 0) & ~masks.any(0)
    masks, nothing = np.concatenate([masks, sky[None]]), np.zeros(len(names))
    pairs = [covers(masks[:, start : start + 2], names, nothing) for start in range(0, len(frames), 2)]
    found = [(*patchify(frames, *PATCH), np.concatenate(pairs), flow(clip))]
    for frame in rng.integers(0, len(frames), 2):
        lit = np.eye(len(names))[names.index(rng.choice([*clip["static"], *clip["moving"]]))]
        image = gd.overlay(frames[frame], masks[lit.argmax(), frame], gd.ALPHA, gd.OVERLAY_COLOUR)
        cover = covers(masks[:, frame : frame + 1], names, lit)
        found.append(
            (*patchify(image[None], *PATCH), cover, np.zeros((len(cover), found[0][3].shape[1]), np.float32))
        )
    return found


def all_sights(count, constants):
    """The sights of the first clips, made by all workers."""
    with ProcessPoolExecutor(WORKERS, initializer=start_worker, initargs=[constants, {"SEED": SEED}]) as pool:
        return list(pool.map(sights, range(count), chunksize=20))


def train_eyes(parent, out, constants):
    """Teaches the visual encoder, by a linear head that is thrown away, what each visual token shows.

    A Qwen2.5-VL is not trained from blind eyes either: from the words of the answers alone the encoder told
    colours apart no better after 5,000 steps than at random.
    """
    count, steps, peak = EYES
    clips = all_sights(count, constants)
    torch.manual_seed(0)
    model = load_model(parent, K=0, pooling="grid")
    head = torch.nn.Linear(model.net.config.text_config.hidden_size, clips[0][0][2].shape[1])
    optimizer = torch.optim.AdamW([*model.net.model.visual.parameters(), *head.parameters()], lr=peak)
    for step in range(steps):
        chosen = np.random.default_rng([SEED, step]).integers(0, count, EYES_BATCH)
        some = [sight for number in chosen for sight in clips[number]]
        true = torch.from_numpy(np.concatenate([sight[2] for sight in some]))  # (N, classes)
        said = head(look(model, some))  # (N, classes)
        loss = F.binary_cross_entropy_with_logits(said, true)
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, 20, peak)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            said, shown = said[:, : len(gd.COLOURS)], true[:, : len(gd.COLOURS)]
            right = (said.argmax(1) == shown.argmax(1))[shown.amax(1) > 0.25].float().mean()
            least = F.binary_cross_entropy(true, true)  # cells covered in part keep it from zero
            print(f"eyes {step + 1}/{steps} | loss {loss:.4f}, at best {least:.4f} | colours {right:.3f}")
    centre(model, clips)
    model.net.save_pretrained(out)
    model.tok.save_pretrained(out)


def look(model, some):
    """Features (N, D) of the visual tokens of some sights."""
    return torch.cat(model.encode(torch.cat([sight[0] for sight in some]), [sight[1] for sight in some]))


@torch.no_grad()
def centre(model, clips):
    """Makes visual tokens as long as a final hidden state and takes off the direction they share.

    Eq. 6 compares the two, and what all tokens share would leave the cosine next to nothing to learn from.
    """
    last, features = (
        model.net.model.visual.merger.mlp[2],
        look(model, [s for clip in clips[:200] for s in clip]),
    )
    mean = features.mean(0)
    scale = len(mean) ** 0.5 / (features - mean).norm(dim=1).mean()
    last.weight *= scale
    last.bias.sub_(mean).mul_(scale)


def flow_code(shift):
    """Flow of tokens' patches (N, 8) in pixels -> (N, 10): squashed, to show slow things, and its mean."""
    return torch.cat([torch.tanh(shift / 0.8), shift.view(len(shift), -1, 2).mean(1) / 1.7], 1)


def train_flow(parent, out, steps, peak, constants):
    """Teaches the visual encoder to tell optical flow as well, without changing what `parent` reads in it.

    Told only what covers each token, it forgets how the picture moves between a token's two frames. Ten
    directions of the features, at right angles to those that tell the covers, are trained to be the flow's
    code; tokens with a thing in them weigh four times as much as others.
    """
    clips = all_sights(EYES[0], constants)
    torch.manual_seed(0)
    old, model = (load_model(parent, K=0, pooling="grid") for _ in range(2))
    some = [sight for clip in clips[:300] for sight in clip]
    with torch.no_grad():
        features, cover = look(old, some), torch.from_numpy(np.concatenate([sight[2] for sight in some]))
        features, cover = features - features.mean(0), cover - cover.mean(0)
        ridge = features.T @ features + 0.01 * len(features) * torch.eye(features.shape[1])
        spread, size, _ = torch.linalg.svd(torch.linalg.solve(ridge, features.T @ cover))
        told = (size > 0.02 * size[0]).sum()
        covering, rest = spread[:, :told], spread[:, told:]  # (D, n) each: where covers are told, and beside
        energy = (features @ covering).pow(2).mean()
        flowing = rest @ torch.linalg.qr(torch.randn(rest.shape[1], 10))[0]  # (D, 10)
    optimizer = torch.optim.AdamW(model.net.model.visual.parameters(), lr=peak)
    for step in range(steps):
        chosen = np.random.default_rng([SEED, step, 4]).integers(0, len(clips), EYES_BATCH)
        some = [sight for number in chosen for sight in clips[number]]
        cover, shift = (torch.from_numpy(np.concatenate([sight[n] for sight in some])) for n in (2, 3))
        weight = 1 + 3 * (cover[:, : len(gd.COLOURS)].sum(1) > 0.1).float()
        features = look(model, some)
        with torch.no_grad():
            before = look(old, some)
        changed = ((features - before) @ covering).pow(2).mean() / energy
        missed = weight @ (features @ flowing / FLOW_SIZE - flow_code(shift)).pow(2).mean(1) / weight.sum()
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, 20, peak)
        optimizer.zero_grad()
        (5 * changed + 2 * missed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            print(f"flow {step + 1}/{steps} | covers changed {changed:.4f} | flow missed {missed:.4f}")
    centre(model, clips)
    model.net.save_pretrained(out)
    model.tok.save_pretrained(out)


if __name__ == "__main__":
    constants = set_constants(globals())
    out, parent = Path(OUT), Path(OUT) / "random"
    make_rows(out / "rows", {name: constants[name] for name in ROWS_BY})
    if not parent.exists():
        make_network(out / "random.part", out / "rows", CONFIG, VOCAB)
        (out / "random.part").rename(parent)
    if not (out / "eyes").exists():
        train_eyes(parent, out / "eyes.part", constants)
        (out / "eyes.part").rename(out / "eyes")
    parent = out / "eyes"
    lines = (out / "rows" / "pretrain.jsonl").read_text().splitlines(keepends=True)
    tagged = [(line, kinds_of(line)) for line in lines]
    for name, kinds, steps, lr, supervise in STAGES:
        steps = min(steps, MOST_STEPS or steps)
        if not kinds:
            if not (out / name).exists():
                train_flow(parent, out / f"{name}.part", steps, lr, constants)
                (out / f"{name}.part").rename(out / name)
        elif not (out / name / f"step_{steps:06d}" / "config.json").exists():
            data = out / "rows" / f"stage_{name}.jsonl"
            data.write_text("".join(line for line, tags in tagged if tags & set(kinds.split())))
            how = {"MODEL": parent, "DATA": data, "OUT": out / name, "STEPS": steps, "LR": lr}
            how |= {"SUPERVISE": supervise, "K": 0, "TRAIN_VISION": False, "CACHE_FEATURES": True}
            how |= {"EVAL_EVERY": 0, "TEST_ROWS": 0, "GLOBAL_BATCH": GLOBAL_BATCH, "MICRO_BATCH": MICRO_BATCH}
            how |= {"BETA2": 0.999}  # the bundled base was made with it
            how |= {"SAVE_EVERY": SAVE_EVERY, "LOG_EVERY": LOG_EVERY}
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={PROCESSES}"]
            command += [
                str(gd.ASSETS.with_name("dift.py")),
                *(f"{key}={value}" for key, value in how.items()),
            ]
            done = subprocess.run(command)
            check(
                done.returncode == 0, f"The stage {name} failed, see above; the same command goes on there."
            )
        parent = out / name
    print(f"Made {parent}. Measure it: python tests/measure_base.py MODEL={parent} DATA={out / 'rows'}")
