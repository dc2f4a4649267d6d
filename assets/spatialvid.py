"""SpatialVID's annotation files, read into arrays and texts; README, "Real video", lists them."""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np


def read_indexes(path):
    """indexes.txt -> numbers of the video's frames (T,)."""
    return np.loadtxt(path, int, ndmin=2)[:, 1]


def read_json(path):
    """A json file -> what it holds."""
    return json.loads(path.read_text(encoding="utf-8"))


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


READERS = {"indexes.txt": read_indexes, "poses.npy": np.load, "intrinsics.npy": np.load}
READERS |= {"instructions.json": read_json, "objects.json": read_json}
DEPTHS = {".zip": read_exr_depths, ".npz": read_array_depths, ".npy": read_array_depths}


def read_notes(folder, depths, is_whole):
    """A clip's annotations -> {"indexes": (T,), "poses": (T, 7), ..., "depths": (T, H, W)}, those there are.

    depths: path of the depth maps without its ending, or they stand in the folder; is_whole: all but names
    and depths must be there.
    """
    needed = list(READERS)[:-1] if is_whole else []
    names = [name for name in READERS if name in needed or (folder / name).exists()]
    notes = {name.split(".")[0]: READERS[name](folder / name) for name in names}
    places = [Path(f"{base}{ending}") for base in (depths, folder / "depths") for ending in DEPTHS]
    path = next((path for path in places if path.exists()), None)
    return notes | ({"depths": DEPTHS[path.suffix](path)} if path else {})


def read_caption(folder):
    """What caption.json says of the scene, summary and description; the keys and the file may be missing."""
    path = folder / "caption.json"
    said = read_json(path) if path.exists() else {}
    texts = [str(said[key]) for key in ("SceneSummary", "SceneDescription", "SceneDesc") if said.get(key)]
    return " ".join(texts) or "there is none"


def cameras(poses):
    """World-to-camera poses (T, 7) in OpenCV axes -> pos (T, 3), rot (T, 3, 3) columns right, up, forward."""
    quaternion = poses[:, 3:] / np.linalg.norm(poses[:, 3:], axis=1, keepdims=True)  # x, y, z, w
    cross = -np.cross(quaternion[:, None, :3], np.eye(3))  # (T, 3, 3), the matrix of v x
    turn = np.eye(3) + 2 * quaternion[:, 3, None, None] * cross + 2 * cross @ cross  # world to camera
    return -np.einsum("tji,tj->ti", turn, poses[:, :3]), turn.transpose(0, 2, 1) * [1, -1, 1]


def camera_segments(instructions, count, moves):
    """instructions.json, number of frames -> [(start, end, label)]: no "Stay", no opposites at once.

    moves: our twelve words in our order, in pairs of opposites.
    """
    segments = []
    for span, labels in instructions.items():
        start, end = (min(int(number), count - 1) for number in span.split("->"))
        spelled = {label.replace("CCW", "Counter-Clockwise").replace("CW", "Clockwise") for label in labels}
        named = sorted(spelled - {"Stay"}, key=moves.index)
        if start < end and named and len({moves.index(name) // 2 for name in named}) == len(named):
            segments.append((start, end, " and ".join(named)))
    return segments
