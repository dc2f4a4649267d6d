"""Asks a checkpoint one question of your own about one video, and draws the answer with its imagery.

    python -m tools.ask QUESTION="How does it move?" VIDEO_FILE=x.mp4 OPTIONS="left|right"

Prints the answer, and writes OUT/report.html. A toy network says that its answers are toy answers.
"""

from evaluate import TrueLatents, describe_run, draw_row, output_folder, to_settings
from lib.benchmarks import question_row
from lib.command_line import override_constants, require
from lib.distributed import init_distributed
from lib.files import write_text
from lib.imagery import learn_readout
from lib.report import make_page, verdict
from lib.rows import read_twin
from lib.videos import attach_frames
from model import load_model

# --- paths
MODEL = "out/dift"  # run folder (its newest checkpoint is taken) or one checkpoint
DATA = "out/toy"  # folder whose training overlays the readout is fitted on; none there: no imagery is drawn
VIDEO_FILE = ""  # a video file, or a folder of frame_* images
OUT = ""  # "": the folder ask in MODEL's, and a suffix for each control
CACHE = "out/frames"  # folder for the frames of decoded videos; may be deleted
# --- data
QUESTION = "How does the camera move?"  # in your words
OPTIONS = ""  # "left|right", 2 to 6 of them; "": an open question
FPS = 1.0  # 1e-6 to 1e3; frames a second of a video (release)
MAX_FRAMES = 50  # >= 1; of a video, evenly spaced where there are more (release)
TIMES_IN_PROMPT = False  # True: the seconds of the frames stand before the question (ours)
VIDEO = ""  # "" | none | shuffled (frames in another order) (ours)
# --- model
LATENTS = ""  # "" | zero | noise | pad: what is fed in latent blocks (ours)
MAX_NEW = 512  # 1 to 1e6; new positions of an answer at most, latents included
TEMPERATURE = 0.0  # 0 or 0.01 to 100; 0: greedy; 0.7 (release)
TOP_P = 1.0  # > 0, <= 1; share of the probability that is sampled from; 0.9 (release)
SECONDS_PER_PAIR = None  # > 0, <= 1e6; None: the checkpoint's own; 2.0: as the release evaluates
SUFFIX = ""  # instruction after the question; "": the checkpoint's own; @file reads one
# --- logging
READOUT = 3000  # >= 0; overlays that the readout is fitted on, at most; 0: no readout
# --- system
FAST = True  # False: exactly the code of model.py, the same numbers
SEED = 0  # >= 0; of sampling, VIDEO=shuffled, LATENTS=noise


def toy_notes(model):
    """What a reader must know of the answers of a network as small as the bundled one, of a large one []."""
    weights = sum(parameter.numel() for parameter in model.qwen.parameters())
    if weights >= 1e8:
        return []
    size = f"{weights / 1e6:.1f} million weights"
    network = f"a toy network of {size}, which has seen a rendered world of balls and boxes"
    return [f"A toy answer: it is by {network}; about real video it is right by chance at most."]


def read_options(text):
    """ "left|right" -> {"A": "left", "B": "right"}; exits unless there are 2 to 6 of them, or none."""
    options = text.split("|") if text else []
    allowed = not options or 2 <= len(options) <= 6
    require(allowed, f"OPTIONS={text}: give 2 to 6 of them, as left|right.")
    return dict(zip("ABCDEF", options))


if __name__ == "__main__":
    c = override_constants(globals())
    options = read_options(c.OPTIONS)

    # the question becomes a row as evaluate.py knows them, but without a key
    row = question_row(c.QUESTION, options, video=c.VIDEO_FILE, source=c.VIDEO_FILE)
    attach_frames([row], cache=c.CACHE, fps=c.FPS, most=c.MAX_FRAMES)
    require(not row.skip_reason, f"VIDEO_FILE={c.VIDEO_FILE}: {row.skip_reason}; set it to a video.")
    _, _, device = init_distributed()
    model = load_model(c.MODEL, device, suffix=c.SUFFIX, fast=c.FAST, seconds_per_pair=c.SECONDS_PER_PAIR)
    settings = to_settings({name.lower(): value for name, value in vars(c).items()})

    # one answer, drawn like those of a report
    train_rows = read_twin(c.DATA) if c.READOUT else []
    readout = learn_readout(TrueLatents(model, train_rows), train_rows, c.READOUT)
    drawing = draw_row(model, [row], 0, settings, readout)
    notes = toy_notes(model)
    summary = {"settings": describe_run(model, [row], settings), "notes": notes}
    page = output_folder(c, "ask") / "report.html"
    write_text(page, make_page(summary, [drawing], []))
    print(drawing.result.text, verdict(row, drawing.result), *notes, page, sep="\n")
