"""Motion against a fitted background: what is found, what is not asked, and why; boxes, containers, cuts."""

import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import refused, run_script
from PIL import Image
from test_real_data import constants, label_of, moving_square, rows_of, shot_of, write_video

import generate_data as gd
from lib import evidence, video_readers
from lib.background import (
    FREE_STAGES,
    TURN_STAGES,
    climb,
    fit_homography,
    measure_flow,
    move_points,
    normalise,
    pixel_grid,
    pixel_noise,
    sample,
)
from lib.follow import (
    LEAST_TEXTURE,
    fill_flow,
    fill_inside,
    largest_of_runs,
    list_regions,
    measure_pairs,
    measure_step,
    to_pair,
)
from lib.clean_plate import find_changed
from lib.clips import Clip, Draft
from lib.footage import ENDINGS, choose_frames, fill_empty_split, find_cuts, keep_apart, list_videos
from tools.boxes_to_masks import draw_box, read_boxes
from tools.toy_videos import judge_clip, judge_labels, stage_constants

MOTION = constants(SEGMENTER="motion")


def texture(seed=0, size=(300, 500), cell=10):
    """A smooth random picture, grey float (H, W)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(30, 220, (size[0] // cell, size[1] // cell), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)


def seen_through(picture, homography, shape=(90, 160)):
    """What a frame shows of a picture whose pixel 150, 100 stands in its corner, moved by the homography."""
    x, y = move_points(np.linalg.inv(homography), *pixel_grid(shape))
    return np.nan_to_num(sample(picture, x + 150, y + 100))


def camera_clip(count=8, pan=2.0, thing=None, noise=2.0, seed=0):
    """A picture that a camera passes by `pan` pixels a frame; thing(t) -> x, y of a square on the picture."""
    rng = np.random.default_rng(seed)
    ground, square = texture(seed), texture(seed + 1, (120, 120), 5)[:26, :26]
    frames = []
    for t in range(count):
        shake = rng.normal(0, 0.4, 2)
        homography = np.array([[1, 0, -pan * t + shake[0]], [0, 1, shake[1]], [0, 0, 1]])
        frame = np.repeat(seen_through(ground, homography)[..., None], 3, 2) * [1, 0.9, 0.8]
        if thing:
            x, y = np.rint(move_points(homography, *thing(t))).astype(int)
            seen = frame[y : y + 26, x : x + 26]
            seen[:] = square[: seen.shape[0], : seen.shape[1], None] * [1.1, 0.3, 0.2]
        frames.append(np.clip(frame + rng.normal(0, noise, frame.shape), 0, 255).astype(np.uint8))
    return np.stack(frames)


def made(frames, segmenter="motion", bar=MOTION.MIN_CONFIDENCE):
    """The clip that real_clip makes of frames, and its reasons; bar: the least confidence."""
    c = constants(SEGMENTER=segmenter, MIN_CONFIDENCE=bar)
    return gd.real_clip(c, shot_of(frames, {}, Path("none")))


# ---------------------------------------------------------------- the background


def test_a_homography_is_found_beside_a_thing_that_moves():
    """Turn, zoom, shear and other exposure: right to a pixel; the thing's flow is its own motion."""
    true = np.array([[1.03, 0.04, 6.3], [-0.03, 0.98, -9.2], [2e-4, -1e-4, 1]])
    ground, square = texture(), texture(7, (120, 120), 6)[:26, :26]
    a, b = seen_through(ground, np.eye(3)), 10 + 1.2 * seen_through(ground, true)
    to_x, to_y = move_points(true, 60.0, 40.0)
    x, y = round(to_x) + 4, round(to_y) + 2
    a[40:66, 60:86] = square
    b[y : y + 26, x : x + 26] = square
    a, b = normalise(a), normalise(b)
    found = fit_homography(a, b)
    points = np.meshgrid([0, 80, 160], [0, 45, 90])
    assert np.abs(np.subtract(move_points(found, *points), move_points(true, *points))).max() < 1
    flow, _ = measure_flow(a, b, found)
    assert np.allclose(np.median(flow[46:60, 66:80], (0, 1)), [x - to_x, y - to_y], atol=1)
    assert np.median(np.abs(flow[10:30, 20:50])) < 0.5


