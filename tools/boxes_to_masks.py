"""A tracker's boxes become the mask images that SEGMENTER=files reads: one thing of one video.

    python -m tools.boxes_to_masks VIDEO_FILE=clips/a.mp4 BOXES=a.csv TRACK=3
    python generate_data.py SOURCE=videos SEGMENTER=files VIDEOS=clips OUT=out/own

BOXES is a CSV of a line for each box, in pixels of the video. With a header its columns are frame (from 0),
x1, y1, x2, y2 and, if there are several things, id. Without one it is MOTChallenge's: frame (from 1), id,
left, top, width, height, and more that is not read. The masks go to clips/a/masks_dynamic/.
A box is more than the thing in it: directions are as good as the boxes, outlines are not.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from lib.command_line import exit_with, override_constants, require, require_choice
from lib.footage import describe_error
from lib.videos import decode_frames, frame_times, shown_frames

VIDEO_FILE = ""  # the video that the boxes are of
BOXES = ""  # CSV file, see above
TRACK = ""  # id of the thing; "": the only one
ROLE = "dynamic"  # dynamic: what moves; static: a landmark that stands still
FPS = 4.0  # > 0, <= 1e3; frames a second, SAMPLE_FPS of generate_data.py

HEADER = ("frame", "x1", "y1", "x2", "y2")


def read_boxes(path):
    """A CSV -> {id: {frame of the video from 0: (x1, y1, x2, y2)}}; exits at the first bad line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file))
    names = [name.strip() for name in lines[0]] if lines else []
    has_header = set(HEADER) <= set(names)
    tracks = {}
    for number, line in enumerate(lines, 1):
        if not line or (has_header and number == 1):
            continue
        read = read_line(line, names if has_header else None)
        columns = ", ".join(HEADER)
        require(read, f"{path}:{number} is no box; give {columns} under a header, or MOTChallenge's columns.")
        track, frame, box = read
        tracks.setdefault(track, {})[frame] = box
    require(tracks, f"BOXES={path} holds no boxes; set it to a tracker's CSV.")
    return tracks


def read_line(line, names):
    """Texts of a line, names of its columns or None for MOTChallenge's -> id, frame, box; None if bad."""
    try:
        if names:
            fields = dict(zip(names, line))
            frame, x1, y1, x2, y2 = [float(fields[name]) for name in HEADER]
            track = fields.get("id", "")
        else:
            frame, left, top, width, height = [float(line[column]) for column in (0, 2, 3, 4, 5)]
            frame, track = frame - 1, line[1]
            x1, y1, x2, y2 = left, top, left + width, top + height
    except (ValueError, KeyError, IndexError):
        return None
    is_finite = np.isfinite([frame, x1, y1, x2, y2]).all()
    if not is_finite or frame < 0 or x1 >= x2 or y1 >= y2:
        return None
    return track.strip(), int(frame), (x1, y1, x2, y2)


def draw_box(box, size):
    """x1, y1, x2, y2 in pixels of a frame of the size (W, H) -> mask (H, W) uint8, 255 inside."""
    mask = np.zeros(size[::-1], np.uint8)
    x1, y1, x2, y2 = [max(0, round(value)) for value in box]
    mask[y1:y2, x1:x2] = 255
    return mask


if __name__ == "__main__":
    c = override_constants(globals())
    require_choice("ROLE", c.ROLE, ["dynamic", "static"])
    for name in ("VIDEO_FILE", "BOXES"):
        path = getattr(c, name)
        require(Path(path).is_file(), f"{name}={path} is no file; set it to one.")
    tracks = read_boxes(c.BOXES)
    known = ", ".join(sorted(tracks)[:10])
    track = str(c.TRACK) if str(c.TRACK) or len(tracks) > 1 else next(iter(tracks))
    require(track in tracks, f"TRACK={track} is not in BOXES={c.BOXES}; set it to one of {known}.")

    # the frames that generate_data.py takes, each with the box of its own number
    try:
        numbers = shown_frames(frame_times(c.VIDEO_FILE), c.FPS)
        first, _ = next(decode_frames(c.VIDEO_FILE, indexes=numbers[:1]))
    except Exception as error:  # readers raise many kinds
        exit_with(f"VIDEO_FILE={c.VIDEO_FILE} cannot be decoded ({describe_error(error)}).")
    folder = Path(c.VIDEO_FILE).with_suffix("") / f"masks_{c.ROLE}"
    folder.mkdir(parents=True, exist_ok=True)
    found = 0
    for place, number in enumerate(numbers):
        if number in tracks[track]:
            mask = draw_box(tracks[track][number], first.size)
            Image.fromarray(mask).save(folder / f"frame_{place:04d}.png")
            found += 1
    print(f"{folder}: masks of {found} of {len(numbers)} frames")
