"""The words of questions and answers, and what they mean as numbers. Phrases stand in assets/phrases.json."""

import functools
import json
from pathlib import Path

# ---------------------------------------------------------------- data set

# The place of a split in this list seeds its clips. The last two are those of tools/make_tiny.py.
SPLITS = ["train", "test", "rl_train", "rl_test", "pretrain", "pretrain_test"]

# The three files of a split: with overlays in the reasoning, without them, with words in their place.
FORMS = ["imagery", "noimage", "verbal"]

# ---------------------------------------------------------------- labels

# Camera movements, opposites next to each other. The numbers are the signs of what a landmark does in the
# image (Eq. 3): right, down, larger. A roll has none.
MOVE_CUES = {
    "Pan Right": (-1, 0, 0),
    "Pan Left": (1, 0, 0),
    "Tilt Up": (0, 1, 0),
    "Tilt Down": (0, -1, 0),
    "Roll Clockwise": (0, 0, 0),
    "Roll Counter-Clockwise": (0, 0, 0),
    "Dolly In": (0, 0, 1),
    "Dolly Out": (0, 0, -1),
    "Truck Right": (-1, 0, 0),
    "Truck Left": (1, 0, 0),
    "Pedestal Up": (0, 1, 0),
    "Pedestal Down": (0, -1, 0),
}
MOVES = list(MOVE_CUES)

# The axis that each axis (pan, tilt, roll, dolly, truck, pedestal) is easily confused with.
CONFUSED_AXES = [4, 5, 3, 2, 0, 1]

# Where an object goes, in the axes of the first camera: right, up, forward. Opposites stand next to each
# other; the first eight are parallel to the image.
DIRECTIONS = {
    "Moving Left": (-1, 0, 0),
    "Moving Right": (1, 0, 0),
    "Moving Up": (0, 1, 0),
    "Moving Down": (0, -1, 0),
    "Moving Left-Up": (-1, 1, 0),
    "Moving Right-Down": (1, -1, 0),
    "Moving Left-Down": (-1, -1, 0),
    "Moving Right-Up": (1, 1, 0),
    "Moving Toward Camera": (0, 0, -1),
    "Moving Away from Camera": (0, 0, 1),
    "Stationary": (0, 0, 0),
}

# How the distance of an object changes; the number is its (first) way forward in the toy world.
DISTANCES = {
    "Getting Closer to Camera": -1,
    "Getting Farther from Camera": 1,
    "Maintaining Roughly the Same Distance": 0,
    "First Getting Closer, Then Farther": -1,
    "First Getting Farther, Then Closer": 1,
}

# The share of a path that is done at time t in 0..1: t ** power, reversed in time for one that slows down,
# plus a wave of this amplitude.
SPEEDS = {
    "Constant": (1, False, 0),
    "Speeding Up": (2.2, False, 0),
    "Slowing Down": (2.2, True, 0),
    "First Speeding Up, Then Slowing Down": (1, False, -0.9),
    "First Slowing Down, Then Speeding Up": (1, False, 0.9),
}

# ---------------------------------------------------------------- things and places

COLOURS = {  # RGB
    "blue": (45, 80, 225),
    "green": (40, 165, 60),
    "yellow": (240, 220, 40),
    "purple": (150, 45, 185),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
SHAPES = {  # radius (of a box: half its width) and half the height, metres
    "ball": (0.85, 0.85),
    "box": (0.75, 0.85),
    "pillar": (0.62, 1.1),
    "cone": (0.95, 1.05),
}

# Words for fifths of the frame, and for the square root of the area between these edges.
X_WORDS = ["leftmost", "left", "middle", "right", "rightmost"]
# Places of four look-alikes side by side: what questions call them, and the option. Letters bind to options
# of these words, and not to words such as "leftmost", which in turn are grounded.
SLOTS = {"leftmost": "Far Left", "left": "Left", "right": "Right", "rightmost": "Far Right"}
Y_WORDS = ["top", "upper", "center", "lower", "bottom"]
SIZE_WORDS = ["tiny", "small", "medium", "large", "huge"]
SIZE_EDGES = [0.17, 0.21, 0.245, 0.29]

# ---------------------------------------------------------------- kinds of questions


def find_opposites():
    """{label: its opposite} of movements and directions; "Stationary" has none."""
    opposites = {}
    for names in (MOVES, list(DIRECTIONS)[:-1]):
        for first, second in zip(names[::2], names[1::2]):
            opposites[first] = second
            opposites[second] = first
    return opposites


def list_pairs():
    """Two movements at once, of different axes in order: "Pan Right and Tilt Up", ...

    ours: no pairs of pan and truck or of tilt and pedestal (four axes apart), which may cancel each other.
    """
    pairs = []
    for i, first in enumerate(MOVES):
        for j, second in enumerate(MOVES):
            axes_apart = j // 2 - i // 2
            if axes_apart > 0 and axes_apart != 4:
                pairs.append(f"{first} and {second}")
    return pairs


OPPOSITES = find_opposites()
PAIRS = list_pairs()

# All labels of a kind of question, among which the wrong options are drawn.
VOCABULARY = {
    "single": MOVES,
    "pair": PAIRS,
    "direction": list(DIRECTIONS),
    "distance": list(DISTANCES),
    "speed": list(SPEEDS),
    "follow": list(SLOTS.values()),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
}

# A question's tag in the ids of its rows (release).
ID_TAGS = {"direction": "direct", "distance": "distance", "speed": "speed", "box": "bbox", "follow": "follow"}

# Shares of the kinds of options in text-only questions, for tools/make_tiny.py.
OPTION_SHARES = {
    "single": 0.14,
    "pair": 0.14,
    "direction": 0.14,
    "follow": 0.12,
    "distance": 0.08,
    "speed": 0.08,
    "colour": 0.04,
    "box": 0.06,
    "both": 0.12,
    "sequence": 0.08,
}

# ---------------------------------------------------------------- files of others

# SOURCE: folders below VIDEOS that hold the mp4 files and the annotations.
VIDEO_FOLDERS = {"videos": ("", ""), "questions": ("", ""), "spatialvid": ("videos", "annotations")}

# Fields of DSR-Train's questions, and what the 4DRL schema calls them.
DSR_TRAIN_FIELDS = {"type": "Type", "question": "Question", "answer": "Correct", "videoID": "video_path"}


@functools.cache
def read_phrases():
    """assets/phrases.json: {kind of question: {"ask" | "open" | "link" | "end": phrases with {names}}}."""
    path = Path(__file__).parent.parent / "assets" / "phrases.json"
    return json.loads(path.read_text(encoding="utf-8"))


def phrases_for(kind):
    """Phrases of a kind of question; steps that it has none for are those of any kind."""
    phrases = dict(read_phrases()["any"])
    phrases.update(read_phrases()[kind])
    return phrases
