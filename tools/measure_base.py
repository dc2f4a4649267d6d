"""Measures the tiny base on held-out clips: grounding words, option letters, and motion (to be at chance).

    python -m tools.measure_base MODEL=assets/tiny DATA=out/tiny/rows

Prints a line each for x, y, size words ("track"), letters of "pick the option that says", the share of the
visual tokens' variance that is their place, and the motion questions of test_imagery.jsonl, with the number
of items and the 95 % interval. A letter is right if it is the key's. It is bound if it is that of the option
that the answer itself names, be it the asked one or not; answers that name no option do not count there.
"""

import re
from pathlib import Path

import torch

from evaluate import Settings, evaluate
from lib.command_line import override_constants
from lib.place import place_directions
from lib.rows import read_options, read_rows
from lib.scores import wilson_interval
from model import VisionCache, encode_row, generate, load_model

MODEL = "assets/tiny"  # a base made by dift.py with K=0, or any checkpoint
DATA = "out/tiny/rows"  # folder with pretrain_test.jsonl and test_imagery.jsonl
LIMIT = 200  # >= 1; rows of each kind at most
BATCH = 50  # >= 1; rows answered at once


def answers(model, rows, max_new, batch):
    """Greedy answers as text, in row order."""
    vision = VisionCache(model)
    texts = []
    for start in range(0, len(rows), batch):
        samples = [encode_row(model, row, answer=False) for row in rows[start : start + batch]]
        texts += [completion.text for completion in generate(model, samples, max_new, vision)]
    return texts


def tracks(text):
    """ "green box: left top tiny, ..." lines -> {name: [words of each frame pair]}."""
    inside = re.search(r"<answer>(.*?)(</answer>|$)", text, flags=re.S)
    lines = inside.group(1).split("\n") if inside else []
    pairs = (line.split(": ", 1) for line in lines if ": " in line)
    return {name: [part.split() for part in track.split(", ")] for name, track in pairs}


def word_hits(rows, texts):
    """{kind: [right, all]} of x, y and size words over all things and frame pairs, the horizon aside."""
    hits = {"x": [0, 0], "y": [0, 0], "size": [0, 0]}
    for row, text in zip(rows, texts):
        answered = tracks(text)
        for name, track in tracks(row.text_output).items():
            for pair, words in enumerate(track):
                # a hidden thing has one word
                if name == "horizon" or len(words) != 3:
                    continue
                found = answered.get(name, [])
                found = found[pair] if pair < len(found) else []
                for place, kind in enumerate(hits):
                    hits[kind][0] += len(found) == 3 and found[place] == words[place]
                    hits[kind][1] += 1
    return hits


def letter(text):
    """The option letter that an answer starts with: "B. yellow" -> "B"; None if it does not."""
    found = re.search(r"<answer>([A-F])\.", text)
    return found.group(1) if found else None


def bound_letters(rows, texts):
    """[whether the letter is that of the words beside it] of the answers whose words are an option."""
    bound = []
    for row, text in zip(rows, texts):
        options = read_options(row.text_input)
        found = re.search(r"<answer>([A-F])\. (.*?)</answer>", text)
        if found and found.group(2) in options.values():
            bound.append(options.get(found.group(1)) == found.group(2))
    return bound


def show(name, right, count):
    """One line of the table; of a kind that the data does not hold it says so."""
    if count == 0:
        print(f"{name:24} none in DATA", flush=True)
        return
    low, high = wilson_interval(right, count)
    interval = f"({100 * low:.1f} - {100 * high:.1f})"
    print(f"{name:24} {100 * right / count:5.1f} % of {count:5d}   {interval}", flush=True)


def main():
    """Prints the table."""
    c = override_constants(globals())
    model = load_model(c.MODEL, K=0, pooling="grid")
    rows = read_rows(Path(c.DATA) / "pretrain_test.jsonl")

    # words of "track" rows
    grounding = [row for row in rows if row.subtask == "grounding"][: c.LIMIT]
    hits = word_hits(grounding, answers(model, grounding, 200, c.BATCH))
    for kind, (right, count) in hits.items():
        show(f"grounding, {kind} words", right, count)

    # letters of "pick the option that says"
    options = [row for row in rows if row.subtask == "options"][: c.LIMIT]
    texts = answers(model, options, 60, c.BATCH)
    right = sum(letter(row.text_output) == letter(text) for row, text in zip(options, texts))
    show("options, letters", right, len(options))
    bound = bound_letters(options, texts)
    show("options, bound letters", sum(bound), len(bound))

    # how much of a visual token is its place
    vision = VisionCache(model)
    vision.encode_missing([tuple(row.image_input) for row in grounding], rows[0].source)
    entries = list(vision.store.values())
    cells = len(entries[0].features) // entries[0].grid[0]
    _, _, share = place_directions(torch.cat([entry.features for entry in entries]), cells)
    print(f"{'variance that is place':24} {100 * share:5.1f} % of {len(entries):5d} clips", flush=True)

    # questions about motion, which the base has never been told about
    motion = read_rows(Path(c.DATA) / "test_imagery.jsonl")
    scores = evaluate(model, motion, settings=Settings(max_new=120), limit=c.LIMIT)["scores"]
    for name, score in scores.items():
        show(f"motion, {name}", score["correct"], score["n"])


if __name__ == "__main__":
    main()
