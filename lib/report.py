"""What a person looks at: frames, imagery read out as pixels, picture.png, report.html with its curves."""

import base64
import functools
import html
import io
import json
import math
import re
import string
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lib.files import evenly_spaced
from lib.rows import LATENT_BLOCK, Row
from lib.scores import Result, as_percent, describe_summary, subtasks_in_order

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
# fields of a training log that are drawn as curves
CURVES = "loss ce sim cosine retrieval object gnorm lr reward acc fmt holdout length kl entropy".split()
FRAME_WIDTH = 194  # pixels
FRAMES = 8  # frames drawn of a video at most, evenly spaced
ACROSS = 8  # key frames in a line at most
KINDS = ("true overlay", "readout of it", "imagined")  # of a key frame's images


@dataclass
class Drawing:
    """An answered question as images."""

    row: Row  # as the model saw it
    result: Result
    frames: list  # images
    blocks: list  # {one of KINDS: image} for each imagined block, of those that there are


# ---------------------------------------------------------------- images


def labelled_image(path, width, label):
    """An image scaled to a width, with a label."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image = ImageOps.scale(image, width / image.width, Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(image)
    pen.text((5, 2), label, "white", font_size=24, stroke_width=2, stroke_fill="black")
    return image


def text_image(text, width, size=18, colour="black"):
    """Text wrapped to a width, as an image on white."""
    font = ImageFont.load_default(size)
    lines = []
    for part in text.split("\n"):
        # as many letters as fit, were all of them as wide as the mean of this text's
        letter = font.getlength(part) / max(len(part), 1)
        lines += textwrap.wrap(part, max(8, int(0.95 * width / max(letter, 1))))
    height = round(1.3 * size)
    image = Image.new("RGB", (width, height * len(lines)), "white")
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        pen.text((0, number * height), line, colour, font=font)
    return image


def stack_images(images, down=True, gap=4):
    """Images under one another, or side by side, on white."""
    widths = [image.width for image in images]
    heights = [image.height for image in images]
    gaps = gap * (len(images) - 1)
    size = (max(widths), sum(heights) + gaps) if down else (sum(widths) + gaps, max(heights))
    sheet = Image.new("RGB", size, "white")
    offset = 0
    for image in images:
        sheet.paste(image, (0, offset) if down else (offset, 0))
        offset += gap + (image.height if down else image.width)
    return sheet


def key_times(row):
    """A label for each key frame of a row: its second, or where that is not known its number."""
    if row.overlay_frames and row.image_input:
        return [f"{row.times[frame]:g} s" for frame in row.overlay_frames if frame < len(row.times)]
    return [str(number) for number in range(1, len(row.image_output) + 1)]


def draw_block(row, number, imagined, true, readout):
    """The images of a row's block, by kind: latents imagined (K, D), true (m, K, D), Readout or None."""
    images = {}
    size = (FRAME_WIDTH, FRAME_WIDTH)
    if number < len(row.image_output):
        label = dict(enumerate(key_times(row))).get(number, "")
        overlay = labelled_image(row.image_output[number], FRAME_WIDTH, label)
        images[KINDS[0]] = overlay
        size = overlay.size
    elif row.image_input:
        # one block too many has the shape of a frame
        size = labelled_image(row.image_input[0], FRAME_WIDTH, "").size
    if readout and number < len(true):
        images[KINDS[1]] = readout.draw(true[number], size)
    if readout:
        images[KINDS[2]] = readout.draw(imagined, size)
    return images


def draw_answer(row, result, true, readout=None):
    """A row as the model saw it, its result with latents (n, K, D), the true ones (m, K, D) -> Drawing."""
    blocks = []
    for number, imagined in enumerate(result.latents):
        blocks.append(draw_block(row, number, imagined, true, readout))
    shown = evenly_spaced(list(zip(row.image_input, row.times)), FRAMES)
    frames = [labelled_image(path, FRAME_WIDTH, f"{time:g} s") for path, time in shown]
    return Drawing(row, result, frames, blocks)


def draw_blocks(blocks, width, kinds=KINDS, most=ACROSS):
    """Key frames side by side, at most so many, a line for each kind -> images within the width.

    More of them are drawn in several such groups of lines, alike in length.
    """
    groups = max(1, math.ceil(len(blocks) / most))
    across = max(1, math.ceil(len(blocks) / groups))
    images = []
    for start in range(0, len(blocks), across):
        group = blocks[start : start + across]
        for kind in kinds:
            line = [block[kind] for block in group if kind in block]
            if line:
                label = text_image(kind, width, 15, "dimgray")
                images.append(stack_images([label, fit_line(line, across, width)], gap=1))
    return images