def turned(degrees, axis, focal=0.8, shape=(90, 160)):
    """K R K^-1 of a camera that pans or rolls; focal: longer sides."""
    height, width = shape
    to_pixels = np.array([[focal * width, 0, width / 2], [0, focal * width, height / 2], [0, 0, 1]])
    sin, cos = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    turns = {
        "pan": [[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]],
        "roll": [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]],
    }
    turn = to_pixels @ np.array(turns[axis]) @ np.linalg.inv(to_pixels)
    return turn / turn[2, 2]


@pytest.mark.parametrize("axis", ["pan", "roll"])
def test_things_that_move_do_not_bend_a_turn(axis):
    """Two squares move under a bare sky: a free homography follows them, that of a turn does not."""
    true, ground, square = turned(2, axis), texture(3), texture(9, (120, 120), 6)[:14, :14]
    pictures = []
    for homography, step in ((np.eye(3), 0), (true, 2)):
        frame = seen_through(ground, homography)
        frame[:50] = 120
        for x, y in ((20, 15), (100, 25)):
            frame[y + step : y + step + 14, x + step : x + step + 14] = square
        noise = np.random.default_rng(step).normal(0, 2, frame.shape)
        pictures.append(normalise(frame + noise))
    points = np.meshgrid([0, 80, 160], [0, 45, 90])
    expected = move_points(true, *points)
    bent = climb(np.eye(3), *pictures, FREE_STAGES)
    assert np.abs(np.subtract(move_points(bent, *points), expected)).max() > 1.2
    found = fit_homography(*pictures)
    assert np.abs(np.subtract(move_points(found, *points), expected)).max() < 0.9


@pytest.mark.parametrize("focal", [0.6, 0.8, 2.5])
def test_a_turn_is_found_with_any_lens(focal):
    """By five numbers, which do not know the lens: to a third of a pixel at the corners."""
    true, ground = turned(1.5 / focal, "pan", focal), texture(2)
    pictures = [normalise(seen_through(ground, homography)) for homography in (np.eye(3), true)]
    found = climb(np.eye(3), *pictures, TURN_STAGES)
    points = np.meshgrid([0, 80, 160], [0, 45, 90])
    assert np.abs(np.subtract(move_points(found, *points), move_points(true, *points))).max() < 0.34


def test_where_the_background_stays_the_same_nothing_moves():
    """Worked example: flow of 5 pixels all over counts where the two pictures differ, and nowhere else."""
    differs = np.full((90, 160), 0.1)
    differs[30:60, 50:80] = 0.5
    pair = to_pair(np.eye(3), np.full((90, 160, 2), 5.0), np.ones((90, 160)), differs)
    assert (pair.flow[..., 0] == np.where(differs > 0.2, 5, 0)).all()
    assert ((pair.strength() > 1) == (differs > 0.2)).all()


def test_regions_are_connected():
    """A worked example: a diagonal neighbour is another region; the largest comes first."""
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
    regions = list_regions(mask, least=1)
    assert [region.sum() for region in regions] == [3, 2]
    assert regions[0].astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert list_regions(mask, least=4) == []
    assert largest_of_runs(np.array([[[0, 1, 2, 0, 3], [4, 0, 0, 5, 6]]])).tolist() == [
        [[0, 2, 2, 0, 3], [4, 0, 0, 6, 6]]
    ]


# ---------------------------------------------------------------- silence, and what is said


@pytest.mark.parametrize("pan", [0.0, 3.0])
def test_where_nothing_moves_nothing_is_asked(pan):
    """A static scene before a fixed, shaken or turning camera: no object, and the reason is counted."""
    clip, reasons = made(camera_clip(pan=pan))
    assert not clip.moving and len(reasons) == 1
    # at the rim of a picture that passes by, something may seem to move
    expected = "nothing that clearly moves|border" if pan else "nothing that clearly moves"
    assert re.search(expected, next(iter(reasons)))


