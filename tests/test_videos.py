"""lib/videos.py with both readers, and the files of real footage: times, order, memory, links, names.

Each test of decoding runs with PyAV and with decord. decord may refuse a file, but never gives another frame.
"""

import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from helpers import ROOT, one_thread, refused, run_script
from PIL import Image

import generate_data
from lib import footage, video_readers, videos
from lib.command_line import override_constants
from lib.jobs import Job

MEASURE = """
import re, sys, time
from pathlib import Path
from lib import video_readers

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

video_readers.has_pyav = lambda: sys.argv[2] == "av"
__import__(sys.argv[2])
begun = peak()
count = 0
video = video_readers.open_video(sys.argv[1])
for frame in video.frames(range(len(video.times))):
    time.sleep(0.005)  # what a frame is used for
    count += 1
print(count, peak() - begun)
"""


def write(path, frames, rate=24, times=None, size=None):
    """Frames (T, H, W, 3) as H.264; times: of each frame in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "5"})
        stream.height, stream.width = size or frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = "1/1000"
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def greys(count, size=(48, 64)):
    """Frames that are told apart by their grey: 20, 30, 40 ..."""
    return [np.full((*size, 3), 20 + 10 * number, np.uint8) for number in range(count)]


@pytest.fixture(params=["av", "decord"])
def reader(request, monkeypatch):
    """The name of the reader that a test runs with, as if the other one were not there."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(video_readers, "has_pyav", lambda: request.param == "av")
    return request.param


@pytest.fixture
def decord_alone(monkeypatch):
    """As if PyAV were not there."""
    pytest.importorskip("decord")
    monkeypatch.setattr(video_readers, "has_pyav", lambda: False)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
def test_memory_does_not_grow_with_the_video(tmp_path, reader):
    """A reader that decodes on while frames are used takes for 240 several times what it takes for 40."""
    peaks = {}
    for count in (40, 240):
        path = tmp_path / f"{count}.mp4"
        write(path, (np.full((360, 640, 3), n % 250, np.uint8) for n in range(count)), size=(360, 640))
        command = [sys.executable, "-c", MEASURE, str(path), reader]
        done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found, peaks[count] = map(int, done.stdout.split())
        assert found == count
    assert peaks[240] < 2 * peaks[40], peaks


def bars(number):
    """A frame that tells its number: eight bars, white where the number's bit is 1."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    return np.tile(np.repeat(np.uint8(bits), 16)[None, :, None], (96, 1, 3))


def number_of(image):
    """The number that a frame tells."""
    middles = np.asarray(image)[48, 8::16].mean(-1)
    return sum(int(level > 127) << bit for bit, level in enumerate(middles))


def encode_bars(path, codec, options=(), count=96, still=0):
    """A video of such frames, 24 a second, with a keyframe each second or so; skipped without the encoder.

    The first `still` frames are like the first.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.bit_rate, stream.gop_size = 4_000_000, 24
        for number in range(count):
            picture = bars(0 if number < still else number)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def cut(source, path, first, last, shift=0.0):
    """Copies the packets first ... last - 1 without encoding anew, `shift` seconds later."""
    keep = {"avoid_negative_ts": "disabled"}  # what would be before 0 stays there, hidden by an edit list
    with av.open(str(source)) as old, av.open(str(path), "w", options=keep) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if packet.dts is None or not first <= number < last:
                continue
            later = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
            packet.stream = copy
            new.mux(packet)


def told(path, fps=24.0, **settings):
    """The numbers that a video's frames tell, and their times."""
    found = [(number_of(image), seconds) for image, seconds in videos.decode_frames(path, fps, **settings)]
    return [number for number, _ in found], [seconds for _, seconds in found]


