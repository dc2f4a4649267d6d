"""Toy clips as mp4, without their masks, through a segmenter: how many labels that it leaves are true?

    python -m tools.toy_videos CAMERA=still
    python -m tools.toy_videos CAMERA=moving

The clips go through SOURCE=videos of generate_data.py as any video does. The truth is that of the thing which
the masks show most of, over the frames that a question names. Needs `pip install av` to write the videos.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

import generate_data
from lib.background import resize_masks
from lib.command_line import override_constants, require, require_choice
from lib.footage import list_segmenters, read_shots
from lib.geometry import path_labels
from lib.jobs import Job

# --- data
CAMERA = "moving"  # "moving" (one of the twelve movements in each clip) | "still"
CLIPS = 40  # >= 1
FIRST = 0  # >= 0; number of the first clip
SIZE = 480  # 8 to 4096; side of the square video, pixels; in small ones the far tiles flicker
FRAMES = 22  # 4 to 1000; frames of a clip
FPS = 12  # 1 to 100; frames a second
# --- method
SEGMENTER = "motion"  # a file of lib/segmenters that needs no mask files
MIN_CONFIDENCE = 0.45  # 0 to 1; as in generate_data.py


def write_video(path, frames, fps, codec="mpeg4"):
    """frames (T, H, W, 3) uint8 -> a video file; exits without PyAV."""
    try:
        import av
    except ImportError:
        require(False, "Videos are written by PyAV: pip install av.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 10**7
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def stage_constants(c, folder):
    """Constants of generate_data.py for toy clips of a moving or a still camera, read as videos."""
    stage = override_constants(vars(generate_data), [])
    stage.SOURCE, stage.VIDEOS, stage.OUT = "videos", str(folder), str(folder)
    stage.SEGMENTER, stage.MIN_CONFIDENCE = c.SEGMENTER, c.MIN_CONFIDENCE
    stage.SIZE, stage.FRAMES, stage.SPACINGS = c.SIZE, c.FRAMES, (1 / c.FPS,)
    stage.LINES = ()  # a viewfinder's lines stand still in the frame, not in the world
    share_moving = 1.0 if c.CAMERA == "moving" else 0.0
    stage.P_OBJECT_CLIP, stage.P_OBJECT = 1.0, (share_moving, 0.2)
    return stage


def judge_labels(masks, labels, places, truth):
    """A clip's masks (T, H, W) and {kind: label} -> [(kind, whether it is right)].

    places: numbers of the clip's frames among those of the toy clip `truth`.
    """
    visible = np.flatnonzero(masks.any((1, 2)))
    frames = [places[t] for t in visible]
    paths = {thing.name: thing.path for thing in truth.scene.things}

    def shared(name):
        true = resize_masks(truth.masks[name][frames], masks.shape[1:])
        return (true & masks[visible]).sum() / (true | masks[visible]).sum()

    best = max(truth.moving, key=shared)
    span = slice(frames[0], frames[-1] + 1)
    true = path_labels(paths[best][span], truth.scene.pos[span], truth.scene.rot[span])
    true["box"] = ""
    is_found = shared(best) > 0.4
    return [(kind, label == true[kind] and is_found) for kind, label in labels.items()]


def judge_clip(stage, number, folder, fps):
    """Renders a toy clip, reads it as a video -> [(kind, whether it is right)], reasons, its camera.

    Reasons count why others are not asked; the camera is as camera_of says.
    """
    truth, _, _ = generate_data.toy_clip(stage, "train", number)
    path = Path(folder, f"{number}.mp4")
    write_video(path, truth.frames, fps)
    judged, reasons = [], Counter()
    for shot in read_shots(stage, Job("train", number, str(path)), "clip"):
        clip, why = generate_data.real_clip(stage, shot)
        reasons.update(why)
        for thing in clip.moving:
            judged += judge_labels(clip.masks[thing], clip.facts[thing], shot.places, truth)
    return judged, reasons, camera_of(truth)


def camera_of(truth):
    """What the camera of a toy clip does: "still" | "turning" | "travelling"."""
    if not truth.camera:
        return "still"
    only_turns = all(re.fullmatch("(Pan|Tilt|Roll) .*", label) for _, _, label in truth.camera)
    return "turning" if only_turns else "travelling"


def print_table(judged, reasons, n_clips, n_rows):
    """Prints right and wrong labels by kind, the share of clips that give a row, and what the gates took.

    n_clips, n_rows: Counters of clips, and of those that give a row, by what the camera does.
    """
    for kind in sorted({kind for kind, _ in judged}):
        verdicts = [is_right for name, is_right in judged if name == kind]
        print(f"{kind:10s} {sum(verdicts):4d} right of {len(verdicts)}")
    right = sum(is_right for _, is_right in judged)
    share = f"{right / len(judged):.0%}" if judged else "none"
    print(f"labels     {right:4d} right of {len(judged)} ({share})")
    for camera, n in n_clips.items():
        print(f"clips      {n_rows[camera]:4d} of {n} gave a row ({n_rows[camera] / n:.0%}), camera {camera}")
    for reason, count in reasons.most_common():
        print(f"dropped: {count} {reason}")


if __name__ == "__main__":
    c = override_constants(globals())
    require_choice("CAMERA", c.CAMERA, ["moving", "still"])
    require_choice("SEGMENTER", c.SEGMENTER, list_segmenters())
    judged, reasons, n_clips, n_rows = [], Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        stage = stage_constants(c, folder)
        for number in range(c.FIRST, c.FIRST + c.CLIPS):
            labels, why, camera = judge_clip(stage, number, folder, c.FPS)
            judged += labels
            reasons.update(why)
            n_clips[camera] += 1
            n_rows[camera] += bool(labels)
    print_table(judged, reasons, n_clips, n_rows)