@pytest.mark.parametrize(
    "x, y, pan, label",
    [
        (40, 15, 3, "Moving Right"),
        (115, 15, -3, "Moving Left"),
        (60, 8, 2, "Moving Down"),
    ],
)
def test_a_thing_before_a_moving_camera(x, y, pan, label):
    """Its way is that against the background, whatever it does in the frame; scores stand with each label."""
    step = {"Moving Right": (6, 0), "Moving Left": (-5, 0), "Moving Down": (0, 6)}[label]
    clip, _ = made(camera_clip(pan=pan, thing=lambda t: (x + step[0] * t, y + step[1] * t)))
    assert clip.moving == ["moving object"]
    assert clip.facts["moving object"]["direction"] == label
    assert "First" not in str(clip.facts)
    scores = clip.evidence["dynamic_direct"]["confidence"]
    assert (
        set(scores) == {"residual", "identity", "margin", "cover"}
        and min(scores.values()) >= MOTION.MIN_CONFIDENCE
    )


def test_clips_that_overlap_are_measured_once():
    """Of two clips of six frames that share three, ten steps less two are measured."""
    frames = camera_clip(count=9, pan=3, seed=5)
    before = measure_step.cache_info().misses
    for start in (0, 3):
        measure_pairs(shot_of(frames[start : start + 6], {}, Path("none")))
    assert measure_step.cache_info().misses - before == 8


def test_the_mask_is_the_thing():
    """In each frame with a mask it covers most of the square and little else."""
    frames = camera_clip(pan=3, thing=lambda t: (40 + 6 * t, 20))
    shot = shot_of(frames, {}, Path("none"))
    masks = gd.load_segmenter("motion").masks_of_shot(shot)
    assert masks.any((1, 2)).sum() >= 6
    for frame, mask in zip(frames, masks):
        red = frame[..., 0].astype(int) - frame[..., 2] > 60
        if mask.any() and red.sum() > 300:
            assert (mask & red).sum() / (mask | red).sum() > 0.6


def test_opencv_finds_the_same():
    """SEGMENTER="flow" on the same clip, where the library is there."""
    pytest.importorskip("cv2")
    clip, _ = made(camera_clip(pan=3, thing=lambda t: (40 + 6 * t, 20)), "flow")
    assert clip.facts["moving object"]["direction"] == "Moving Right"
    clip, _ = made(camera_clip(pan=3), "flow")
    assert not clip.moving


def test_without_opencv_there_is_the_install_line(monkeypatch):
    """One sentence, and the segmenter that needs nothing."""
    flow = gd.load_segmenter("flow")
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    flow.load_opencv.cache_clear()
    shot = shot_of(camera_clip(count=4), {}, Path("none"))
    refused(lambda: flow.masks_of_shot(shot), "pip install opencv-python-headless", "SEGMENTER=motion")


def test_a_thing_at_the_border_is_not_asked_about():
    """Cut off by the frame in all but three frames: no row."""
    clip, reasons = made(camera_clip(pan=0, thing=lambda t: (114 + 7 * t, 20)))
    assert not clip.moving and "border" in next(iter(reasons))


def test_another_colour_is_another_thing():
    """A mask that goes over to a thing of other colours has no identity."""
    frames = camera_clip(pan=0, thing=lambda t: (20 + 8 * t, 20))
    masks = np.zeros(frames.shape[:3], bool)
    for t in range(8):
        x = 20 + 8 * t if t < 4 else 120
        masks[t, 20:46, x : x + 26] = True
    found = evidence.weigh(shot_of(frames, {}, Path("none")), masks, 0.35)
    assert found.labels == {} and any("identity" in reason for reason in found.reasons)


def square_masks(count, place, width=26):
    """Masks (T, 90, 160) of the square of camera_clip at place(t), or of its left part of this width."""
    masks = np.zeros((count, 90, 160), bool)
    for t in range(count):
        x, y = place(t)
        masks[t, y : y + 26, x : x + width] = True
    return masks