FAST = {"preset": "veryfast", "sc_threshold": "0"}  # keyframes stand where they are asked for
ENCODINGS = {
    "a.mp4": ("libx264", FAST),
    "open.mp4": ("libx264", {**FAST, "x264-params": "open-gop=1"}),  # frames shown before their keyframe
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}),  # open as a default
    "a.mkv": ("libx264", FAST),
    "a.ts": ("libx264", FAST),
    "a.flv": ("libx264", FAST),
    "a.avi": ("mpeg4", {}),
    "b.avi": ("mpeg4", {"bf": "2"}),
    "c.avi": ("libx264", FAST),
    "a.mpg": ("mpeg2video", {"bf": "2"}),
    "a.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1.mp4": ("libsvtav1", {"preset": "12"}),
}


REFUSED = ("open.mp4", "hevc.mp4", "a.ts", "b.avi", "c.avi", "a.mpg", "av1.mp4")  # with decord alone


def refuses(path, fps=1000.0):
    """Asserts that the reader in use gives no frame, and a sentence that names the file and PyAV."""
    frames, reason = videos.frames_on_disk(path, path.parent / "cache", fps, None)
    assert frames == [] and path.name in reason and "pip install av==" in reason, reason


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_frame_stands_at_its_time_in_every_encoding(tmp_path, name, reader):
    """All frames, few, and those of given numbers; decord refuses where it would give others."""
    encode_bars(tmp_path / name, *ENCODINGS[name])
    if reader == "decord" and name in REFUSED:
        for fps in (24.0, 2.0):
            refuses(tmp_path / name, fps)
        return
    numbers, times = told(tmp_path / name)
    assert numbers == list(range(96))
    assert times == pytest.approx([number / 24 for number in numbers], abs=2e-3)
    assert told(tmp_path / name, 2.0)[0] == list(range(0, 96, 12))
    assert told(tmp_path / name, indexes=[3, 30, 31, 90])[0] == [3, 30, 31, 90]
    with pytest.raises(IndexError):
        told(tmp_path / name, indexes=[3, 99])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_cuts_without_encoding_anew(tmp_path, ending, reader):
    encode_bars(tmp_path / "a.mp4", "libx264", FAST)
    path = tmp_path / f"cut.{ending}"
    cut(tmp_path / "a.mp4", path, 24, 72)  # at a keyframe
    if reader == "decord" and ending == "ts":
        refuses(path)
        return
    numbers, times = told(path, 1000.0)
    assert numbers == list(range(24, 72)) and times == pytest.approx(np.arange(48) / 24, abs=2e-3)
    cut(tmp_path / "a.mp4", path, 30, 72)  # between two: what needs the first one cannot be shown
    if reader == "decord":
        refuses(path)
        return
    numbers, times = told(path, 1000.0)
    assert numbers == list(range(48, 72))
    assert np.diff(times) == pytest.approx(np.full(23, 1 / 24), abs=2e-3) and times[0] > 0.5


@pytest.mark.parametrize("frames_a_group", ["24", "96"])
def test_a_hidden_beginning_is_not_shown(tmp_path, frames_a_group, reader):
    """As phones cut: the file begins at a keyframe, an edit list hides what comes before the cut."""
    encode_bars(tmp_path / "a.mp4", "libx264", {**FAST, "g": frames_a_group})
    cut(tmp_path / "a.mp4", tmp_path / "cut.mp4", 0, 96, shift=-0.5)
    if reader == "decord":
        refuses(tmp_path / "cut.mp4")
        return
    numbers, times = told(tmp_path / "cut.mp4")
    assert numbers == list(range(12, 96)) and times == pytest.approx(np.arange(84) / 24, abs=2e-3)


def test_a_still_beginning_does_not_hide_an_open_group(tmp_path, decord_alone):
    """Pictures that are the same tell nothing; the next keyframes are tried, until one moves."""
    options = {"x265-params": "log-level=none", "preset": "ultrafast"}
    encode_bars(tmp_path / "a.mp4", "libx265", options, still=50)
    refuses(tmp_path / "a.mp4")
    encode_bars(tmp_path / "still.mp4", "libx264", FAST, still=96)
    assert told(tmp_path / "still.mp4")[0] == [0] * 96


