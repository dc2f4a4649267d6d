"""SpatialVID's annotation files, read into arrays and texts; docs/data.md lists them."""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from lib.files import read_json

CAPTION_FIELDS = ("SceneSummary", "SceneDescription", "SceneDesc")


def read_indexes(path):
    """indexes.txt -> numbers of the video's frames (T,)."""
    return np.loadtxt(path, int, ndmin=2)[:, 1]


def read_exr_depths(path):
    """A zip of one EXR file a frame, channel Z = inverse depth -> depths (T, H, W), in the poses' scale."""
    try:
        import OpenEXR
    except ImportError:
        sys.exit(f"{path} holds depth maps: pip install OpenEXR, or move it out of VIDEOS.")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".exr")]
        names.sort(key=lambda name: (len(name), name))  # 10.exr comes after 9.exr, 0010.exr after 0009.exr
        files = [OpenEXR.File(io.BytesIO(archive.read(name))) for name in names]
    inverse = np.stack([file.channels()["Z"].pixels for file in files]).astype(np.float32)
    return np.clip(1 / np.maximum(inverse, 1e-3), 1e-3, 1e2)


def read_array_depths(path):
    """A npy file, or a npz file of one array -> depths (T, H, W), not inverse."""
    if path.suffix == ".npy":
        return np.load(path)
    with np.load(path) as arrays:
        return arrays[arrays.files[0]]


NOTE_READERS = {
    "indexes.txt": read_indexes,
    "poses.npy": np.load,
    "intrinsics.npy": np.load,
    "instructions.json": read_json,
    "objects.json": read_json,
}
OPTIONAL = ("objects.json",)  # not SpatialVID's own
DEPTH_READERS = {".zip": read_exr_depths, ".npz": read_array_depths, ".npy": read_array_depths}


def read_notes(folder, depths, is_whole):
    """A clip's annotations -> {"indexes": (T,), "poses": (T, 7), ..., "depths": (T, H, W)}, those there are.

    depths: path of the depth maps without its ending, or they stand in the folder; is_whole: all but names
    and depths must be there.
    """
    notes = {}
    for name, read in NOTE_READERS.items():
        is_needed = is_whole and name not in OPTIONAL
        if is_needed or (folder / name).exists():
            notes[name.split(".")[0]] = read(folder / name)
    candidates = [Path(f"{base}{ending}") for base in (depths, folder / "depths") for ending in DEPTH_READERS]
    found = [path for path in candidates if path.exists()]
    if found:
        notes["depths"] = DEPTH_READERS[found[0].suffix](found[0])
    return notes


def is_annotated(notes):
    """Whether there is more than names of objects: then the frames of the notes are the clip."""
    return any(name != "objects" for name in notes)


def has_one_note_per_frame(notes, count):
    """Whether poses, intrinsics and depth maps, where there are any, are as many as the frames."""
    per_frame = [notes[name] for name in ("poses", "intrinsics", "depths") if name in notes]
    return all(len(values) == count for values in per_frame)


def read_caption(folder):
    """What caption.json says of the scene, summary and description; the keys and the file may be missing."""
    path = folder / "caption.json"
    if not path.exists():
        return "there is none"
    caption = read_json(path)
    texts = [str(caption[name]) for name in CAPTION_FIELDS if caption.get(name)]
    return " ".join(texts) or "there is none"


def camera_segments(instructions, count, moves):
    """instructions.json, number of frames -> [(start, end, label)]: no "Stay", no opposites at once.

    moves: our twelve words in our order, in pairs of opposites.
    """
    segments = []
    for span, labels in instructions.items():
        start, end = [min(int(number), count - 1) for number in span.split("->")]
        spelled = {label.replace("CCW", "Counter-Clockwise").replace("CW", "Clockwise") for label in labels}
        named = sorted(spelled - {"Stay"}, key=moves.index)
        axes = {moves.index(name) // 2 for name in named}
        if start < end and named and len(axes) == len(named):
            segments.append((start, end, " and ".join(named)))
    return segments
