"""Real video: which files there are, their split, their frames, their shots, and the segmenters."""

import hashlib
import importlib
import os
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib import vocabulary
from lib.background import shrink
from lib.command_line import quote, require
from lib.files import evenly_spaced
from lib.follow import colour_numbers, colour_shares
from lib.jobs import Job, add_timing
from lib.pictures import BadImage
from lib.spatialvid import BadAnnotation, has_one_note_per_frame, is_annotated, read_caption, read_notes
from lib.video_readers import BadVideo, advise, require_reader

ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # of videos
UNNAMED = "moving object"  # in questions about what no one has named
CONTEXT = 32  # frames of all the video between two cuts, by which the background is known
LONGER = 1.5  # a shot of so many times a clip's frames tells more of the background than the clip
TOO_MANY = "clips are more than MAX_CLIPS of a video, or share frames with a surer one"
BETWEEN = 2  # frames between two frames of a clip, by which its motion is measured
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
    dense: np.ndarray = None  # (M, h, w, 3) uint8, the frames and more between them, small; None: the frames
    places: list = None  # numbers of the T frames among the M
    context: np.ndarray = None  # (N, h, w, 3) uint8, small frames of a longer shot; None: there are no more

    def __post_init__(self):
        """Without frames between them the frames stand for all."""
        if self.dense is None:
            self.dense = np.stack([shrink(frame) for frame in self.frames])
            self.places = list(range(len(self.frames)))

    def mask_files(self, role):
        """Paths of the mask images of a role, "static" or "dynamic", one a frame; they may be missing."""
        folder = self.folder / f"masks_{role}"
        return [folder / f"frame_{self.start + n:04d}.png" for n in range(len(self.frames))]


def describe_error(error):
    """What is wrong with a clip, for a count of reasons: our own words, or the name of a library's error."""
    if isinstance(error, (BadAnnotation, BadImage)):
        return re.sub(r"\S*/", "", str(error))
    if isinstance(error, BadVideo):
        return f"{error}; {advise()}"
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
    require_reader()
    folder = Path(root, subfolder)
    paths = find_videos(folder) if root else []
    shown = quote(str(root and folder))
    endings = ", ".join(ENDINGS)
    require(paths, f"VIDEOS={shown} holds no video ({endings}); set VIDEOS to a folder that does.")

    # A scene is a name without what follows the last "_". Whole scenes are held out for the test split.
    scenes = [scene_of(path) for path in paths]
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


def choose_frames(times, fps, between):
    """Times of all frames (n,) -> numbers of those shown at fps, and with up to `between` more in each gap.

    At 4 a second of 30, two between: [0, 7, 15], [0, 2, 5, 7, 10, 12, 15].
    """
    from lib.videos import shown_frames

    shown = shown_frames(times, fps)
    numbers = set(shown)
    for first, last in zip(shown, shown[1:]):
        numbers.update(np.linspace(first, last, between + 2).astype(int).tolist())
    return shown, sorted(numbers)


def read_frames(path, most_side, shown, others=()):
    """A video's frames of these numbers -> (T, H, W, 3), times (T,) in seconds, and all small (M, h, w, 3).

    The longer side of a frame becomes at most `most_side` pixels. `others` are wanted at small size alone.
    """
    from lib.videos import decode_frames  # brings torch, which the toy world does not need

    # Each frame is made small as it comes, so that a long video needs no more memory than what is kept.
    begun = time.time()
    kept = set(shown)
    numbers = sorted(kept.union(others))
    frames, times, small = [], [], []
    for number, (frame, seconds) in zip(numbers, decode_frames(path, indexes=numbers)):
        frame.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
        pixels = np.asarray(frame)
        small.append(shrink(pixels))
        if number in kept:
            frames.append(pixels)
            times.append(seconds)
    add_timing("frames", len(frames), begun)
    if len(small) < len(numbers):
        raise BadVideo("frames of it are damaged")
    return np.stack(frames), np.round(times, 3), np.stack(small)


def find_cuts(frames, cut_change):
    """Frames (M, H, W, 3) in close succession -> numbers of those that begin another shot.

    There more than cut_change of the colours change at once, and three times as many as around. A shaken
    picture keeps its colours; one that is swept about changes them all the time.
    """
    shares = np.array([colour_shares(colour_numbers(frame).ravel()) for frame in frames])
    changes = 1 - np.minimum(shares[1:], shares[:-1]).sum(1)
    cuts = []
    for t, change in enumerate(changes):
        around = [*changes[max(0, t - 3) : t], *changes[t + 1 : t + 4]]
        if change > cut_change and change > 3 * np.median(around or [0]):
            cuts.append(t + 1)
    return cuts


def split_into_windows(dense, places, window, cut_change):
    """All frames (M, H, W, 3), the numbers of T among them -> those of each clip and of its shot.

    Both are numbers among the T. A shot is what lies between two cuts. A clip is `window` frames of it,
    overlapping by half; three frames are none.
    """
    cuts = np.searchsorted(places, find_cuts(dense, cut_change))
    half = window // 2
    windows = []
    for shot in np.split(np.arange(len(places)), cuts):
        if len(shot) > 3:
            starts = range(0, max(1, len(shot) - half), half)
            windows += [(shot[start : start + window], shot) for start in starts]
    return windows


