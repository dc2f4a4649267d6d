"""A contact sheet: rows of a jsonl as one picture, with frames, overlays and texts."""

import math
import textwrap

import numpy as np
from PIL import Image, ImageDraw

from lib.pictures import open_image
from lib.rows import read_rows

WIDTH, SIDE, LINE = 1280, 160, 14  # pixels: of the sheet, of a picture's place, of a line of text


def draw_row(row):
    """A row -> its picture (H, WIDTH, 3) uint8."""
    captions = [f"{time:g} s" for time in row.times] + ["imagined" for _ in row.image_output]
    frames = [open_image(path, row.source) for path in row.image_input + row.image_output]
    for frame in frames:
        frame.thumbnail((SIDE - 4, SIDE - 4))
    paragraphs = [row.id, *row.text_input.split("\n"), *row.text_output.split("\n"), f"key: {row.key}"]
    lines = []
    for paragraph in paragraphs:
        lines += textwrap.wrap(paragraph, WIDTH // 7)

    # Pictures in lines of `across`, their captions above them, all text below.
    across = WIDTH // SIDE
    down = LINE + 4 + max((frame.height for frame in frames), default=0)
    height = down * math.ceil(len(frames) / across)
    picture = Image.new("RGB", (WIDTH, height + LINE * len(lines) + 20), "white")
    draw = ImageDraw.Draw(picture)
    for number, (frame, caption) in enumerate(zip(frames, captions)):
        x = number % across * SIDE
        y = number // across * down
        picture.paste(frame, (x, y + LINE))
        draw.text((x, y), caption, "black")
    draw.multiline_text((0, height), "\n".join(lines), "black", spacing=2)
    return np.asarray(picture)


def draw_sheet(data, out, count):
    """Writes `count` rows of a jsonl, evenly spaced, or all if there are fewer, as one picture."""
    rows = read_rows(data)
    if count < len(rows):
        rows = [rows[number * len(rows) // count] for number in range(count)]
    Image.fromarray(np.concatenate([draw_row(row) for row in rows])).save(out)
