"""Video files to frames at their times, and frames kept as JPEG for rows that name only a video."""

import os
import re
import shutil
import uuid
import zlib
from pathlib import Path

import numpy as np

from lib.command_line import quote_path
from lib.distributed import all_gather_list, is_rank0
from lib.files import UNFINISHED, evenly_spaced, keep_first
from lib.video_readers import BadVideo, advise, open_video

ROUNDING = 4e-4  # seconds; Matroska and FLV round times to milliseconds: 1 / 24 to 0.042
MOST_SAMPLES = 10**7  # of a video: a damaged time may be in a thousand years
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of a video that is a folder of images
LONGEST_NAME = 200  # bytes of a name in the cache; file systems allow 255


def frame_times(path):
    """Seconds of all frames of a video (n,); errors as of decode_frames."""
    return open_video(path).times


def decode_frames(path, fps=1.0, most=None, indexes=None):
    """A video's frames, one after the other: (PIL image, its true time in seconds).

    What a player shows at 0, 1 / fps ... seconds, at most `most` frames, evenly spaced; or those numbered
    `indexes`, which rise. Memory holds a few. A file that cannot be used is an error of lib/video_readers.py.
    """
    video = open_video(path)
    if indexes is None:
        indexes = shown_frames(video.times, fps)
        indexes = evenly_spaced(indexes, most) if most else indexes
    for index, image in video.frames(indexes):
        yield image, float(video.times[index])


def shown_frames(times, fps):
    """Times of all frames (n,) in seconds -> numbers of those that a player shows at 0, 1 / fps ... seconds.

    At a time it shows the last frame that has begun. Frames before 0 are not shown: a cut without encoding
    anew leaves some. A video that begins later is sampled from its first frame on. Rising, each once.
    """
    if not np.isfinite(times).all() or np.ptp(times) * fps > MOST_SAMPLES:
        raise BadVideo("its times cannot be true")
    order = np.argsort(times, kind="stable")
    if times.max() >= 0:
        order = order[times[order] >= 0]
    begins = times[order]
    wanted = np.arange(begins[0], begins[-1] + ROUNDING, 1 / fps)
    # of frames with one and the same time the last is shown
    shown = np.searchsorted(begins, wanted + ROUNDING, side="right") - 1
    return order[np.unique(shown)].tolist()


def frames_on_disk(video, cache, fps, most):
    """A video's frames [(file, seconds)], and why there are none, or "". Decoded once, kept in `cache`.

    A folder counts as a video of its frame_* images, 1 / fps seconds apart (Dyn-Bench, which has no times).
    """
    path = Path(video)
    shown = quote_path(path)
    if os.path.isdir(path):
        images = [(str(image), number / fps) for number, image in enumerate(list_images(path))]
        return evenly_spaced(images, most), "" if images else f"{shown} holds no frame_*"
    if not os.path.isfile(path):
        return [], f"there is no {shown}"
    folder = cache_folder(path, cache, fps, most)
    if not folder.is_dir():
        reason = decode_into(folder, path, fps, most)
        if reason:
            return [], f"{shown} cannot be decoded ({reason}); {advise()}"
    images = sorted(folder.glob("*.jpg"), key=lambda image: float(image.stem))
    return [(str(image), float(image.stem)) for image in images], ""


def list_images(folder):
    """The frame_* images of a folder in the order of their numbers: frame_2 comes before frame_10."""
    images = [path for path in folder.glob("frame_*") if path.suffix.lower() in FRAME_ENDINGS]

    def numbers(path):
        """The name with its numbers as numbers."""
        parts = re.split(r"(\d+)", path.stem)
        return [(int(part), "") if part.isdecimal() else (0, part) for part in parts], path.name

    return sorted(images, key=numbers)


def decode_into(folder, path, fps, most):
    """Writes a video's frames into a folder, whole or not at all -> why it cannot be decoded, or ""."""
    # each process writes a folder of its own; who comes second uses what is there
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:12]}{UNFINISHED}")
    try:
        for frame, seconds in decode_frames(path, fps, most):
            unfinished.mkdir(parents=True, exist_ok=True)
            frame.save(unfinished / f"{seconds:09.3f}.jpg", quality=95, subsampling=0)
    except Exception as error:  # a reader's, of many kinds; PyAV's are of OSError too
        of_own_disk = isinstance(error, OSError) and not type(error).__module__.startswith("av")
        if of_own_disk:
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        return str(error) if isinstance(error, BadVideo) else type(error).__name__
    if not unfinished.is_dir():
        return "no frames"
    keep_first(unfinished, folder)
    return ""


def cache_folder(path, cache, fps, most):
    """The folder of a video's frames, another one once the file or the sampling changes."""
    facts = f"{path} {path.stat().st_size} {path.stat().st_mtime_ns} {fps} {most}"
    stem = os.fsdecode(os.fsencode(path.stem)[:LONGEST_NAME])
    return Path(cache).absolute() / f"{stem}_{zlib.crc32(os.fsencode(facts)):08x}"


def attach_frames(rows, rank=0, world=1, root="", cache="out/frames", fps=1.0, most=50):
    """Gives rows their image_input and times, or a skip_reason; the processes share the decoding.

    A row's video counts from `root`.
    """
    rows = [row for row in rows if not row.skip_reason]
    videos = sorted({row.video for row in rows})[rank::world]
    mine = [(video, frames_on_disk(Path(root) / video, cache, fps, most)) for video in videos]
    found = dict(all_gather_list(mine))
    for row in rows:
        frames, row.skip_reason = found[row.video]
        row.image_input = [path for path, _ in frames]
        row.times = [time for _, time in frames]


def attach_video_rows(rows, videos="", rank=0, world=1, cache="out/frames", fps=1.0, most=50):
    """Gives rows that name only a video (4DRL) their frames -> the rows that have frames or need none.

    videos: the folder that holds the files, by their name alone; "": where the rows say.
    """
    without_frames = [row for row in rows if row.video]
    for row in without_frames:
        row.video = str(Path(videos) / Path(row.video).name) if videos else row.video
    attach_frames(without_frames, rank, world, cache=cache, fps=fps, most=most)
    skipped = [row for row in without_frames if row.skip_reason]
    if skipped and is_rank0():
        first = f"{skipped[0].source}: {skipped[0].skip_reason}"
        print(f"{len(skipped)} of {len(rows)} questions are left out; {first}.")
    return [row for row in rows if not row.skip_reason]
