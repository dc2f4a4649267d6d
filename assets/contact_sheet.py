"""A contact sheet: rows of a jsonl as one picture, to be looked at before a training run.

    python assets/contact_sheet.py DATA=out/toy/train_imagery.jsonl ROWS=4 OUT=sheet.png

Each row shows its frames with their times, its overlays, question, options, answer and chain of thought.
generate_data.py draws one with INSPECT=n.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import read_rows, set_constants

DATA = "out/toy/train_imagery.jsonl"  # any jsonl of DIFT or 4DRL rows with frames
ROWS = 4  # rows drawn, evenly spaced over the file
OUT = "sheet.png"  # the picture
WIDTH, SIDE, LINE = 1280, 160, 14  # pixels: of the sheet, of a picture's place, of a line of text


def strip(row):
    """A row -> its picture (H, WIDTH, 3) uint8."""
    marks = [f"{time:g} s" for time in row["times"]] + ["imagined"] * len(row["image_output"])
    parts = [row["id"], *row["text_input"].split("\n"), *row["text_output"].split("\n"), f"key: {row['key']}"]
    lines = [line for part in parts for line in textwrap.wrap(part, WIDTH // 7)]
    frames = [Image.open(name).convert("RGB") for name in row["image_input"] + row["image_output"]]
    for frame in frames:
        frame.thumbnail((SIDE - 4, SIDE - 4))
    across, down = WIDTH // SIDE, LINE + 4 + max((frame.height for frame in frames), default=0)
    height = down * -(-len(marks) // across)
    picture = Image.new("RGB", (WIDTH, height + LINE * len(lines) + 20), "white")
    draw = ImageDraw.Draw(picture)
    for n, (frame, mark) in enumerate(zip(frames, marks)):
        x, y = n % across * SIDE, n // across * down
        picture.paste(frame, (x, y + LINE))
        draw.text((x, y), mark, "black")
    draw.multiline_text((0, height), "\n".join(lines), "black", spacing=2)
    return np.asarray(picture)


def draw(data, out, count):
    """Writes `count` rows of a jsonl, or all if there are fewer, as one picture."""
    rows = read_rows(data)
    chosen = [rows[n * len(rows) // count] for n in range(count)] if count < len(rows) else rows
    Image.fromarray(np.concatenate([strip(row) for row in chosen])).save(out)


if __name__ == "__main__":
    set_constants(globals())
    draw(DATA, OUT, ROWS)
