"""SpatialVID's annotation files, read into arrays and texts; docs/data.md lists them.

What is not finite, or has another shape, is BadAnnotation: a label of a clip must not come from it.
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np

from lib.command_line import exit_with, quote
from lib.files import parse_json

MOST_LETTERS = 100  # of an object's name
CAPTION_FIELDS = ("SceneSummary", "SceneDescription", "SceneDesc")


class BadAnnotation(ValueError):
    """An annotation file that cannot be meant; the text names it and says why."""


def require_sound(condition, path, reason):
    """Raises BadAnnotation with the file's name and the reason unless the condition holds."""
    if not condition:
        raise BadAnnotation(f"{path.name} {reason}")


def read_object(path):
    """What a JSON file holds, which is an object."""
    value, trouble = parse_json(path.read_text(encoding="utf-8-sig"))
    require_sound(isinstance(value, dict), path, f"is no JSON object{trouble and ': '}{quote(trouble)}")
    return value


def read_indexes(path):
    """indexes.txt -> numbers of the video's frames (T,)."""
    indexes = np.loadtxt(path, int, ndmin=2)[:, 1]
    rising = len(indexes) > 0 and indexes[0] >= 0 and (np.diff(indexes) > 0).all()
    require_sound(rising, path, "does not hold rising numbers of frames")
    return indexes


def read_numbers(path, columns):
    """A npy file of finite numbers -> (T, columns or more)."""
    numbers = np.load(path)
    is_table = numbers.ndim == 2 and numbers.shape[1] >= columns and numbers.dtype.kind in "fiu"
    require_sound(is_table, path, f"is no table of {columns} numbers a frame")
    require_sound(np.isfinite(numbers).all(), path, "holds NaN or infinity")
    return numbers.astype(float)


def read_poses(path):
    """poses.npy -> translation and quaternion x, y, z, w of each frame (T, 7)."""
    return read_numbers(path, 7)[:, :7]


def read_intrinsics(path):
    """intrinsics.npy -> focal lengths and centre of each frame (T, 4), shares of width and height."""
    intrinsics = read_numbers(path, 2)
    require_sound((intrinsics[:, :2] > 0).all(), path, "holds a focal length that is not above 0")
    return intrinsics


def read_instructions(path):
    """instructions.json -> {"0->7": [camera movements]}."""
    instructions = read_object(path)
    for span, labels in instructions.items():
        is_span = re.fullmatch(r"\s*\d{1,9}\s*->\s*\d{1,9}\s*", span)
        is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        require_sound(is_span and is_list, path, "has an entry that is no span of frames with movements")
    return instructions


def is_object_name(name):
    """Whether a text may stand in a question as an object's name: one short line, none of our tags."""
    if not isinstance(name, str) or not 0 < len(name.strip()) <= MOST_LETTERS:
        return False
    return name.isprintable() and not re.search("[<>]", name)


def read_objects(path):
    """objects.json -> {"static_object": name, "dynamic_object": name}, those there are."""
    names = read_object(path)
    known = {role: names.get(role) for role in ("static_object", "dynamic_object") if names.get(role)}
    for name in known.values():
        require_sound(is_object_name(name), path, f"has a name that is not one short line ({quote(name)})")
    return known


def read_exr_depths(path):
    """A zip of one EXR file a frame, channel Z = inverse depth -> depths (T, H, W), in the poses' scale."""
    try:
        import OpenEXR
    except ImportError:
        exit_with(f"{path} holds depth maps: pip install OpenEXR, or move it out of VIDEOS.")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".exr")]
        names.sort(key=lambda name: (len(name), name))  # 10.exr comes after 9.exr, 0010.exr after 0009.exr
        files = [OpenEXR.File(io.BytesIO(archive.read(name))) for name in names]
    inverse = np.stack([file.channels()["Z"].pixels for file in files]).astype(np.float32)
    inverse[~np.isfinite(inverse)] = np.nan  # no value
    return np.clip(1 / np.maximum(inverse, 1e-3), 1e-3, 1e2)


def read_array_depths(path):
    """A npy file, or a npz file of one array -> depths (T, H, W), not inverse; NaN where there is no value.

    0, negative numbers, NaN and infinity are no depth.
    """
    if path.suffix == ".npy":
        depths = np.load(path)
    else:
        with np.load(path) as arrays:
            require_sound(len(arrays.files) == 1, path, "does not hold one array")
            depths = arrays[arrays.files[0]]
    is_video = depths.ndim == 3 and depths.dtype.kind in "fiu" and depths.size > 0
    require_sound(is_video, path, "is no depth map a frame")
    is_depth = np.isfinite(depths) & (depths > 0)
    return depths if is_depth.all() else np.where(is_depth, depths, np.nan)


NOTE_READERS = {
    "indexes.txt": read_indexes,
    "poses.npy": read_poses,
    "intrinsics.npy": read_intrinsics,
    "instructions.json": read_instructions,
    "objects.json": read_objects,
}
OPTIONAL = ("objects.json",)  # not SpatialVID's own
DEPTH_READERS = {".zip": read_exr_depths, ".npz": read_array_depths, ".npy": read_array_depths}


def read_sound(read, path):
    """What a file's reader gives; an error of numpy, of a zip or of the file is a BadAnnotation too."""
    require_sound(path.exists(), path, "is missing")
    try:
        return read(path)
    except BadAnnotation:
        raise
    except Exception as error:
        raise BadAnnotation(f"{path.name} cannot be read ({type(error).__name__})") from error


def read_notes(folder, depths, is_whole):
    """A clip's annotations -> {"indexes": (T,), "poses": (T, 7), ..., "depths": (T, H, W)}, those there are.

    depths: path of the depth maps without its ending, or they stand in the folder; is_whole: all but names
    and depths must be there.
    """
    notes = {}
    for name, read in NOTE_READERS.items():
        is_needed = is_whole and name not in OPTIONAL
        if is_needed or (folder / name).exists():
            notes[name.split(".")[0]] = read_sound(read, folder / name)
    candidates = [Path(f"{base}{ending}") for base in (depths, folder / "depths") for ending in DEPTH_READERS]
    found = [path for path in candidates if path.exists()]
    if found:
        notes["depths"] = read_sound(DEPTH_READERS[found[0].suffix], found[0])
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
    caption = read_object(path)
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
        unknown = spelled - {"Stay", *moves}
        if unknown:
            raise BadAnnotation(f"instructions.json has an unknown movement ({quote(min(unknown))})")
        named = sorted(spelled - {"Stay"}, key=moves.index)
        axes = {moves.index(name) // 2 for name in named}
        if start < end and named and len(axes) == len(named):
            segments.append((start, end, " and ".join(named)))
    return segments