def test_one_refused_video_does_not_end_a_run_over_many(tmp_path, decord_alone, monkeypatch):
    """generate_data.py counts it with its reason; tools/boxes_to_masks.py ends with a sentence."""
    encode_bars(tmp_path / "a.mp4", "libx264", FAST)
    encode_bars(tmp_path / "b.mp4", *ENCODINGS["hevc.mp4"])
    c = override_constants(vars(generate_data), [f"VIDEOS={tmp_path}", "SOURCE=videos"])
    counts = {}
    for name in "ab":
        path = str(tmp_path / f"{name}.mp4")
        _, counts[name] = generate_data.video_clips(c, Job("train", 1, path), name)
    assert not any("decord" in reason for reason in counts["a"]), counts
    refusal = f"{video_readers.NOT_BY_DECORD}; {video_readers.INSTALL_PYAV}"
    assert any(refusal in reason for reason in counts["b"]), counts
    (tmp_path / "boxes.csv").write_text("frame,x1,y1,x2,y2\n0,0,0,9,9\n")
    words = [f"VIDEO_FILE={tmp_path / 'b.mp4'}", f"BOXES={tmp_path / 'boxes.csv'}"]
    refused(lambda: run_script(monkeypatch, "tools/boxes_to_masks.py", *words), "b.mp4", "pip install av==")


def test_without_a_reader_the_install_line_is_said(monkeypatch):
    monkeypatch.setattr(video_readers, "find_spec", lambda name: None)
    refused(video_readers.require_reader, "pip install decord==", "pip install av==")


