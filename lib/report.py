"""What a person looks at: frames, heat maps of the imagery, picture.png, and report.html with its curves."""

import base64
import functools
import html
import io
import json
import math
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps

from lib.files import evenly_spaced
from lib.rows import LATENT_BLOCK, Row
from lib.scores import Result, as_percent, describe_summary, subtasks_in_order

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
# fields of a training log that are drawn as curves
CURVES = "loss ce sim cosine retrieval gnorm lr reward acc fmt holdout length kl entropy".split()
FRAME_WIDTH = 194  # pixels
MAP_WIDTH = 128  # pixels
FRAMES = 8  # frames drawn of a video at most, evenly spaced
PAIRS = 4  # heat maps drawn in a line at most, evenly spaced
COLOURS = {"black": "#260c51", "mid": "#21918c", "white": "#fde725"}  # of heat, low to high


@dataclass
class Drawing:
    """An answered question as images."""

    row: Row  # as the model saw it
    result: Result
    frames: list  # images
    blocks: list  # a list of images for each imagined block: the true overlay, heat maps


# ---------------------------------------------------------------- images


def labelled_image(path, width, label, heat=None):
    """An image scaled to a width, with a label; in grey under its heat map (h, w) in 0..1 if there is one."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image = ImageOps.scale(image, width / image.width, Image.Resampling.LANCZOS)
    if heat is not None:
        heat = Image.fromarray((255 * heat).astype(np.uint8))
        heat = heat.resize(image.size, Image.Resampling.NEAREST)
        grey = image.convert("L").convert("RGB")
        image = Image.blend(grey, ImageOps.colorize(heat, **COLOURS), 0.6)
    pen = ImageDraw.Draw(image)
    pen.text((5, 2), label, "white", font_size=24, stroke_width=2, stroke_fill="black")
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


def heat_maps(blocks, tokens, common):
    """Where and when a video looks like latent blocks: (m, K, D), (t, h, w, D), (K, D) -> (m, t, h, w).

    Unit vectors less what the clip has in common (`common` per latent index, the mean over time per place):
    their inner product, the largest over K. So what stays the same is dark; each of the m maps spans 0 to 1.
    """
    blocks = F.normalize(blocks, dim=-1) - common
    tokens = F.normalize(tokens, dim=-1)
    tokens = tokens - tokens.mean(dim=0)
    maps = torch.einsum("mkd,thwd->mthwk", blocks, tokens).amax(dim=-1)
    maps = maps - maps.amin(dim=(1, 2, 3), keepdim=True)
    return maps / maps.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def video_tokens(model, vision, row):
    """Visual tokens of a row's video (t, h, w, D), and the mean of its frame pairs as latents (K, D)."""
    video = tuple(row.image_input)
    vision.encode_missing([video], row.source)
    entry = vision.store[video]
    t, h, w = entry.grid
    pairs = entry.features.float().chunk(t)  # (N, D) each
    pooled = [model.pool(pair.to(model.device), (1, h, w)).cpu() for pair in pairs]
    common = F.normalize(torch.stack(pooled), dim=-1).mean(dim=0)  # (K, D)
    merge = model.config.vision_config.spatial_merge_size
    return torch.stack(pairs).unflatten(1, (h // merge, -1)), common


def draw_block(row, maps, overlays):
    """The true overlay, if any, and the heat maps (1 or 2, t, h, w) of the imagined and the true latents."""
    pair = math.ceil(len(row.image_input) / maps.shape[1])  # frames of a pair
    lines = []
    for name, line in zip(("made", "true"), maps.numpy()):
        shown = evenly_spaced(list(zip(row.image_input[::pair], row.times[::pair], line)), PAIRS)
        images = [labelled_image(path, MAP_WIDTH, f"{name} {time:g} s", heat) for path, time, heat in shown]
        lines.append(stack_images(images, down=False))
    drawn = [labelled_image(path, 2 * MAP_WIDTH + 4, "true overlay") for path in overlays]
    return [*drawn, stack_images(lines)]


def draw_answer(model, vision, row, result, true):
    """A row as the model saw it, its result with latents (n, K, D), the true ones (m, K, D) -> Drawing."""
    blocks = []
    if row.image_input and len(result.latents):
        tokens, common = video_tokens(model, vision, row)
        for number, imagined in enumerate(result.latents):
            own = slice(number, number + 1)  # empty where more blocks are imagined than are true
            maps = heat_maps(torch.cat([imagined[None], true[own]]), tokens, common)
            blocks.append(draw_block(row, maps, row.image_output[own]))
    shown = evenly_spaced(list(zip(row.image_input, row.times)), FRAMES)
    frames = [labelled_image(path, FRAME_WIDTH, f"{time:g} s") for path, time in shown]
    return Drawing(row, result, frames, blocks)


def draw_picture(drawings):
    """Drawings side by side: two lines of frames, then a line for each imagined block."""
    columns = []
    for drawing in drawings:
        lines = [drawing.frames[:4], drawing.frames[4:], *drawing.blocks]
        lines = [stack_images(images, down=False) for images in lines if images]
        columns.append(stack_images(lines, gap=12))
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
        if number < len(blocks):
            images = "".join(embed_image("imagery", image) for image in blocks[number])
            pieces.append(fill_part("imagery", {"images": images}))
        else:
            pieces.append(" [imagery] ")
        end = block.end()
    rest = text[end:]
    pieces.append(html.escape(rest.lstrip() if end else rest))
    return "".join(pieces)


def sample_card(drawing):
    """One question, its frames, and the answer's text with heat maps where the latent blocks are."""
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
