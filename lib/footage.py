"""Real video: which files there are, their split, their frames, their shots, and the segmenters."""

import hashlib
import importlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib import vocabulary
from lib.command_line import quote, require
from lib.jobs import Job, add_timing
from lib.pictures import BadImage
from lib.spatialvid import BadAnnotation, has_one_note_per_frame, is_annotated, read_notes

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # of videos
SEGMENTERS = Path(__file__).parent / "segmenters"


@dataclass
class Shot:
    """Successive frames of one video, with what its annotations say."""

    name: str  # of the clip made of it
    frames: np.ndarray  # (T, H, W, 3) uint8
    times: list  # seconds of each frame
    start: int  # number of its first frame among the video's sampled ones
    notes: dict  # as lib.spatialvid.read_notes gives them
    folder: Path  # of annotations and mask images

    def mask_files(self, role):
        """Paths of the mask images of a role, "static" or "dynamic", one a frame; they may be missing."""
        folder = self.folder / f"masks_{role}"
        return [folder / f"frame_{self.start + n:04d}.png" for n in range(len(self.frames))]


def describe_error(error):
    """What is wrong with a clip, for a count of reasons: our own words, or the name of a library's error."""
    if isinstance(error, (BadAnnotation, BadImage)):
        return re.sub(r"\S*/", "", str(error))
    return type(error).__name__


def list_segmenters():
    """Names of the files of lib/segmenters; SEGMENTER is one of them."""
    return sorted(path.stem for path in SEGMENTERS.glob("*.py"))


def load_segmenter(name):
    """The module of a segmenter: masks(frames, phrase, files, weights) -> (T, H, W) bool."""
    return importlib.import_module(f"lib.segmenters.{name}")


def list_videos(root, subfolder, seed, held_out_share):
    """[Job] of all videos below root/subfolder; files named alike before the last "_" share a split.

    The number is a digest of the path inside the folder, so a run goes on although files were added.
    """
    from lib.videos import require_decord  # brings torch, which the toy world does not need

    require_decord()
    folder = Path(root, subfolder)
    paths = find_videos(folder) if root else []
    shown = quote(str(root and folder))
    require(paths, f"VIDEOS={shown} holds no mp4 file; set VIDEOS to a folder that does.")

    # A scene is a name without what follows the last "_". Whole scenes are held out for the test split.
    scenes = [str(path.with_name(path.stem.rpartition("_")[0] or path.stem)) for path in paths]
    names = np.random.default_rng(seed).permutation(sorted(set(scenes))).tolist()
    count = max(1, round(held_out_share * len(names))) if len(names) > 1 else 0
    held_out = names[:count]
    jobs = []
    for scene, path in zip(scenes, paths):
        # a name need not be UTF-8
        digest = hashlib.sha256(os.fsencode(path.relative_to(folder))).hexdigest()
        split = "test" if scene in held_out else "train"
        jobs.append(Job(split, int(digest[:10], 16), str(path)))
    if not held_out:
        print(f"VIDEOS={folder} holds one scene only, so nothing is held out: a video is in both splits.")
        jobs.append(Job("test", jobs[0].number, jobs[0].path))
    return jobs


def find_videos(folder):
    """All videos below a folder, in order; linked folders count, each once, so that circles end."""
    found = []
    visited = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        found += [Path(parent, name) for name in names if Path(name).suffix.lower() in ENDINGS]
    return sorted(found)


def read_frames(path, fps, most_side, indexes=None):
    """A video's frames at `indexes`, else fps a second -> PIL images, true times (T,) in seconds.

    The longer side of a frame becomes at most `most_side` pixels.
    """
    from lib.videos import decode_frames

    # Each frame is made small as it comes, so that a long video needs no more memory than what is kept.
    begun = time.time()
    frames, times = [], []
    for frame, seconds in decode_frames(path, fps, indexes=indexes):
        frame.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
        frames.append(np.asarray(frame))
        times.append(seconds)
    add_timing("frames", len(frames), begun)
    return np.stack(frames), np.round(times, 3)


def split_into_windows(frames, window, max_jump):
    """Frames (T, H, W, 3) -> numbers of each clip's frames: `window` of a shot, overlapping by half.

    A cut is where the mean brightness changes by more than max_jump, of 255; three frames are no clip.
    """
    brightness = frames.mean(-1)
    jumps = np.abs(np.diff(brightness, axis=0)).mean((1, 2))
    cuts = np.flatnonzero(jumps > max_jump) + 1
    half = window // 2
    windows = []
    for shot in np.split(np.arange(len(frames)), cuts):
        if len(shot) > 3:
            starts = range(0, max(1, len(shot) - half), half)
            windows += [shot[start : start + window] for start in starts]
    return windows


def path_inside(c, path):
    """Path of a video inside its folder of VIDEOS."""
    return Path(path).relative_to(Path(c.VIDEOS, vocabulary.VIDEO_FOLDERS[c.SOURCE][0]))


def read_shots(c, job, name):
    """The video of a job -> [Shot] with frames and annotations; None if the two do not fit together.

    c: constants of generate_data.py; name: of the job's folder, in which each shot has one of its own.
    """
    stem = path_inside(c, job.path).with_suffix("")
    folder = Path(c.VIDEOS, vocabulary.VIDEO_FOLDERS[c.SOURCE][1], stem)
    depths = Path(c.VIDEOS, "depths", stem)
    notes = read_notes(folder, depths, is_whole=c.SOURCE == "spatialvid")
    frames, times = read_frames(job.path, c.SAMPLE_FPS, c.MAX_SIDE, notes.get("indexes"))
    if not has_one_note_per_frame(notes, len(times)):
        return None

    # Annotated frames are one clip; other videos are cut into windows.
    if is_annotated(notes):
        if len(times) > c.MAX_FRAMES:
            return None
        windows = [np.arange(len(times))]
    else:
        windows = split_into_windows(frames, c.WINDOW, c.MAX_JUMP)
    shots = []
    for window in windows:
        start = int(window[0])
        shot_name = f"{name}/{start:05d}"
        shots.append(Shot(shot_name, frames[window], times[window].tolist(), start, notes, folder))
    return shots
