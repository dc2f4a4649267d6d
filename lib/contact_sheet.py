"""A contact sheet: rows of a jsonl as one picture, with frames, overlays and texts."""

import json
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lib.pictures import open_image
from lib.rows import read_rows

WIDTH, SIDE, LINE = 1280, 160, 14  # pixels: of the sheet, of a picture's place, of a caption
TEXT_LINE = 17  # pixels; of a line of text
LETTERS = 170  # of a line of text
GREEN, GREY = (0, 140, 60), (190, 190, 190)  # of the key, of the line between two rows


def draw_row(row):
    """A row -> its picture (H, WIDTH, 3) uint8: the frames, then the overlays, then all text."""
    frames = open_small(row.image_input, row.source)
    overlays = open_small(row.image_output, row.source)
    if overlays and row.subtask == "object_box":
        draw_key_box(row, overlays[-1])
    strips = [(frames, [f"{time:g} s" for time in row.times]), (overlays, ["imagined" for _ in overlays])]
    parts = [draw_strip(*strip) for strip in strips if strip[0]]
    parts.append(draw_text(describe_row(row)))
    return np.concatenate(parts)


def open_small(paths, source):
    """Image files -> images that fit into their places on the sheet."""
    images = [open_image(path, source) for path in paths]
    for image in images:
        image.thumbnail((SIDE - 4, SIDE - 4))
    return images


def draw_key_box(row, image):
    """Draws the key's box, which is in pixels of the frames, onto a smaller overlay."""
    x1, y1, x2, y2 = np.array(json.loads(row.options[row.key])) * image.width / frame_width(row)
    ImageDraw.Draw(image).rectangle([x1, y1, x2 - 1, y2 - 1], outline=GREEN)


def frame_width(row):
    """Width of a row's frames as they are stored, pixels."""
    return open_image(row.image_input[0], row.source).width


def draw_strip(images, captions):
    """Images in lines, their captions above them -> (H, WIDTH, 3) uint8."""
    across = WIDTH // SIDE
    down = LINE + 4 + max(image.height for image in images)
    lines = -(-len(images) // across)
    strip = Image.new("RGB", (WIDTH, down * lines), "white")
    draw = ImageDraw.Draw(strip)
    for number, (image, caption) in enumerate(zip(images, captions)):
        x = number % across * SIDE
        y = number // across * down
        strip.paste(image, (x, y + LINE))
        draw.text((x, y), caption, "black")
    return np.asarray(strip)


def describe_row(row):
    """A row -> [(paragraph, is it the key's)]: question, options, confidence, reasoning."""
    paragraphs = []
    for line in row.text_input.split("\n"):
        is_key = bool(row.key) and line.startswith(f"{row.key}. ")
        if line:
            paragraphs.append((f"{line}  <- the key" if is_key else line, is_key))
    scores = ", ".join(f"{name} {score}" for name, score in row.confidence.items())
    if scores:
        paragraphs.append((f"Confidence, 0 to 1: {scores}", False))
    paragraphs += [(line, False) for line in row.text_output.split("\n") if line]
    paragraphs.append((f"{row.id} | {row.subtask} | key: {row.key}", False))
    return paragraphs


def draw_text(paragraphs):
    """[(paragraph, is it the key's)] -> (H, WIDTH, 3) uint8, with a line below that ends the row."""
    lines = []
    for paragraph, is_key in paragraphs:
        lines += [(line, is_key) for line in textwrap.wrap(paragraph, LETTERS)]
    picture = Image.new("RGB", (WIDTH, TEXT_LINE * len(lines) + 22), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    for number, (line, is_key) in enumerate(lines):
        draw.text((4, TEXT_LINE * number), line, GREEN if is_key else "black", font=font)
    draw.line([0, picture.height - 11, WIDTH, picture.height - 11], GREY)
    return np.asarray(picture)


def draw_sheet(data, out, count):
    """Writes `count` rows of a jsonl, evenly spaced, or all if there are fewer, as one picture."""
    rows = read_rows(data)
    if count < len(rows):
        rows = [rows[number * len(rows) // count] for number in range(count)]
    Image.fromarray(np.concatenate([draw_row(row) for row in rows])).save(out)
