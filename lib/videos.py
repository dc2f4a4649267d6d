"""Video files to frames: the one decord reader, and frames kept as JPEG for rows that name only a video."""

import zlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from lib.command_line import require
from lib.distributed import all_gather_list, is_rank0
from lib.files import evenly_spaced


def require_decord():
    """Ends the program with the install line unless decord is there."""
    require(find_spec("decord"), "Videos need decord: pip install decord==0.6.0, on ARM eva-decord.")


def decode_video(path, fps=1.0, most=None, indexes=None):
    """A video's frames as PIL images and their true seconds (n,).

    Frames at 0, 1 / fps ... seconds, at most `most` of them, evenly spaced; or those numbered `indexes`.
    decord raises many kinds of errors; each means that the file cannot be used.
    """
    require_decord()
    reader = import_module("decord").VideoReader(str(path))
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(float)
    if indexes is None:
        wanted = np.arange(times[0], times[-1] + 1e-6, 1 / fps)
        indexes = np.unique(np.searchsorted(times, wanted - 1e-6).clip(max=len(times) - 1)).tolist()
        indexes = evenly_spaced(indexes, most) if most else indexes
    frames = [Image.fromarray(frame) for frame in reader.get_batch(indexes).asnumpy()]
    return frames, times[indexes]


def frames_on_disk(video, cache, fps, most):
    """A video's frames [(file, seconds)], and why there are none, or "". Decoded once, kept in `cache`.

    A folder counts as a video of its frame_* images, 1 / fps seconds apart (Dyn-Bench, which has no times).
    """
    path = Path(video)
    if path.is_dir():
        images = [(str(image), number / fps) for number, image in enumerate(sorted(path.glob("frame_*")))]
        return evenly_spaced(images, most), "" if images else f"{path} holds no frame_*"
    if not path.is_file():
        return [], f"there is no {path}"
    folder = cache_folder(path, cache, fps, most)
    if not folder.is_dir():
        try:
            frames, times = decode_video(path, fps, most)
        except Exception as error:  # decord's, of many kinds
            return [], f"{path} cannot be decoded ({type(error).__name__})"
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for frame, time in zip(frames, times):
            frame.save(unfinished / f"{time:09.3f}.jpg", quality=95, subsampling=0)
        unfinished.rename(folder)
    return [(str(image), float(image.stem)) for image in sorted(folder.glob("*.jpg"))], ""


def cache_folder(path, cache, fps, most):
    """The folder of a video's frames, another one once the file or the sampling changes."""
    facts = f"{path} {path.stat().st_size} {path.stat().st_mtime_ns} {fps} {most}"
    return Path(cache).absolute() / f"{path.stem}_{zlib.crc32(facts.encode()):08x}"


def attach_frames(rows, rank=0, world=1, root="", cache="out/frames", fps=1.0, most=50):
    """Gives rows their image_input and times, or a skip_reason; the processes share the decoding.

    A row's video counts from `root`.
    """
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
