"""Measures the tiny base on held-out clips: grounding words, option letters, and motion (to be at chance).

    python tests/measure_base.py MODEL=assets/tiny DATA=out/tiny/rows

Prints a line each for x, y, size words ("track"), letters of "pick the option that says", and the motion
questions of test_imagery.jsonl, with the number of items and the 95 % interval.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluate import evaluate, wilson
from model import Images, encode_row, generate, load_model, read_rows, set_constants

MODEL = "assets/tiny"  # a base made by dift.py with K=0, or any checkpoint
DATA = "out/tiny/rows"  # folder with pretrain_test.jsonl and test_imagery.jsonl
LIMIT = 200  # rows of each kind at most
BATCH = 50  # rows answered at once


def answers(model, rows, max_new, batch):
    """Greedy answers as text, in row order."""
    images = Images(model, cache=True)
    texts = []
    for start in range(0, len(rows), batch):
        samples = [encode_row(model, row, answer=False) for row in rows[start : start + batch]]
        texts += [made["text"] for made in generate(model, samples, max_new, images=images)]
    return texts


def tracks(text):
    """ "green box: left top tiny, ..." lines -> {name: [words of each frame pair]}."""
    inside = re.search(r"<answer>(.*?)(</answer>|$)", text, flags=re.S)
    lines = inside.group(1).split("\n") if inside else []
    pairs = (line.split(": ", 1) for line in lines if ": " in line)
    return {name: [part.split() for part in track.split(", ")] for name, track in pairs}


def word_hits(rows, texts):
    """(right, all) of x, y and size words over all things and frame pairs, the horizon aside."""
    hits = {"x": [0, 0], "y": [0, 0], "size": [0, 0]}
    for row, text in zip(rows, texts):
        given = tracks(text)
        for name, track in tracks(row["text_output"]).items():
            for pair, words in enumerate(track):
                if name == "horizon" or len(words) != 3:
                    continue
                said = given.get(name, [])
                said = said[pair] if pair < len(said) else []
                for place, kind in enumerate(hits):
                    hits[kind][0] += len(said) == 3 and said[place] == words[place]
                    hits[kind][1] += 1
    return hits


def letter(text):
    """The option letter that an answer starts with: "B. yellow" -> "B"; None if it does not."""
    found = re.search(r"<answer>([A-F])\.", text)
    return found.group(1) if found else None


def show(name, right, count):
    """One line of the table; of a kind that the data does not hold it says so."""
    if count == 0:
        print(f"{name:24} none in DATA", flush=True)
        return
    low, high = wilson(right, count)
    print(
        f"{name:24} {100 * right / count:5.1f} % of {count:5d}   ({100 * low:.1f} - {100 * high:.1f})",
        flush=True,
    )


if __name__ == "__main__":
    set_constants(globals())
    model = load_model(MODEL, K=0, pooling="grid")
    rows = read_rows(Path(DATA) / "pretrain_test.jsonl")
    kinds = {kind: [r for r in rows if r["subtask"] == kind][:LIMIT] for kind in ("grounding", "options")}
    for kind, (right, count) in word_hits(
        kinds["grounding"], answers(model, kinds["grounding"], 200, BATCH)
    ).items():
        show(f"grounding, {kind} words", right, count)
    given = answers(model, kinds["options"], 60, BATCH)  # none without rows
    pairs = [(letter(row["text_output"]), letter(text)) for row, text in zip(kinds["options"], given)]
    show("options, letters", sum(key == said for key, said in pairs), len(pairs))
    motion = read_rows(Path(DATA) / "test_imagery.jsonl")
    for name, score in evaluate(model, motion, how={"max_new": 120}, limit=LIMIT)["scores"].items():
        show(f"motion, {name}", score["correct"], score["n"])