def fit_line(images, across, width, gap=4):
    """Images side by side, made smaller where `across` of them would be wider than the width."""
    each = min(FRAME_WIDTH, (width - gap * (across - 1)) // across)
    images = [ImageOps.scale(image, each / image.width, Image.Resampling.BICUBIC) for image in images]
    return stack_images(images, down=False, gap=gap)


def draw_picture(drawings):
    """Drawings side by side: two lines of frames, question and answer, the key frames of each kind."""
    width = 4 * FRAME_WIDTH + 3 * 4
    columns = []
    for drawing in drawings:
        frames = [drawing.frames[:4], drawing.frames[4:]]
        lines = [stack_images(images, down=False) for images in frames if images]
        question = drawing.row.text_input.split("\n")[0]
        lines.append(text_image(f"{question}\n{verdict(drawing.row, drawing.result)}", width))
        columns.append(stack_images([*lines, *draw_blocks(drawing.blocks, width)], gap=10))
    return stack_images(columns, down=False, gap=40)


# ---------------------------------------------------------------- the page


@functools.cache
def template_parts():
    """The parts of the page's template, by name."""
    page = TEMPLATE.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- part (\w+) -->\n(.*?)<!-- end -->", page, flags=re.S))


def fill_part(part, as_html=None, /, **fields):
    """A part of the template with its $fields: those in `as_html` are HTML already, others get escaped."""
    values = {name: html.escape(str(value)) for name, value in fields.items()}
    values.update(as_html or {})
    return string.Template(template_parts()[part]).substitute(values)


def embed_image(name, image):
    """An image inside the page itself."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return fill_part("image", name=name, bytes=base64.b64encode(file.getvalue()).decode())


def curve(name, entries):
    """One logged field as a line of SVG; nothing where it has fewer than two finite values."""
    points = []
    for entry in entries:
        value = entry.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            points.append((entry["step"], value))
    points = evenly_spaced(points, 400)
    if len(points) < 2:
        return ""
    steps, values = zip(*points)
    # y points down in SVG
    width = steps[-1] - steps[0]
    height = max(np.ptp(values), 1e-9)
    box = f"{steps[0]} {-max(values):.6g} {width} {height:.6g}"
    line = " ".join(f"{step},{-value:.6g}" for step, value in points)
    return fill_part("curve", name=name, box=box, points=line, steps=steps[-1], last=f"{values[-1]:.3g}")


def verdict(row, result):
    """The key and the answer as one line."""
    options = {letter: f"{letter}. {text}" for letter, text in row.options.items()}
    answered = f"answered: {options.get(result.answer, 'nothing')}"
    if not result.key:
        return answered
    keys = " or ".join(options[letter] for letter in result.key)
    return f"Key: {keys} | {answered}"


def answer_html(text, blocks):
    """An answer's text as HTML, the images of its latent blocks where these stand."""
    text = text.removesuffix("<|im_end|>").strip()
    pieces = []
    end = 0
    for number, block in enumerate(LATENT_BLOCK.finditer(text)):
        before = text[end : block.start()]
        pieces.append(html.escape(before.strip() if end else before.rstrip()))
        if number < len(blocks) and blocks[number]:
            images = [
                fill_part("key_image", {"image": embed_image(kind, image)}, kind=kind)
                for kind, image in blocks[number].items()
            ]
            pieces.append(fill_part("imagery", {"images": "".join(images)}))
        else:
            pieces.append(" [imagery] ")
        end = block.end()
    rest = text[end:]
    pieces.append(html.escape(rest.lstrip() if end else rest))
    return "".join(pieces)


def sample_card(drawing):
    """One question, its frames, and the answer's text with images where the latent blocks are."""
    row = drawing.row
    result = drawing.result
    mark = "asked"
    if result.key:
        mark = "right" if result.correct else "wrong"
    as_html = {
        "frames": "".join(embed_image("frame", image) for image in drawing.frames),
        "answer": answer_html(result.text, drawing.blocks),
    }
    return fill_part(
        "sample",
        as_html,
        mark=mark,
        subtask=result.subtask,
        source=result.source,
        question=row.text_input,
        verdict=verdict(row, result),
    )


def make_page(summary, drawings, entries):
    """The whole page, self-contained: images and curves inside, no script, nothing fetched.

    entries: of the training run's log, for the curves.
    """
    scores = summary.get("scores", {})
    subtasks = subtasks_in_order([drawing.result for drawing in drawings])
    facts = describe_summary(summary) if scores else []
    facts = [*summary.get("notes", []), *facts]
    parts = {
        "facts": [fill_part("fact", text=line) for line in facts],
        "bars": [fill_part("bar", name=name, **as_percent(score)) for name, score in scores.items()],
        "filters": [fill_part("filter", name=name) for name in subtasks],
        "curves": [curve(name, entries) for name in CURVES],
        "samples": [sample_card(drawing) for drawing in drawings],
    }
    as_html = {name: "".join(pieces) for name, pieces in parts.items()}
    return fill_part("page", as_html, settings=json.dumps(summary["settings"]))
