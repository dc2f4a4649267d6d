"""A contact sheet: rows of a jsonl as one picture, to be looked at before a training run.

    python -m tools.contact_sheet DATA=out/toy/train_imagery.jsonl ROWS=4 OUT=sheet.png

Each row shows its frames with their times, its overlays, question, options, answer and chain of thought.
generate_data.py draws one with INSPECT=n.
"""

from lib.command_line import override_constants
from lib.contact_sheet import draw_sheet

DATA = "out/toy/train_imagery.jsonl"  # any jsonl of DIFT or 4DRL rows with frames
ROWS = 4  # >= 1; rows drawn, evenly spaced over the file
OUT = "sheet.png"  # the picture

if __name__ == "__main__":
    c = override_constants(globals())
    draw_sheet(c.DATA, c.OUT, c.ROWS)