@pytest.mark.parametrize("pan", [0.0, 3.0])
def test_a_mask_of_half_a_thing_is_dropped(pan):
    """The clean plate shows the whole square: a half has no cover. Masks of one's own are not so judged."""
    frames = camera_clip(pan=pan, thing=lambda t: (40 + 8 * t, 20))
    in_frame = lambda t: (round(40 + (8 - pan) * t), 20)  # noqa: E731
    shot = shot_of(frames, {}, Path("none"))
    onwards, _ = measure_pairs(shot)
    whole, half = square_masks(8, in_frame), square_masks(8, in_frame, width=13)
    assert evidence.plate_overlaps(shot, whole, range(8), onwards).min() > 0.8
    assert evidence.plate_overlaps(shot, half, range(8), onwards).max() < 0.5
    found = evidence.weigh(shot, half, 0.0, by_motion=True)
    assert found.confidence["direction"]["cover"] < 0.3
    assert "cover" not in evidence.weigh(shot, half, 0.0).confidence["direction"]


def test_the_shot_tells_what_a_clip_cannot():
    """A thing that stands still in its clip is seen by the shot, in which it has been away."""
    standing = camera_clip(thing=lambda t: (60, 30), pan=0)
    shot = shot_of(standing, {}, Path("none"))
    home = np.tile(np.eye(3), (8, 1, 1))
    assert find_changed(shot, home).mean() < 0.02
    shot.context = np.concatenate([camera_clip(count=20, pan=0), standing])
    changed = find_changed(shot, home)
    true = square_masks(8, lambda t: (60, 30))
    assert (changed & true).sum() / (changed | true).sum() > 0.7


def test_clips_of_one_video_share_no_frame():
    """A worked example: the surest first, what overlaps it goes, and so do those above the number."""
    clips = []
    for start, score in ((0, 0.6), (4, 0.9), (8, 0.7), (12, 0.8), (16, None)):
        row = {"confidence": {"margin": score, "cover": 1.0}}
        drafts = [Draft(row, "Moving Left")] if score else []
        clips.append((Clip(f"clip/{start}", times=list(range(start, start + 8))), drafts))
    kept, reasons = keep_apart(clips, Counter(), 4)
    assert [bool(drafts) for _, drafts in kept] == [False, True, False, True, False]
    assert sum(reasons.values()) == sum(bool(drafts) for _, drafts in clips) - 2
    kept, _ = keep_apart(clips, Counter(), 1)
    assert sum(bool(drafts) for _, drafts in kept) == 1


def test_a_camera_that_travels_is_told_from_one_that_turns():
    """K R K^-1 has no error; a plane seen while the camera passes it does."""
    shape = (90, 160)
    to_pixels = np.array([[150, 0, 80], [0, 150, 45], [0, 0, 1.0]])
    angle = np.radians(12)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    turned = to_pixels @ turn @ np.linalg.inv(to_pixels)
    assert evidence.turn_error(turned / turned[2, 2], shape) < 0.01
    travelled = to_pixels @ (turn + np.outer([0.3, 0, 0.2], [0, 0.8, 0.6])) @ np.linalg.inv(to_pixels)
    assert evidence.turn_error(travelled / travelled[2, 2], shape) > evidence.TURN_ERROR


@pytest.mark.parametrize("focal", [0.55, 0.67, 0.85, 1.3, 2.1])
def test_a_wide_turn_of_any_lens_is_a_turn(focal):
    """A pan over a third of the view has no error, whatever the focal length."""
    pan = turned(np.degrees(np.arctan(0.33 / focal)), "pan", focal)
    assert evidence.turn_error(pan, (90, 160)) < evidence.TURN_ERROR


