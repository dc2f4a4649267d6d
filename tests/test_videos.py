"""lib/videos.py and the files of real footage: times, order, odd widths, memory, links, names."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
from helpers import one_thread
from PIL import Image

from lib import footage, videos

MEASURE = """
import re, sys, time
from pathlib import Path
from lib import videos

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

videos.require_decord()
import decord
begun = peak()
count = 0
for frame, seconds in videos.decode_frames(sys.argv[1], 24.0):
    time.sleep(0.005)  # what a frame is used for; decord would decode on meanwhile
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


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
def test_memory_does_not_grow_with_the_video(tmp_path):
    """No frame is kept. With one reader for all pieces 240 frames take several times what 40 take."""
    peaks = {}
    for count in (40, 240):
        path = tmp_path / f"{count}.mp4"
        write(path, (np.full((360, 640, 3), n % 250, np.uint8) for n in range(count)), size=(360, 640))
        command = [sys.executable, "-c", MEASURE, str(path)]
        done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found, peaks[count] = map(int, done.stdout.split())
        assert found == count
    assert peaks[240] < 2 * peaks[40], peaks


@pytest.mark.parametrize("width", [16, 24, 48, 72, 56, 62])
def test_every_width_gives_its_pixels(tmp_path, width):
    """Some widths are padded in memory, which decord takes for a fourth channel."""
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


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_times_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError):
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