def path_inside(c, path):
    """Path of a video inside its folder of VIDEOS."""
    return Path(path).relative_to(Path(c.VIDEOS, vocabulary.VIDEO_FOLDERS[c.SOURCE][0]))


def read_shots(c, job, name):
    """The video of a job -> [Shot] with frames and annotations; None if the two do not fit together.

    c: constants of generate_data.py; name: of the job's folder, in which each shot has one of its own.
    """
    from lib.videos import frame_times

    stem = path_inside(c, job.path).with_suffix("")
    folder = Path(c.VIDEOS, vocabulary.VIDEO_FOLDERS[c.SOURCE][1], stem)
    depths = Path(c.VIDEOS, "depths", stem)
    notes = read_notes(folder, depths, is_whole=c.SOURCE == "spatialvid")
    if "indexes" in notes:
        shown = all_numbers = notes["indexes"].tolist()
    else:
        shown, all_numbers = choose_frames(frame_times(job.path), c.SAMPLE_FPS, BETWEEN)
    if not has_one_note_per_frame(notes, len(shown)):
        return None
    frames, times, dense = read_frames(job.path, c.MAX_SIDE, shown, all_numbers)
    places = np.searchsorted(all_numbers, shown)

    # Annotated frames are one clip; other videos are cut into windows.
    if is_annotated(notes):
        if len(frames) > c.MAX_FRAMES:
            return None
        windows = [(np.arange(len(frames)), np.arange(len(frames)))]
    else:
        windows = split_into_windows(dense, places, c.WINDOW, c.CUT_CHANGE)
    shots = []
    for window, whole in windows:
        first, last = places[window[0]], places[window[-1]]
        known = range(places[whole[0]], places[whole[-1]] + 1)
        is_longer = len(whole) > LONGER * len(window)
        shot = Shot(
            name=f"{name}/{window[0]:05d}",
            frames=frames[window],
            times=times[window].tolist(),
            start=int(window[0]),
            notes=notes,
            folder=folder,
            dense=dense[first : last + 1],
            places=(places[window] - first).tolist(),
            context=dense[evenly_spaced(known, CONTEXT)] if is_longer else None,
        )
        shots.append(shot)
    return shots


def object_names(shot, annotator):
    """Names of a shot's two objects by role, "static" and "dynamic"; None if the annotator finds none."""
    if annotator:
        names = annotator.name_objects(shot.frames, read_caption(shot.folder))
        if not names:
            return None
    else:
        names = shot.notes.get("objects", {})
    if len(set(names.values())) < len(names):  # one name for two objects is none
        names = {}
    return {
        "static": names.get("static_object") or "static object",
        "dynamic": names.get("dynamic_object") or UNNAMED,
    }


def keep_apart(clips, dropped, most):
    """A video's [(clip, drafts)], Counter of reasons -> both, with drafts of at most `most` clips apart.

    Apart is what shares no frame. The surest come first: clips of one video are alike, and one long video
    would fill a data set.
    """

    def sureness(number):
        """The sum of a clip's least scores, one for each of its rows; a row without scores counts 1."""
        scores = [draft.row.get("confidence", {"": 1}).values() for draft in clips[number][1]]
        return sum(min(values) for values in scores)

    taken = []
    for number in sorted(range(len(clips)), key=sureness, reverse=True):
        times = set(clips[number][0].times)
        is_apart = all(times.isdisjoint(clips[other][0].times) for other in taken)
        if clips[number][1] and is_apart and len(taken) < most:
            taken.append(number)
    kept = [(clip, drafts if number in taken else []) for number, (clip, drafts) in enumerate(clips)]
    too_many = sum(1 for _, drafts in clips if drafts) - len(taken)
    return kept, dropped + Counter({TOO_MANY: too_many})


def fill_empty_split(drafts):
    """{"train": drafts, "test": drafts} of real footage -> the same, so that neither split is empty.

    The last scene with rows of the one is handed to the other, or is in both if it is the only one.
    """
    empty = [split for split, rows in drafts.items() if not rows]
    if len(empty) != 1 or len(drafts) != 2:
        return drafts
    other = next(split for split in drafts if split not in empty)
    scenes = [scene_of(draft.row["video"]) for draft in drafts[other]]
    last = scenes[-1]
    handed = [draft for draft, scene in zip(drafts[other], scenes) if scene == last]
    left = [draft for draft, scene in zip(drafts[other], scenes) if scene != last]
    print(f"The videos of the split {empty[0]} gave no rows, so {last} is in it", end="")
    print("." if left else f" and in {other} too: no other scene gave rows.")
    return {split: handed if split in empty else left or handed for split in drafts}


def scene_of(path):
    """A video's path -> the scene's name: without what follows the last "_" of its name."""
    path = Path(path)
    return str(path.with_name(path.stem.rpartition("_")[0] or path.stem))