def test_install_lines_are_those_of_the_requirements():
    lines = {name: (ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")}
    assert video_readers.INSTALL_PYAV.removeprefix("pip install ") in lines["requirements-dev.txt"].split()
    assert "\ndecord==0.6.0;" in lines["requirements.txt"] and "\nav==" not in lines["requirements.txt"]


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_video_is_upright(tmp_path, turn, reader):
    """Phones note in the file's matrix that they were held upright."""
    encode_bars(tmp_path / "a.mp4", "libx264", FAST, 3)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    one = 1 << 16
    at = data.find(b"tkhd") + 44
    matrix = (cosine * one, sine * one, 0, -sine * one, cosine * one, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", *matrix)
    (tmp_path / "turned.mp4").write_bytes(data)
    for (plain, _), (turned, _) in zip(
        videos.decode_frames(tmp_path / "a.mp4"), videos.decode_frames(tmp_path / "turned.mp4")
    ):
        back = np.rot90(np.asarray(turned), turn // 90)  # the player turned it clockwise
        assert (back == np.asarray(plain)).all()


def test_a_file_without_video_is_named(tmp_path, reader):
    """Sound alone, and sound with a picture of its cover."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "cover.jpg")
    for name in ("a.m4a", "cover.m4a"):
        with av.open(str(tmp_path / name), "w", format="mp4") as container:
            stream = container.add_stream("aac", rate=44100)
            stream.layout = "mono"
            if name == "cover.m4a":
                source = av.open(str(tmp_path / "cover.jpg"))
                cover = container.add_stream_from_template(source.streams.video[0])
                cover.disposition = av.stream.Disposition.attached_pic
                container.start_encoding()
                packet = next(source.demux())
                packet.stream = cover
                container.mux(packet)
            silence = np.zeros((1, 1024), np.float32)
            sound = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            sound.rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode())
        frames, reason = videos.frames_on_disk(tmp_path / name, tmp_path / "cache", 1.0, 50)
        assert frames == [] and name in reason and "cannot be decoded" in reason
        assert reader == "decord" or "it holds no video" in reason


def test_damaged_videos_are_named_or_right(tmp_path, reader):
    """A frame of a damaged file may look wrong, but its time rises, and nothing but a reason comes out."""
    encode_bars(tmp_path / "a.mp4", "libx264", FAST, 30)
    data = (tmp_path / "a.mp4").read_bytes()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data[: rng.integers(len(data))] if seed % 3 == 0 else data)
        for _ in range(rng.integers(1, 20)):
            if damaged:
                damaged[rng.integers(len(damaged))] = rng.integers(256)
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(damaged)
        frames, reason = videos.frames_on_disk(path, tmp_path / "cache", 6.0, 50)
        times = [seconds for _, seconds in frames]
        assert bool(frames) != bool(reason) and times == sorted(set(times)), seed
        assert "\n" not in reason and all(seconds >= 0 for seconds in times), seed


@pytest.mark.parametrize("width", [16, 24, 48, 72, 56, 62])
def test_every_width_gives_its_pixels(tmp_path, width, reader):
    """decord takes the padding of some widths for a fourth channel."""
    write(tmp_path / "a.mp4", greys(6, (48, width)))
    found = [(np.asarray(image), time) for image, time in videos.decode_frames(tmp_path / "a.mp4", 24.0)]
    assert len(found) == 6
    for number, (image, time) in enumerate(found):
        assert image.shape == (48, width, 3) and time == pytest.approx(number / 24, abs=1e-4)
        assert abs(image.astype(int) - (20 + 10 * number)).max() <= 3


@pytest.mark.parametrize(
    "times, fps, shown",
    [
        ([0, 0.5, 1, 1.5, 2], 1, [0, 2, 4]),
        ([0, 0.9, 1.1, 1.9, 2.1], 1, [0, 1, 3]),  # irregular: what is shown at 1 and at 2 has begun before
        ([5, 5.5, 6, 6.5], 1, [0, 2]),  # begins later
        ([-1, -0.5, 0, 0.5, 1], 1, [2, 4]),  # cut without encoding anew: a player starts at 0
        ([0, 10, 10.5], 1, [0, 1]),  # a long still picture is kept once
        ([0, 1, 0.5, 2], 2, [0, 2, 1, 3]),  # in rising order
        ([-2, -1], 1, [0, 1]),
        ([3], 1, [0]),
    ],
)
def test_a_player_shows_these_frames(times, fps, shown):
    found = videos.shown_frames(np.array(times, float), fps)
    assert found == shown and list(np.array(times)[found]) == sorted(np.array(times)[found])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e12, -1e12])
def test_times_that_cannot_be_true_are_refused(bad):
    with pytest.raises(video_readers.BadVideo):
        videos.shown_frames(np.array([0, bad, 1]), 1)


def test_frames_in_a_folder_are_counted_by_their_numbers(tmp_path):
    """0, 1, 2, 10, 11, whatever else begins with frame_."""
    for number in (0, 1, 10, 11, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"frame_{number}.png")
    for name in ("frame_3.json", "frame_4.txt", "frame_", "frames.png"):
        (tmp_path / name).write_text("x")
    frames, reason = videos.frames_on_disk(tmp_path, tmp_path / "cache", 1.0, 50)
    assert [os.path.basename(path) for path, _ in frames] == [f"frame_{n}.png" for n in (0, 1, 2, 10, 11)]
    assert [time for _, time in frames] == [0, 1, 2, 3, 4] and reason == ""


@pytest.mark.parametrize("name", ["x" * 246 + ".mp4", "a\udcff.mp4", "ü.mp4"])
def test_any_name_of_a_video_is_taken(tmp_path, name):
    """Long ones, and those that are not UTF-8."""
    write(tmp_path / "a.mp4", greys(3))
    os.rename(tmp_path / "a.mp4", tmp_path / name)
    frames, reason = videos.frames_on_disk(tmp_path / name, tmp_path / "cache", 24.0, 50)
    assert len(frames) == 3 or (reason and "\udcff" in name)
    jobs = footage.list_videos(str(tmp_path), "", 0, 0.25)
    assert {job.split for job in jobs} == {"train", "test"}


def test_linked_folders_and_other_endings_are_found_and_circles_end(tmp_path):
    for name in ("in/a.mp4", "in/b/c.MOV", "in/b/d.mkv", "in/e.txt", "away/f.webm"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "in/link").symlink_to(tmp_path / "away")
    (tmp_path / "away/circle").symlink_to(tmp_path / "in")
    found = [str(path.relative_to(tmp_path / "in")) for path in footage.find_videos(tmp_path / "in")]
    assert found == ["a.mp4", "b/c.MOV", "b/d.mkv", "link/f.webm"]
