"""Records that the toy world and real video share: a clip with its labels, and a row made about it."""

import re
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Clip:
    """Frames with what is known about them. A clip of only a name gives rows without video."""

    name: str  # its folder below processed_data
    frames: np.ndarray | None = None  # (T, H, W, 3) uint8
    times: list = field(default_factory=list)  # seconds of each frame
    static: list = field(default_factory=list)  # names of things that stand still, the landmark first
    moving: list = field(default_factory=list)  # names of things that move by themselves
    masks: dict = field(default_factory=dict)  # {name: (T, H, W) bool}
    camera: list = field(default_factory=list)  # [(first frame, last frame, label)] to be asked about
    facts: dict = field(default_factory=dict)  # {moving thing: {kind of question: label, "" for a box}}
    evidence: dict = field(default_factory=dict)  # {"first->last": fields of that segment's row}
    slots: dict = field(default_factory=dict)  # look-alikes: {name: its slot at first, after each exchange}
    least_area: float = 0.0  # a smaller mask counts as hidden, share of the frame
    scene: object = None  # toy world only: lib.toy_scenes.Scene


@dataclass
class Draft:
    """A row as it is made: the row itself, and what its other forms and its overlays need.

    4DRL and pretraining rows have no overlays, so only the first two fields.
    """

    row: dict  # in the release's schema, as the jsonl holds it in its imagery form
    label: str  # the true option's text
    key: str | None = None  # the true option's letter
    thing: str = ""  # that the question is about
    keyframes: list = field(default_factory=list)  # frame numbers of the overlays
    locations: list = field(default_factory=list)  # for each keyframe a sentence, for the verbal form

    def to_json(self):
        """As rows.json and the annotator's replies keep it; "looks" and "spots" are names of its format."""
        record = {"row": self.row, "label": self.label}
        if self.keyframes:
            record["key"] = self.key
            record["thing"] = self.thing
            record["looks"] = self.keyframes
            record["spots"] = self.locations
        return record

    @classmethod
    def from_json(cls, record):
        """What to_json gave -> Draft."""
        return cls(
            row=record["row"],
            label=record["label"],
            key=record.get("key"),
            thing=record.get("thing", ""),
            keyframes=record.get("looks", []),
            locations=record.get("spots", []),
        )


def is_in_time_order(names, times):
    """Whether overlays, by the frame numbers in their names, show no moment after a later one.

    Of each thing by itself: reasoning about two motions goes back to the beginning for the second one.
    """
    latest = {}
    for name in names:
        thing, frame = re.search(r"(.*)f(\d+)\.\w+$", name).groups()
        frame = int(frame)
        # a frame that the clip does not have is out of order, too
        if frame >= len(times) or times[frame] < latest.get(thing, 0):
            return False
        latest[thing] = times[frame]
    return True