def test_a_turn_changes_sizes_but_not_directions():
    """What a pan brings to the middle looks smaller there; as the first frame shows it, it is as large."""
    to_first = np.linalg.inv(turned(25, "pan"))
    stretch = evidence.stretch_at(to_first, 80, 45)
    twice_as_large = np.diag([2, 2, 1]) + [[0, 0, 5], [0, 0, 0], [0, 0, 0]]
    assert stretch > 0.1
    assert abs(evidence.stretch_at(twice_as_large, 3, 4) - np.log(2)) < 1e-6
    margins = []
    for shown in (0, stretch):
        track = SimpleNamespace(
            path=np.array([[0.3, 0.4], [0.4, 0.4], [0.5, 0.4]]),
            flow_way=np.array([0.2, 0]),
            growth=np.full(3, -stretch),
            stretch=shown,
        )
        label, margin = evidence.judge_direction(track)
        assert label == "Moving Right"
        margins.append(margin)
    assert margins[0] < 0.5 and margins[1] > 0.9


def test_a_thing_among_others_is_named_by_its_place():
    """Two squares move: the question says which one is meant."""
    first = camera_clip(pan=0, thing=lambda t: (20 + 7 * t, 10))
    second = camera_clip(pan=0, thing=lambda t: (110 - 6 * t, 55))
    still = camera_clip(pan=0)
    frames = np.where(np.abs(second.astype(int) - still).max(-1, keepdims=True) > 25, second, first)
    clip, reasons = made(frames, bar=0.4)
    assert "box" not in clip.facts[clip.moving[0]] and reasons[evidence.CROWD] == 1
    assert re.fullmatch(
        r"moving object that is at \[\d+, \d+\] at 0s|moving object that is at .* at \d+s", clip.moving[0]
    )


# ---------------------------------------------------------------- the toy world as video


def test_a_label_of_a_toy_video_is_true(tmp_path):
    """A clip without masks, read as mp4: the label is that of the thing's own path (tools/toy_videos.py)."""
    pytest.importorskip("av")
    c = SimpleNamespace(CAMERA="still", SEGMENTER="motion", MIN_CONFIDENCE=0.4, SIZE=320, FRAMES=22, FPS=12)
    judged, reasons, _ = judge_clip(stage_constants(c, tmp_path), 101, tmp_path, c.FPS)
    assert ("direction", True) in judged and all(is_right for _, is_right in judged), reasons
    # before a camera that pans too; one that travels gives none
    c.CAMERA = "moving"
    stage = stage_constants(c, tmp_path / "moving")
    judged, reasons, camera = judge_clip(stage, 10, tmp_path / "moving", c.FPS)
    assert camera == "turning" and ("direction", True) in judged, reasons
    assert all(is_right for _, is_right in judged)
    judged, reasons, camera = judge_clip(stage, 5, tmp_path / "moving", c.FPS)
    assert camera == "travelling" and not judged and "travels" in str(reasons)


