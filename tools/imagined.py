"""A sheet of held-out questions: for each key frame the true overlay, and under it what was imagined.

    python -m tools.imagined MODEL=out/dift DATA=out/toy N=20 OUT=imagined.png SUBTASKS=object

So a person can count in how many the right thing is at the right place. Prints the same count by object@1:
imagined latents nearer to the true overlay of their thing than to those of others at that moment.
"""

import random

from evaluate import Settings, TrueLatents, answer, plan_batches
from lib.benchmarks import read_benchmark
from lib.command_line import override_constants, require
from lib.distributed import init_distributed
from lib.imagery import compare_blocks, learn_readout, split_rows
from lib.report import KINDS, draw_answer, draw_blocks, stack_images, text_image, verdict
from lib.rows import read_twin
from lib.videos import attach_video_rows
from model import load_model

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint
DATA = "out/toy"  # folder with test_imagery.jsonl, or one jsonl file
VIDEOS = ""  # folder that the paths of videos start from
CACHE = "out/frames"  # folder for the frames of decoded videos; may be deleted
OUT = "imagined.png"  # the picture
# --- data
SUBTASKS = ""  # how the names of the subtasks begin; "": all
N = 20  # >= 1; questions, drawn at random
FPS = 1.0  # > 0, <= 1e3; frames a second of a video (release)
MAX_FRAMES = 50  # >= 1; of a video, evenly spaced where there are more (release)
# --- model
MAX_NEW = 512  # >= 1; new positions of an answer at most, latents included
# --- logging
READOUT = 3000  # >= 2; overlays that the readout is fitted on, at most
# --- system
BATCH = 64  # >= 1; questions answered at once
FAST = True  # False: exactly the code of model.py, the same numbers
SEED = 0  # >= 0; of the questions

WIDTH = 1280  # >= 100; pixels, of the sheet
ACROSS = 10  # >= 1; key frames in a line at most


def choose_rows(rows, train_rows, subtasks, count, seed):
    """Rows that the readout is fitted on, and indices of `count` others with overlays, at random."""
    indices = []
    for index, row in enumerate(rows):
        if row.image_output and row.subtask.startswith(subtasks) and not row.skip_reason:
            indices.append(index)
    fitted, shown = split_rows(rows, train_rows, indices)
    require(shown, f"SUBTASKS={subtasks}: no question of DATA has such a subtask, and overlays.")
    chosen = random.Random(seed).sample(shown, min(count, len(shown)))
    return fitted, sorted(chosen)


def draw_strip(row, result, true, readout):
    """A question with its answer in words, and two lines of key frames -> image."""
    drawing = draw_answer(row, result, true, readout)
    hits = [block["object"] for block in result.imagery if "object" in block]
    said = f"{row.id} | {row.text_input.splitlines()[0]}\n{verdict(row, result)}"
    if hits:
        said += f" | object@1 {sum(hits)} of {len(hits)}"
    lines = draw_blocks(drawing.blocks, WIDTH, (KINDS[0], KINDS[2]), ACROSS)
    return stack_images([text_image(said, WIDTH), *lines])


def describe_hits(results):
    """In how many answers object@1 hits at each key frame that was compared, and at the last one."""
    hits = []
    for result in results:
        own = [block["object"] for block in result.imagery if "object" in block]
        if own:
            hits.append(own)
    everywhere = sum(all(own) for own in hits)
    last = sum(own[-1] for own in hits)
    n = len(hits)
    return f"object@1 hits at all key frames in {everywhere} of {n}, at the last one in {last} of {n}"


if __name__ == "__main__":
    c = override_constants(globals())
    rank, world, device = init_distributed()
    rows = read_benchmark("toy", c.DATA)
    attach_video_rows(rows, c.VIDEOS, rank, world, cache=c.CACHE, fps=c.FPS, most=c.MAX_FRAMES)
    fitted, chosen = choose_rows(rows, read_twin(c.DATA), c.SUBTASKS, c.N, c.SEED)
    model = load_model(c.MODEL, device, fast=c.FAST)
    readout = learn_readout(TrueLatents(model, fitted), fitted, c.READOUT)
    require(readout, f"MODEL={c.MODEL} imagines nothing, or DATA has no overlays to fit the readout on.")

    # greedy answers, compared and drawn
    truth = TrueLatents(model, rows)
    settings = Settings(max_new=c.MAX_NEW, batch=c.BATCH)
    results = []
    for batch in plan_batches(rows, chosen, c.BATCH):
        results += answer(model, rows, batch, settings, truth)
    results.sort(key=lambda result: result.row)
    strips = []
    for result in results:
        result.imagery = compare_blocks(rows, result.row, result.latents, truth)
        true = truth([result.row])[0]
        strips.append(draw_strip(rows[result.row], result, true, readout))
    stack_images(strips, gap=24).save(c.OUT)
    print(f"{describe_hits(results)}; {len(results)} questions are in {c.OUT}")
