"""Video files to frames: the one reader, and frames kept as JPEG for rows that name only a video."""

import os
import re
import shutil
import uuid
import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from lib.command_line import quote_path, require
from lib.distributed import all_gather_list, is_rank0
from lib.files import UNFINISHED, evenly_spaced, keep_first

ROUNDING = 4e-4  # seconds; Matroska and FLV round times to milliseconds: 1 / 24 to 0.042
MOST_SAMPLES = 10**7  # of a video: a damaged time may be in a thousand years
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # of a video that is a folder of images
LONGEST_NAME = 200  # bytes of a name in the cache; file systems allow 255


class BadVideo(ValueError):
    """A video without frames that can be shown; the text says why."""


def require_av():
    """Ends the program with the install line unless PyAV is there."""
    require(find_spec("av"), "Videos need PyAV: pip install av==18.1.0.")


require_decord = require_av  # the name that lib/footage.py calls


def decode_frames(path, fps=1.0, most=None, indexes=None):
    """A video's frames, one after the other: (PIL image, its true time in seconds).

    What a player shows at 0, 1 / fps ... seconds, at most `most` frames, evenly spaced; or those numbered
    `indexes`, which rise. Each frame is decoded when it is asked for, so that memory holds a few. A file that
    cannot be used is an error of PyAV, a BadVideo or an IndexError.
    """
    require_av()
    ticks, seconds = read_times(path)
    if indexes is None:
        indexes = shown_frames(seconds, fps)
        indexes = evenly_spaced(indexes, most) if most else indexes
    times = {ticks[index]: float(seconds[index]) for index in indexes}
    wanted = list(times)
    shown = None
    for frame in decode_all(path):
        # A listed frame may be damaged: until the next one a player shows the one before.
        if shown is not None and wanted[0] < frame.pts:
            yield upright(shown), times[wanted[0]]
        wanted = [tick for tick in wanted if tick >= frame.pts]
        if not wanted:
            return
        shown = frame
    if shown is not None:
        yield upright(shown), times[wanted[0]]


def open_stream(path):
    """A video file -> (PyAV's container, its video stream); a picture that belongs to music is none."""
    container = import_module("av").open(str(path))
    stream = container.streams.best("video")
    if stream is None or stream.disposition & stream.disposition.attached_pic:
        container.close()
        raise BadVideo("it holds no video")
    stream.codec_context.thread_count = 1
    return container, stream


def decode_all(path):
    """All frames of a video, in the order and with the times (`pts`, in ticks of the file) of a player."""
    container, stream = open_stream(path)
    with container:
        for frame in container.decode(stream):
            if frame.pts is not None:
                yield frame


def read_times(path):
    """A video's frames in the order of a player -> their times in ticks of the file [int], in seconds (n,).

    The file says them without decoding, those that it hides (its beginning was cut off) aside; a player
    begins with the first one. In AVI they come from decoding.
    """
    container, stream = open_stream(path)
    with container:
        ticks = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base)
    if None in ticks:
        ticks = [frame.pts for frame in decode_all(path)]
    if not ticks:
        raise BadVideo("it holds no frames")
    ticks = sorted(set(ticks))
    return ticks, (np.array(ticks) - max(0, ticks[0])) * unit


def upright(frame):
    """PyAV's frame -> PIL image in RGB, turned as the file says, which a phone held upright does."""
    image = frame.to_image()
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


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
            return [], f"{shown} cannot be decoded ({reason}); encode it as H.264"
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
    except Exception as error:  # PyAV's, of many kinds
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
