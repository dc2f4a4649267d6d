"""The two readers of video files: decord, and PyAV where it is installed, which is exact.

Each is a class with `times`, the seconds of all frames (n,), and `frames(indexes)`, which gives (index, PIL
image) of these numbers, which rise. A file that cannot be used is a BadVideo, an IndexError or one
of the many errors of the library.
"""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image

from lib.command_line import require

INSTALL_PYAV = "pip install av==18.1.0"
NOT_BY_DECORD = "decord can give other frames of it than asked for"
PIECE = 16  # frames that decord decodes at once: so many lie in memory at full size
KEYFRAMES = 5  # at most so many are compared; at the first that moves it is known
LONGEST_VIDEO = 1e7  # seconds


class BadVideo(ValueError):
    """A video without frames that can be shown; the text says why."""


def advise():
    """What to do about a video that cannot be decoded."""
    encode = "encode it as H.264 in an mp4"
    return encode if has_pyav() else f"{INSTALL_PYAV}, or {encode}"


def has_pyav():
    """Whether PyAV is installed; it is then used in place of decord."""
    return find_spec("av") is not None


def require_reader():
    """Ends the program with the install line unless one of the two is there."""
    is_there = has_pyav() or find_spec("decord")
    require(is_there, f"Videos need decord: pip install decord==0.6.0, on ARM eva-decord; or {INSTALL_PYAV}.")


def open_video(path):
    """A video file -> its PyAVVideo or DecordVideo."""
    require_reader()
    return PyAVVideo(path) if has_pyav() else DecordVideo(path)


# ---------------------------------------------------------------- PyAV


class PyAVVideo:
    """A video read by PyAV. Each frame is decoded when it is asked for, so that memory holds a few."""

    def __init__(self, path):
        """Frames are known by `ticks`, their times in the file's unit, in the order of a player."""
        self.path = path
        self.ticks, self.times = read_ticks(path)

    def frames(self, indexes):
        """(index, PIL image) of these numbers, which rise."""
        wanted = [(self.ticks[index], index) for index in indexes]
        shown = None
        for frame in decode_all(self.path):
            if shown is not None and frame.pts < shown.pts:
                raise BadVideo("the times of its frames do not rise")
            # A listed frame may be damaged: until the next one a player shows the one before.
            if shown is not None and wanted[0][0] < frame.pts:
                yield wanted[0][1], upright(shown)
            wanted = [(tick, index) for tick, index in wanted if tick >= frame.pts]
            if not wanted:
                return
            shown = frame
        if shown is not None:
            yield wanted[0][1], upright(shown)


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
    """All frames of a video, in the order and with the times (`pts`, in ticks of the file) of a player.

    AVI says when a frame is decoded, not when it is shown: a constant later, but for the last ones.
    """
    container, stream = open_stream(path)
    last = -1
    with container:
        for frame in container.decode(stream):
            if container.format.name == "avi":
                frame.pts = last + 1 if frame.dts is None else frame.dts
                last = frame.pts
            if frame.pts is not None:
                yield frame


def read_ticks(path):
    """A video's frames in the order of a player -> their times in ticks of the file [int], in seconds (n,).

    The file says them without decoding, those that it hides (its beginning was cut off) aside; a player
    begins with the first one. Where the file does not say them (AVI) they come from decoding.
    """
    container, stream = open_stream(path)
    with container:
        ticks = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
        unit = float(stream.time_base)
        is_silent = container.format.name == "avi" or None in ticks
    if is_silent:
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


# ---------------------------------------------------------------- decord


class DecordVideo:
    """A video read by decord. Kinds of files of which it gives other frames than asked for are a BadVideo."""

    def __init__(self, path):
        """What needs no decoding is checked here, the rest before the first frame."""
        if is_transport_stream(path):
            raise BadVideo(NOT_BY_DECORD)
        self.path = path
        try:
            reader = open_decord(path)
        except Exception as error:  # of several kinds; of AV1, and of what is no video
            raise BadVideo("decord cannot open it") from error
        self.times = read_times(reader)
        begins_hidden = len(self.times) > 0 and self.times.min() < 0
        begins_without_keyframe = [*reader.get_key_indices()][:1] != [0]
        if begins_hidden or begins_without_keyframe:
            raise BadVideo(NOT_BY_DECORD)

    def frames(self, indexes):
        """(index, PIL image) of these numbers, decoded in pieces, so that memory holds a few."""
        if not finds_keyframes(self.path):
            raise BadVideo(NOT_BY_DECORD)
        for start in range(0, len(indexes), PIECE):
            piece = [int(index) for index in indexes[start : start + PIECE]]
            for index, frame in zip(piece, read_piece(self.path, piece)):
                yield index, Image.fromarray(frame)


def open_decord(path):
    """A decord reader; with one thread it decodes least ahead of what is asked."""
    return import_module("decord").VideoReader(str(path), num_threads=1)


def is_transport_stream(path):
    """Whether a file is MPEG-TS, also a camera's: packets of 188 or 192 bytes that begin with G."""
    try:
        with open(path, "rb") as file:
            head = file.read(600)
    except OSError as error:
        raise BadVideo("it cannot be opened") from error
    return head[::188][:3] == b"GGG" or head[4::192][:3] == b"GGG"


def finds_keyframes(path):
    """Whether decord jumps to the frame that it comes to from the beginning, at the second keyframe.

    It takes the keyframe that it jumps to for the frame of that number. Where frames are shown before their
    keyframe it is another one. A picture that stands still tells nothing, so the next keyframe is tried.
    """
    reader = open_decord(path)
    keyframes = reader.get_key_indices()[1 : KEYFRAMES + 1]
    sought = [read_one(reader, number) for number in keyframes]
    # Another reader goes on from frame to frame, so that it never jumps.
    reader = open_decord(path)
    for number, jumped in zip(keyframes, sought):
        before, reached = read_one(reader, number - 1), read_one(reader, number)
        if not np.array_equal(jumped, reached):
            return False
        if not np.array_equal(before, reached):
            return True
    return True


def read_times(reader):
    """Seconds of all frames of an open video (n,): its timestamps, or by its rate where it has none.

    For an AVI without timestamps decord says -3e17 for each frame.
    """
    times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(float)
    if len(times) and (times < -LONGEST_VIDEO).all():
        return np.arange(len(times)) / reader.get_avg_fps()
    return times


def read_piece(path, numbers):
    """The frames of these numbers, (H, W, 3) uint8 each.

    Each is asked for alone: with get_batch the last frame of an AVI was another one. An open reader would
    decode on while frames are used, up to the end of the video, and keep it all; so it is closed here.
    """
    reader = open_decord(path)
    return [read_one(reader, number) for number in numbers]


def read_one(reader, number):
    """The frame of this number, (H, W, 3) uint8.

    Some widths, such as 72, are padded in memory to what looks to decord like four channels: (H, W, 4), in
    which each row of 3 · W numbers stands at the beginning of one of 4 · W.
    """
    frame = reader[number].asnumpy()
    height, width, channels = frame.shape
    rows = frame.reshape(height, width * channels)
    return rows[:, : 3 * width].reshape(height, width, 3)