def test_a_wrong_label_of_a_toy_video_is_counted_as_wrong():
    """The judge: another direction, or a mask of something else, is wrong; a box counts by its mask."""
    stage = constants(P_OBJECT_CLIP=1.0, P_OBJECT=(0.0, 0.0), P_ASKED=(0.0, 0.0, 0.0), LINES=())
    truth, _, _ = gd.toy_clip(stage, "train", 0)
    (name,) = truth.moving
    true = truth.facts[name]["direction"]
    masks, places = truth.masks[name], list(range(len(truth.times)))
    labels = {"direction": true, "box": ""}
    assert judge_labels(masks, labels, places, truth) == [("direction", True), ("box", True)]
    assert judge_labels(masks, {"direction": gd.opposite(true) + "?"}, places, truth) == [
        ("direction", False)
    ]
    elsewhere = np.roll(masks, masks.shape[2] // 2, 2)
    assert judge_labels(elsewhere, labels, places, truth) == [("direction", False), ("box", False)]


def test_noise_is_no_texture():
    """Pixel noise is measured beside texture, to a fifth; a bare, noisy surface has no texture that moves."""
    rng = np.random.default_rng(0)
    picture = texture(cell=4)[:90, :160]
    picture[:45] = 120
    noisy = picture + rng.normal(0, 4, picture.shape)
    assert 3.2 < pixel_noise(noisy) < 4.8 and pixel_noise(picture) < 1
    other = picture + rng.normal(0, 4, picture.shape)
    _, seen = measure_flow(normalise(noisy), normalise(other), np.eye(3))
    has_texture = seen > LEAST_TEXTURE
    assert has_texture[5:35].mean() < 0.1 and has_texture[55:].mean() > 0.9


def test_flow_is_filled_in_on_a_bare_surface():
    """Worked example: a corner moves by 2, so does what is near it; what is far from all texture does not."""
    flow, has_texture = np.zeros((60, 60, 2)), np.zeros((60, 60), bool)
    has_texture[10:14, 10:14] = True
    flow[10:14, 10:14] = [2, 0]
    filled = fill_flow(flow, has_texture)
    assert np.allclose(filled[12, 18], [2, 0]) and not filled[40:, 40:].any()
    assert np.allclose(filled[has_texture], [2, 0])


def test_an_outline_is_filled():
    """The inside of a ring belongs to it."""
    ring = np.zeros((30, 30), bool)
    ring[5:25, 5:25] = True
    ring[8:22, 8:22] = False
    assert fill_inside(ring)[5:25, 5:25].all() and fill_inside(ring).sum() == 400


# ---------------------------------------------------------------- cuts


def test_a_shaken_camera_has_no_cuts_and_a_cut_is_one():
    """Shifts by a fifth of the frame keep the colours; another place has others."""
    rng = np.random.default_rng(0)
    ground = np.stack([texture(seed, cell=30) for seed in (1, 2, 3)], -1).astype(np.uint8)
    shaken = []
    for _ in range(16):
        x, y = rng.integers(120, 152), rng.integers(80, 98)
        shaken.append(ground[y : y + 90, x : x + 160])
    assert find_cuts(np.stack(shaken), gd.CUT_CHANGE) == []
    other = np.stack([frame // 3 + 100 for frame in shaken])
    assert find_cuts(np.concatenate([shaken, other]), gd.CUT_CHANGE) == [16]


def test_frames_between_are_chosen_evenly():
    """The worked example, and a video of few frames, which has none between."""
    assert choose_frames(np.arange(16) / 30, 4, 2) == ([0, 7, 15], [0, 2, 4, 7, 9, 12, 15])
    assert choose_frames(np.arange(4) / 4, 4, 2) == ([0, 1, 2, 3], [0, 1, 2, 3])


# ---------------------------------------------------------------- files


def test_all_containers_and_linked_folders_are_read(monkeypatch, tmp_path, capsys):
    """Six endings, one of them in a linked folder; a sheet is drawn by default, its path comes last."""
    frames = moving_square(5, 0, -1, count=14)
    codecs = {".webm": "libvpx"}
    for number, ending in enumerate(ENDINGS):
        folder = tmp_path / ("elsewhere" if number == 2 else "in")
        write_video(folder / f"clip{number}_a{ending}", frames, 10, codecs.get(ending, "mpeg4"))
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/linked")
    words = [
        f"VIDEOS={tmp_path / 'in'}",
        f"OUT={tmp_path / 'out'}",
        "SAMPLE_FPS=5",
        "WORKERS=1",
        "MAX_SIDE=96",
    ]
    run_script(monkeypatch, "generate_data.py", "SOURCE=videos", *words)
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "out/train_imagery.jsonl") + rows_of(tmp_path / "out/test_imagery.jsonl")
    assert {Path(row["video"]).suffix for row in rows} == set(ENDINGS), said
    assert {label_of(row) for row in rows if row["subtask"] == "object_direction"} == {"Moving Right"}
    assert said.rstrip().endswith(str(tmp_path / "out/inspect.png"))
    assert Image.open(tmp_path / "out/inspect.png").size[0] == 1280


def test_a_folder_without_videos_names_the_endings(tmp_path):
    """One sentence with all that is read."""
    refused(lambda: list_videos(str(tmp_path), "", 0, 0.2), "VIDEOS=", *ENDINGS)


def test_times_without_timestamps_are_by_the_rate():
    """decord's -3e17 for each frame of an AVI; a timestamp that is one stays."""

    class Reader:
        """What is called of decord's."""

        def __init__(self, times):
            self.times = np.array(times)

        def __len__(self):
            return len(self.times)

        def get_frame_timestamp(self, numbers):
            return np.stack([self.times, self.times], 1)

        def get_avg_fps(self):
            return 10.0

    assert video_readers.read_times(Reader([-3e17, -3e17, -3e17])).tolist() == [0, 0.1, 0.2]
    assert video_readers.read_times(Reader([-0.1, 0, 0.1])).tolist() == [-0.1, 0, 0.1]


def test_no_split_stays_empty(capsys):
    """The last scene with rows is handed over, whole; a single one is in both, and the run says so."""

    def drafts(*names):
        return [Draft({"video": name}, "") for name in names]

    found = fill_empty_split({"train": drafts("a_1.mp4", "b_1.mp4", "b_2.mp4"), "test": []})
    videos_of = {split: [draft.row["video"] for draft in rows] for split, rows in found.items()}
    assert videos_of == {"train": ["a_1.mp4"], "test": ["b_1.mp4", "b_2.mp4"]}
    both = fill_empty_split({"train": [], "test": drafts("a_1.mp4")})
    assert len(both["train"]) == len(both["test"]) == 1 and "no other scene" in capsys.readouterr().out
    assert fill_empty_split({"train": [], "test": []}) == {"train": [], "test": []}


# ---------------------------------------------------------------- boxes of a tracker


def test_boxes_are_read_with_and_without_a_header(tmp_path):
    """Ours, MOTChallenge's, and lines that are no boxes."""
    ours, mot, bad = tmp_path / "ours.csv", tmp_path / "mot.txt", tmp_path / "bad.csv"
    ours.write_text("frame,id,x1,y1,x2,y2\n0,7,10,20,30,50\n3,7,12,20,32,50\n")
    mot.write_text("1,2,10,20,20,30,0.9,-1,-1,-1\n1,5,0,0,5,5,1,-1,-1,-1\n")
    assert read_boxes(ours) == {"7": {0: (10, 20, 30, 50), 3: (12, 20, 32, 50)}}
    assert read_boxes(mot) == {"2": {0: (10, 20, 30, 50)}, "5": {0: (0, 0, 5, 5)}}
    bad.write_text("frame,x1,y1,x2,y2\n0,10,20,30,50\n1,10,20,nan,50\n")
    refused(lambda: read_boxes(bad), "bad.csv:3")
    mask = draw_box((-3, 2.4, 4, 99), (10, 8))
    assert mask.shape == (8, 10) and (mask[2:, :4] == 255).all() and mask.sum() == 255 * 24


def test_boxes_of_a_tracker_make_rows(monkeypatch, tmp_path, capsys):
    """A CSV of every frame's box: masks of the frames that are taken, then a direction."""
    frames = moving_square(4, 0, -1, count=16)
    write_video(tmp_path / "in/a.mp4", frames, 10)
    lines = ["frame,x1,y1,x2,y2"]
    lines += [f"{t},{20 + 3 * t},10,{44 + 3 * t},34" for t in range(16)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    words = [f"VIDEO_FILE={tmp_path / 'in/a.mp4'}", f"BOXES={tmp_path / 'a.csv'}", "FPS=5"]
    run_script(monkeypatch, "tools/boxes_to_masks.py", *words)
    assert "masks of 8 of 8 frames" in capsys.readouterr().out
    refused(lambda: run_script(monkeypatch, "tools/boxes_to_masks.py", *words, "TRACK=9"), "TRACK=9")
    words = [f"VIDEOS={tmp_path / 'in'}", f"OUT={tmp_path / 'out'}", "SAMPLE_FPS=5", "WORKERS=1"]
    run_script(monkeypatch, "generate_data.py", "SOURCE=videos", "SEGMENTER=files", *words)
    rows = rows_of(tmp_path / "out/train_imagery.jsonl")
    labels = Counter(label_of(row) for row in rows if row["subtask"] == "object_direction")
    assert set(labels) == {"Moving Right"}
