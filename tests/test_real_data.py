"""Real clips in: a miniature SpatialVID in its own formats, made from toy clips whose truth is known."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, one_thread, refused, run_script
from PIL import Image

import generate_data as gd
from lib import spatialvid
from lib.command_line import override_constants
from lib.footage import Shot, list_videos, split_into_windows
from lib.geometry import (
    cameras_from_poses,
    depth_inside,
    object_labels,
    path_labels,
    view_width,
)
from lib.ray_tracer import camera_rays, hit_thing
from lib.rows import read_rows
from lib.segmenters import dyn as segment_dyn
from lib.segmenters import files as segment_files
from lib.vocabulary import MOVES
from tools import toy_videos

FLIP = np.array([1, -1, 1])  # our axes are right, up, forward; OpenCV's are right, down, forward


def constants(**changes):
    """Constants of generate_data.py, masks from files unless a test says motion."""
    c = override_constants(vars(gd), ["SEGMENTER=files"])
    vars(c).update(changes)
    return c


TOY = constants()  # what the toy clips are made with


def consistent(masks):
    """Eq. 2 with the script's constants."""
    return gd.consistent(masks, TOY.MIN_MASK, TOY.MAX_GROWTH)


def contradicts(label, start, end):
    """Eq. 3 with the script's constants."""
    return gd.contradicts(label, start, end, TOY.CUE_SLACK)


def thing_path(clip, name):
    """The way (T, 3) of a thing of a toy clip."""
    return next(thing.path for thing in clip.scene.things if thing.name == name)


def shot_of(frames, notes, folder):
    """Frames (T, H, W, 3) with annotations, a second apart, as the stage reads them from a video."""
    return Shot("clip/00000", frames, list(range(len(frames))), 0, notes, folder)


def write_video(path, frames, fps=10, codec="mpeg4"):
    """frames (T, H, W, 3) uint8 -> a video file; without PyAV the test is skipped."""
    pytest.importorskip("av")
    toy_videos.write_video(path, frames, fps, codec)


def quaternion(turn):
    """A rotation matrix (3, 3) of less than a half turn -> x, y, z, w."""
    w = np.sqrt(1 + np.trace(turn)) / 2
    x, y, z = turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]
    return [x / (4 * w), y / (4 * w), z / (4 * w), w]


def poses_of(pos, rot):
    """The toy's camera -> SpatialVID's poses (T, 7): world to camera, OpenCV axes, a right-handed world."""
    rows = []
    for place, turn in zip(pos * FLIP, rot):
        to_camera = (FLIP[:, None] * turn * FLIP).T
        rows.append([*(-to_camera @ place), *quaternion(to_camera)])
    return np.array(rows)


def notes_of(clip):
    """A toy clip's truth as SpatialVID's annotations, as read_notes gives them."""
    count, focal = len(clip.times), 1 / view_width(TOY.HFOV)
    short = {"Clockwise": "CW", "Counter-Clockwise": "CCW"}
    spans = {}
    for start, end, label in clip.camera or [(0, count - 1, "Stay")]:
        moves = [move.split(" ") for move in label.split(" and ")]
        spans[f"{start}->{end}"] = [" ".join(short.get(word, word) for word in move) for move in moves]
    notes = {"indexes": np.arange(count) * 2, "poses": poses_of(clip.scene.pos, clip.scene.rot)}
    notes |= {"intrinsics": np.tile([focal, focal, 0.5, 0.5], (count, 1)), "instructions": spans}
    notes["objects"] = {"static_object": clip.static[0]} if clip.static else {}
    if clip.moving:
        notes["objects"]["dynamic_object"] = clip.moving[0]
    return notes


def depths_of(clip):
    """The depth of each pixel of a toy clip (T, H, W) by the toy's own rays: ground and things, else 100."""
    pos, rays = clip.scene.pos.astype(np.float32), camera_rays(clip.scene.rot, TOY.SIZE, TOY.HFOV)
    nearest = pos[:, 1, None, None] / np.maximum(-rays[1], 1e-3)
    for thing in clip.scene.things:
        origin = (pos - thing.path.astype(np.float32)).T[:, :, None, None]
        nearest = np.minimum(nearest, hit_thing(thing, origin, rays)[0])
    return np.minimum(nearest, 100)


def write_depths(path, depths):
    """Depths (T, H, W) as a npy or npz file, or as SpatialVID's zip of EXR files with inverse depth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, depths)
    elif path.suffix == ".npz":
        np.savez_compressed(path, depth=depths)
    else:
        exr = pytest.importorskip("OpenEXR")
        with zipfile.ZipFile(path, "w") as archive:
            for number in sorted(range(len(depths)), key=str):  # 10 stands before 2, as in a listing
                one, header = path.with_suffix(".exr"), {"compression": exr.ZIP_COMPRESSION}
                with exr.File(
                    header | {"type": exr.scanlineimage}, {"Z": np.float16(1 / depths[number])}
                ) as file:
                    file.write(str(one))
                archive.write(one, f"{path.stem}/{number}.exr")
                one.unlink()


def pack_masks(masks):
    """masks (T, H, W) -> the arrays of a dyn_masks.npz: one compressed sparse row matrix a frame."""
    arrays = {"shape": np.array(masks.shape[1:])}
    for number, mask in enumerate(masks):
        arrays[f"f_{number}_indices"] = np.nonzero(mask)[1].astype(np.int32)
        arrays[f"f_{number}_indptr"] = np.append(0, mask.sum(1).cumsum()).astype(np.int32)
        arrays[f"f_{number}_data"] = np.ones(mask.sum(), bool)
    return arrays


def write_clip(root, name, clip, notes):
    """One clip of a miniature SpatialVID: each toy frame twice in the mp4, so that indexes are 0, 2, 4."""
    seconds = clip.times[1] - clip.times[0]
    write_video(root / f"videos/{name}.mp4", np.repeat(clip.frames, 2, 0), int(2 / seconds))
    folder = root / f"annotations/{name}"
    folder.mkdir(parents=True)
    lines = [f"# total {len(notes['indexes'])} indexes"]
    lines += [f"{number} {index}" for number, index in enumerate(notes["indexes"])]
    (folder / "indexes.txt").write_text("\n".join(lines) + "\n")
    for kind in ("poses", "intrinsics"):
        if kind in notes:
            np.save(folder / f"{kind}.npy", notes[kind])
    for kind in ("instructions", "objects"):
        (folder / f"{kind}.json").write_text(json.dumps(notes[kind]))
    (folder / "caption.json").write_text(
        json.dumps({"SceneSummary": "A plain.", "CameraMotion": "It moves."})
    )
    moving = [clip.masks[thing] for thing in clip.moving]
    np.savez_compressed(
        folder / "dyn_masks.npz", **pack_masks(np.any([clip.masks["sun"] & False, *moving], 0))
    )
    for role, things in (("static", clip.static), ("dynamic", clip.moving)):
        for number, mask in enumerate(clip.masks[things[0]] if things else []):
            (folder / f"masks_{role}").mkdir(exist_ok=True)
            Image.fromarray(mask).save(folder / f"masks_{role}/frame_{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def clips():
    """Toy clips, the truth of this file."""
    return [gd.toy_clip(TOY, "train", number)[0] for number in range(60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory, clips):
    """A miniature SpatialVID of 14 clips in two groups."""
    root = tmp_path_factory.mktemp("spatial vid ü")
    for number, clip in enumerate(clips[:14]):
        write_clip(root, f"group_{number % 2:04d}/{number:04d}-uuid", clip, notes_of(clip))
    return root


def generate(monkeypatch, world, out, *words):
    """Runs the stage over a SpatialVID folder -> the rows of both splits, by split."""
    run_script(
        monkeypatch,
        "generate_data.py",
        "SOURCE=spatialvid",
        "SEGMENTER=files",
        f"VIDEOS={world}",
        f"OUT={out}",
        *words,
    )
    return {split: rows_of(out / f"{split}_imagery.jsonl") for split in ("train", "test")}


def rows_of(path):
    """The raw rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def label_of(row):
    """The text of a row's answer, without its letter."""
    return re.search(r"<answer>[A-D]\. (.*)</answer>", row["text_output"])[1]


# ---------------------------------------------------------------- reading


def test_poses_are_world_to_camera_in_opencv_axes(clips):
    """A hand-worked pose, and the toy's cameras there and back."""
    half = np.sqrt(0.5)
    pos, rot = cameras_from_poses(np.array([[0, 0, 5, 0, 0, 0, 1.0], [1, 0, 0, 0, half, 0, half]]))
    assert pos[0].tolist() == [0, 0, -5]  # the world's origin stands 5 before the camera
    assert rot[0].tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, 1]]  # up is against OpenCV's y
    # a quarter turn about y, world to camera: x' = z, z' = -x; the camera looks along the world's -x
    assert np.allclose(rot[1][:, 2], [-1, 0, 0]) and np.allclose(rot[1][:, 0], [0, 0, 1])
    assert np.allclose(pos[1], [0, 0, -1])
    for clip in clips[:5]:
        pos, rot = cameras_from_poses(poses_of(clip.scene.pos, clip.scene.rot))
        assert np.allclose(pos * FLIP, clip.scene.pos) and np.allclose(FLIP[:, None] * rot, clip.scene.rot)


def test_instructions_become_labels_in_our_words():
    """CW and CCW are spelled out, "Stay" is never a label, opposites at once are no label, n is n - 1."""
    spans = {"0->3": ["Stay"], "3->5": ["Roll CCW", "Dolly In", "Pan Left"], "5->8": ["Roll CW", "Stay"]}
    spans |= {"1->2": ["Pan Left", "Pan Right"], "7->8": ["Dolly In"]}
    found = spatialvid.camera_segments(spans, 8, MOVES)
    assert found == [(3, 5, "Pan Left and Roll Counter-Clockwise and Dolly In"), (5, 7, "Roll Clockwise")]
    with pytest.raises(ValueError):
        spatialvid.camera_segments({"0->1": ["Zoom In"]}, 8, MOVES)


@pytest.mark.parametrize(
    "label", ["Pan Left", "Pan Left and Truck Right", "Tilt Up and Roll Clockwise and Dolly In"]
)
def test_options_of_any_camera_label_are_two_opposites(label):
    """Also for pairs that the toy never has, and for three movements: four options, all with opposites."""
    for seed in range(20):
        for other in (None, "Pan Right", "Dolly In", label):
            options = gd.camera_options(np.random.default_rng(seed), label, other)
            assert options[0] == label and len(set(options)) == 4
            assert {gd.opposite(option) for option in options} == set(options)
            assert len({option.count(" and ") for option in options}) == 1


def test_mask_images_are_read_at_the_size_of_the_frames(tmp_path):
    """White is the object, a missing image an empty mask; the image may be larger than the frame."""
    mask = np.zeros((60, 80), np.uint8)
    mask[:30, :40] = 255
    Image.fromarray(mask).save(tmp_path / "frame_0001.png")
    files = [tmp_path / f"frame_{number:04d}.png" for number in range(3)]
    masks = segment_files.masks(np.zeros((3, 30, 40, 3), np.uint8), "", files, "")
    assert masks.shape == (3, 30, 40) and not masks[[0, 2]].any()
    assert masks[1, :15, :20].all() and masks[1].sum() == 300


def test_consistency_filter_drops_frames():
    """Eq. 2 on worked areas: a speck, a jump to five times the size and an empty mask are dropped."""
    masks = np.zeros((6, 100, 100), bool)
    for number, area in enumerate([400, 500, 9, 2500, 0, 600]):
        masks[number].reshape(-1)[:area] = True
    assert consistent(masks).tolist() == [True, True, False, False, False, True]
    assert not consistent(masks & False).any()


# ---------------------------------------------------------------- labels


def test_the_landmark_proves_or_contradicts_the_camera_label():
    """Eq. 3: a landmark that goes left proves a pan to the right; growth off the centre is no pan."""

    def square(x, y, side):
        mask = np.zeros((200, 200), bool)
        mask[y - side // 2 : y + side // 2, x - side // 2 : x + side // 2] = True
        return mask

    start, left, grown = square(100, 100, 20), square(60, 100, 20), square(100, 100, 40)
    for label in ("Pan Right", "Truck Right", "Pan Right and Tilt Up", "Dolly In", "Roll Clockwise"):
        assert not contradicts(label, start, left), label
    assert contradicts("Pan Left", start, left) and contradicts("Truck Left and Dolly In", start, left)
    assert not contradicts("Pan Left and Roll Clockwise", start, left)  # a roll moves it too
    assert not contradicts("Pan Left and Truck Right", start, left)  # they may cancel
    assert contradicts("Dolly Out", start, grown) and not contradicts("Dolly In", start, grown)
    aside = square(140, 100, 20), square(180, 100, 40)  # twice as near: 40 pixels off the centre become 80
    assert not contradicts("Pan Right and Dolly In", *aside)
    assert not contradicts("Pan Left and Dolly In", *aside)


def test_true_labels_are_hardly_ever_contradicted(clips):
    """The toy's own camera labels pass, their opposites do not."""
    passed, caught, count = 0, 0, 0
    for clip in clips:
        for start, end, label in clip.camera:
            masks = clip.masks[clip.static[0]][[start, end]]
            if masks.mean((1, 2)).min() < 0.005 or "Roll" in label:
                continue
            count += 1
            passed += not contradicts(label, *masks)
            caught += contradicts(gd.opposite(label), *masks)
    assert count > 15 and passed >= 0.95 * count and caught >= 0.9 * count


def agreement(clips, has_depth=False):
    """Labels read from masks, poses and depth against the toy's truth: Counter of (ask, label, verdict)."""
    seen = Counter()
    for clip in clips:
        for thing in clip.moving:
            masks = clip.masks[thing] & consistent(clip.masks[thing])[:, None, None]
            if masks.any((1, 2)).sum() < len(masks):
                continue  # the truth is that of all frames
            notes = notes_of(clip) | ({"depths": depths_of(clip)} if has_depth else {})
            facts = object_labels(masks, notes, TOY.HFOV)
            truth = path_labels(thing_path(clip, thing), clip.scene.pos, clip.scene.rot)
            for ask in ("direction", "distance"):
                verdict = "unasked" if ask not in facts else "right" if facts[ask] == truth[ask] else "wrong"
                seen[ask, truth[ask], verdict if truth[ask] else "unclear"] += 1
    return seen


def test_geometry_finds_the_toys_labels(clips):
    """Camera motion removed by the poses: what is asked is right in 95 of 100 cases."""
    seen = agreement(clips)
    counts = Counter()
    for (ask, _, verdict), count in seen.items():
        counts[ask, verdict] += count
    for ask in ("direction", "distance"):
        right, wrong = counts[ask, "right"], counts[ask, "wrong"]
        assert right > 20 and right >= 0.95 * (right + wrong), counts


def test_depth_gives_more_labels_that_are_as_right(clips):
    """With depth maps: as right as without, and the camera may travel, so more is asked."""
    counts = {}
    for has_depth in (False, True):
        for (ask, _, verdict), count in agreement(clips, has_depth).items():
            counts.setdefault((ask, has_depth), Counter())[verdict] += count
    print("\n".join(f"{ask}, depth {has_depth}: {dict(c)}" for (ask, has_depth), c in counts.items()))
    for ask in ("direction", "distance"):
        without, given = counts[ask, False], counts[ask, True]
        assert given["right"] >= 1.2 * without["right"], counts
        assert given["wrong"] <= without["wrong"], counts


def test_depth_is_the_median_inside_the_mask():
    """A worked example at half the mask's size: holes are left out, one odd pixel does not count."""
    mask = np.zeros((4, 8), bool)
    mask[:2, 2:] = True  # covers columns 1 to 3 of the first row of the map
    depth = np.array([[50, 2, 3, 90], [50, 50, 50, 50.0]])
    assert depth_inside(depth, mask) == 3
    assert depth_inside(np.where(depth == 90, np.nan, depth), mask) == 2.5


class StandIn:
    """What is called of OpenEXR, with numpy's file format inside."""

    scanlineimage = ZIP_COMPRESSION = 0

    class File(contextlib.nullcontext):
        """A file to be written, of a header and channels, or one that is read from a stream."""

        def __init__(self, source, channels=None):
            super().__init__(self)
            self.arrays = channels or dict(np.load(source))

        def write(self, name):
            """Writes it under a name."""
            with open(name, "wb") as file:
                np.savez(file, **self.arrays)

        def channels(self):
            """Channels by name; each has its pixels."""
            return {name: SimpleNamespace(pixels=array) for name, array in self.arrays.items()}


@pytest.fixture(params=["OpenEXR", "stand-in"])
def exr(request, monkeypatch):
    """The library, which is not among the requirements, and a stand-in."""
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "OpenEXR", StandIn)
    return pytest.importorskip("OpenEXR")


def read_back(folder, ending):
    """Writes eleven depth maps, so that number 10 follows 9, and reads them from both of their places."""
    depths = np.float32(2) ** np.arange(11)[:, None, None] * np.ones((11, 6, 8), np.float32) / 20
    depths[:, 0, 0] = 100
    write_depths(folder / f"depths/g/a.b{ending}", depths)
    (folder / "notes").mkdir()
    notes = spatialvid.read_notes(folder / "notes", folder / "depths/g/a.b", False)
    assert list(notes) == ["depths"] and np.allclose(notes["depths"], depths, rtol=2e-3)
    write_depths(folder / f"notes/depths{ending}", depths[:3])
    assert len(spatialvid.read_notes(folder / "notes", folder / "depths/g/other", False)["depths"]) == 3


@pytest.mark.parametrize("ending", [".npy", ".npz"])
def test_depth_maps_are_read_from_arrays(tmp_path, ending):
    """depths/<group>/<id>, or depths in the clip's own folder."""
    read_back(tmp_path, ending)


def test_depth_maps_are_read_from_exr_files(exr, tmp_path):
    """The same from a zip of EXR files of inverse depth."""
    read_back(tmp_path, ".zip")


def test_inverse_depth_is_clipped(exr, tmp_path):
    """As SpatialVID's own reader: 1 / z between 0.001 and 100; nothing and less than nothing are far."""
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
    with exr.File(header, {"Z": np.float16([[0, -1, 0.001, 0.5, 20000]])}) as file:
        file.write(str(tmp_path / "0.exr"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "0.exr", "0.exr")
    depths = spatialvid.read_exr_depths(tmp_path / "a.zip")
    assert np.allclose(depths, [[[100, 100, 100, 2, 0.001]]], rtol=1e-3)


def test_a_missing_exr_library_is_one_sentence(monkeypatch, tmp_path):
    """It names the file and how to install the library; the run ends, it is no unreadable clip."""
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    (tmp_path / "depths.zip").write_bytes(b"")
    refused(
        lambda: spatialvid.read_notes(tmp_path, tmp_path / "a", False), "depths.zip", "pip install OpenEXR"
    )


def test_a_travelling_camera_needs_agreement():
    """A thing that lags behind a truck to the right moves right if it is near, left if it is far: unclear."""
    masks = np.zeros((4, 40, 40), bool)
    for mask, left in zip(masks, (22, 20, 17, 15)):
        mask[15:25, left : left + 10] = True
    poses = np.tile([0, 0, 0, 0, 0, 0, 1.0], (4, 1))
    poses[:, 0] = [0, -1, -2, -3]  # the camera goes right by 3
    assert "direction" not in object_labels(masks, {"poses": poses}, TOY.HFOV)
    assert object_labels(masks, {"poses": poses[[0] * 4]}, TOY.HFOV)["direction"] == "Moving Left"
    assert list(object_labels(masks, {}, TOY.HFOV)) == ["distance"]  # no poses: no direction


# ---------------------------------------------------------------- the whole stage


def test_a_miniature_spatialvid_becomes_rows(world, clips, monkeypatch, tmp_path, capsys):
    """Every row is valid, has true times, the truth of its clip as key, and its evidence."""
    rows = generate(monkeypatch, world, tmp_path / "out", "WORKERS=2")
    everything = rows["train"] + rows["test"]
    told = capsys.readouterr().out
    assert re.search(r"decoded: 112 frames, [1-9]\d*\.\d frames/s/worker", told)
    count = 112 + sum(TOY.FRAMES for clip in clips[:14] if clip.camera)  # the landmark's masks as well
    assert re.search(rf"segmented: {count} masks, [1-9]\d*\.\d masks/s/worker", told), told
    assert "annotator:" not in told
    asked = Counter(row["subtask"] for row in everything)
    assert sum(asked.values()) > 14 and {"camera_single", "object_direction"} <= set(asked)
    for row in everything:
        clip = clips[int(row["video"].split("/")[1][:4])]
        assert row["times"] == clip.times and len(row["image_input"]) == TOY.FRAMES
        options = dict(re.findall(r"^([A-D])\. (.*)$", row["text_input"], flags=re.M))
        assert "Stay" not in options.values() and "CW" not in str(options)
        assert (
            gd.validate(row, next(letter for letter in options if options[letter] == label_of(row))) is None
        )
        if row["subtask"].startswith("camera"):
            start, end = (int(number) for number in row["id"].rpartition("_")[2].split("->"))
            assert (start, end, label_of(row)) in clip.camera
            cue = gd.static_cue(*clip.masks[clip.static[0]][[start, end]])
            assert np.allclose(row["static_cue"], cue, atol=0.02) and row["contradicted"] is False
            assert clip.static[0] in row["text_output"]
        else:
            assert clip.moving[0] in row["text_input"]
    for split in rows:
        read = read_rows(tmp_path / "out" / f"{split}_imagery.jsonl")
        frame = np.asarray(Image.open(read[0].image_input[3])).astype(int)
        clip = clips[int(rows[split][0]["video"].split("/")[1][:4])]
        assert np.abs(frame - clip.frames[3]).mean() < 12  # the annotated frame, not its neighbour
        assert np.abs(frame - clip.frames[0]).mean() > np.abs(frame - clip.frames[3]).mean()


@pytest.mark.parametrize("ending", [".npz", ".zip"])
def test_the_stage_asks_more_where_depth_is_given(clips, monkeypatch, tmp_path, ending):
    """Depth maps at half the frames' size: every key is the toy's truth, also where the camera travels."""
    chosen = [clip for clip in clips if clip.moving and clip.camera and not clip.static[1:]][:8]
    for number, clip in enumerate(chosen):
        write_clip(tmp_path / "in", f"g/{number}_a", clip, notes_of(clip))
    before = generate(monkeypatch, tmp_path / "in", tmp_path / "without", "WORKERS=1", "MAX_SIDE=84")
    for number, clip in enumerate(chosen):
        write_depths(tmp_path / f"in/depths/g/{number}_a{ending}", depths_of(clip)[:, ::2, ::2])
    after = generate(monkeypatch, tmp_path / "in", tmp_path / "with", "WORKERS=1", "MAX_SIDE=84")
    found = {}
    for name, rows in (("before", before), ("after", after)):
        for row in rows["train"] + rows["test"]:
            ask = row["subtask"].removeprefix("object_")
            if ask in ("direction", "distance"):
                clip = chosen[int(row["video"][2])]
                path = thing_path(clip, clip.moving[0])
                truth = path_labels(path, clip.scene.pos, clip.scene.rot)[ask]
                found.setdefault(name, []).append(label_of(row) == truth or truth is None)
    assert all(found["after"]) and len(found["after"]) > len(found["before"]) > 0


def test_a_depth_map_too_few_is_a_clip_left_out(clips, monkeypatch, tmp_path, capsys):
    """Seven maps for eight frames: counted and named, the other clips are used."""
    for number, clip in enumerate(clips[:3]):
        write_clip(tmp_path / "in", f"g/{number}_a", clip, notes_of(clip))
    write_depths(tmp_path / "in/depths/g/1_a.npy", np.ones((7, 9, 9)))
    rows = generate(monkeypatch, tmp_path / "in", tmp_path / "out", "WORKERS=1", "HELD_OUT=0.3")
    assert {row["video"] for row in rows["train"] + rows["test"]} == {"g/0_a.mp4", "g/2_a.mp4"}
    told = capsys.readouterr().out
    assert re.search(r"dropped: 1 clips have not one pose and depth map a frame.*1_a\.mp4", told)


def test_contradicted_labels_are_dropped_or_flagged(clips, monkeypatch, tmp_path, capsys):
    """A label turned round: dropped with its clip named; DROP_CONTRADICTED=False keeps and flags it."""
    chosen = [clip for clip in clips if clip.camera and "Pan" in str(clip.camera) and clip.static]
    chosen = [clip for clip in chosen if len(clip.camera) == 1 and "Roll" not in str(clip.camera)]
    chosen = [clip for clip in chosen if consistent(clip.masks[clip.static[0]])[[0, -1]].all()][:3]
    for number, clip in enumerate(chosen):
        notes = notes_of(clip)
        if number == 1:
            wrong = replace(clip, camera=[(*part[:2], gd.opposite(part[2])) for part in clip.camera])
            notes["instructions"] = notes_of(wrong)["instructions"]
        write_clip(tmp_path / "in", f"group_0/{'abc'[number]}", clip, notes)
    for drop in (True, False):
        words = (f"DROP_CONTRADICTED={drop}", "WORKERS=1", "HELD_OUT=0.3")
        rows = generate(monkeypatch, tmp_path / "in", tmp_path / f"out{drop}", *words)
        flags = {
            row["video"]: row["contradicted"] for row in rows["train"] + rows["test"] if "static_cue" in row
        }
        odd = {"group_0/b.mp4": True}
        assert flags == {"group_0/a.mp4": False, "group_0/c.mp4": False} | ({} if drop else odd)
        told = capsys.readouterr().out
        assert re.search(r"dropped: 1 camera labels are contradicted.*b\.mp4", told)


def test_bad_clips_are_counted_and_named(clips, monkeypatch, tmp_path, capsys):
    """Truncated, empty, audio-only, one-frame and odd-sized videos, broken annotations, equal names."""
    av = pytest.importorskip("av")
    good = [clip for clip in clips if clip.camera and clip.static][:4]
    for number, name in enumerate(["g1/same", "g2/same", "g1/odd størrelse", "g1/short"]):
        clip = good[number]
        if "odd" in name:
            masks = {n: m[:, :55, :53] for n, m in clip.masks.items()}
            clip = replace(clip, frames=clip.frames[:, :55, :53], masks=masks)
        write_clip(tmp_path / "in", name, clip, notes_of(clip))
    videos, notes = tmp_path / "in/videos", tmp_path / "in/annotations"
    for name in ("cut", "empty", "audio", "one", "nopose", "long", "words", "mask"):
        shutil.copytree(notes / "g1/same", notes / f"g1/{name}")
        shutil.copy(videos / "g1/same.mp4", videos / f"g1/{name}.mp4")
    whole = (videos / "g1/same.mp4").read_bytes()
    (videos / "g1/cut.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "g1/empty.mp4").write_bytes(b"")
    with av.open(str(videos / "g1/audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    write_video(videos / "g1/one.mp4", good[0].frames[:1])
    (notes / "g1/nopose/poses.npy").unlink()
    write_video(videos / "g1/long.mp4", np.repeat(good[0].frames, 7, 0)[:51])
    lines = [f"{number} {number}" for number in range(51)]
    (notes / "g1/long/indexes.txt").write_text("\n".join(lines))
    (notes / "g1/words/instructions.json").write_text('{"0->7": ["Zoom In"]}')
    (notes / "g1/mask/masks_static/frame_0000.png").write_bytes(b"no image")
    np.save(notes / "g1/short/poses.npy", np.zeros((3, 7)))
    rows = generate(monkeypatch, tmp_path / "in", tmp_path / "out", "WORKERS=2", "HELD_OUT=0.3", "SEED=1")
    everything = rows["train"] + rows["test"]
    told = capsys.readouterr().out
    used = {row["video"] for row in everything}
    assert used == {"g1/same.mp4", "g2/same.mp4", "g1/odd størrelse.mp4"}
    assert len({row["clip"] for row in everything}) == 3  # two clips of one name stay two
    for reason, names in {
        "clips are unreadable": ["cut", "empty", "audio", "one", "nopose", "words", "mask"],
        "have not one pose and depth map a frame": ["long", "short"],
    }.items():
        listed = "\n".join(line for line in told.split("\n") if reason in line)
        counts = [int(count) for count in re.findall(r"dropped: (\d+)", listed)]
        assert sum(counts) == len(names), told
        assert sum(f"{name}.mp4" in listed for name in names) >= min(3, len(names)), told
    folders = [folder.name for folder in (tmp_path / "out/processed_data").iterdir()]
    assert len(folders) == 3 and not any(name.endswith(".part") for name in folders)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert sum(len(names) for reason, names in meta["dropped"].items() if "unreadable" in reason) == 7


def test_a_folder_of_videos_has_object_questions_alone(clips, monkeypatch, tmp_path):
    """SOURCE="videos": frames at SAMPLE_FPS with their times; masks beside the mp4, no poses needed."""
    for number, clip in enumerate([clip for clip in clips if clip.moving and not clip.camera][:8]):
        folder = write_clip(tmp_path / "made", f"{number}", clip, notes_of(clip))
        write_video(tmp_path / f"in/clip {'abcdefgh'[number]}.mp4", np.repeat(clip.frames, 5, 0), 10)
        shutil.copytree(folder / "masks_dynamic", tmp_path / f"in/clip {'abcdefgh'[number]}/masks_dynamic")
    words = (f"VIDEOS={tmp_path / 'in'}", f"OUT={tmp_path / 'out'}", "SAMPLE_FPS=2", "WORKERS=1")
    run_script(monkeypatch, "generate_data.py", "SOURCE=videos", "SEGMENTER=files", *words)
    rows = rows_of(tmp_path / "out/train_imagery.jsonl")
    assert {row["subtask"] for row in rows} <= {"object_box", "object_direction", "object_distance"} and rows
    assert all(min(row["confidence"].values()) >= TOY.MIN_CONFIDENCE for row in rows)
    assert all(np.allclose(row["times"], np.arange(8) / 2, atol=0.01) for row in rows)
    assert all("moving object" in row["text_input"] for row in rows)


def test_long_videos_become_windows(clips, monkeypatch, tmp_path):
    """Windows of WINDOW frames overlap by half; mask images count the frames of the whole video."""
    for number, clip in enumerate([clip for clip in clips if clip.moving and not clip.camera][:2]):
        folder = write_clip(tmp_path / "made", f"{number}", clip, notes_of(clip))
        write_video(tmp_path / f"in/{'ab'[number]}.mp4", np.repeat(clip.frames, 5, 0), 10)
        shutil.copytree(folder / "masks_dynamic", tmp_path / f"in/{'ab'[number]}/masks_dynamic")
    words = (
        f"VIDEOS={tmp_path / 'in'}",
        f"OUT={tmp_path / 'out'}",
        "SAMPLE_FPS=2",
        "WINDOW=4",
        "WORKERS=1",
        "MIN_CONFIDENCE=0",
    )
    # all windows, although they overlap; test_clips_of_one_video_share_no_frame is about what is kept of them
    monkeypatch.setattr("lib.footage.keep_apart", lambda clips, dropped, most: (clips, dropped))
    run_script(monkeypatch, "generate_data.py", "SOURCE=videos", "SEGMENTER=files", *words)
    rows = rows_of(tmp_path / "out/train_imagery.jsonl") + rows_of(tmp_path / "out/test_imagery.jsonl")
    firsts = {row["clip"].rpartition("/")[2]: row["times"][0] for row in rows}
    assert firsts == {"00000": 0.0, "00002": 1.0, "00004": 2.0} and all(
        len(row["times"]) == 4 for row in rows
    )
    for row in rows:
        frame = np.asarray(Image.open(tmp_path / "out" / row["image_input"][0])).astype(int)
        marked = np.asarray(Image.open(tmp_path / "out" / row["image_output"][0])).astype(int)
        first, video = int(row["clip"][-5:]), row["video"].removesuffix(".mp4")
        mask = Image.open(tmp_path / f"in/{video}/masks_dynamic/frame_{first:04d}.png")
        reddened = np.abs(frame - marked).max(-1) > 40
        if row["image_output"][0].endswith("0000.jpg"):
            assert (reddened != np.asarray(mask.convert("L")) // 255).mean() < 0.03


def test_ctrl_c_loses_nothing(world, monkeypatch, tmp_path):
    """A run stopped in the middle says so in a sentence, and ends in the same bytes as one that was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    generate(monkeypatch, world, whole, "WORKERS=2")
    command = [
        sys.executable,
        str(ROOT / "generate_data.py"),
        "SOURCE=spatialvid",
        "SEGMENTER=files",
        f"VIDEOS={world}",
    ]
    run = subprocess.Popen([*command, f"OUT={cut}", "WORKERS=1"], env=one_thread(), stderr=subprocess.PIPE)
    while run.poll() is None and not list(cut.glob("processed_data/*/rows.json")):
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=300)[1].decode()
    if run.returncode:  # it may have been done already
        assert "the same command goes on from there" in said and "Traceback" not in said
        assert not (cut / "meta.json").exists()
        generate(monkeypatch, world, cut, "WORKERS=1")
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(cut)) for path in cut.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in names)


# ---------------------------------------------------------------- SEGMENTER="dyn"


def test_dynamic_masks_round_trip():
    """A worked matrix in compressed rows, stored zeros left out, and toy masks there and back."""
    packed = {"shape": np.array([3, 4]), "f_0_indptr": np.array([0, 2, 2, 4])}
    packed |= {"f_0_indices": np.array([0, 3, 1, 2]), "f_0_data": np.array([1, 1, 1, 0])}
    assert segment_dyn.read_mask(packed, 0).astype(int).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    masks = np.random.default_rng(0).random((5, 20, 30)) < 0.3
    masks[2] = False
    for number, mask in enumerate(masks):
        assert (segment_dyn.read_mask(pack_masks(masks), number) == mask).all()


def test_one_moving_region_is_followed(tmp_path):
    """A thing that moves on, a larger one at the start and the end: the first is kept, in all its frames."""
    masks = np.zeros((5, 120, 200), bool)
    for t, mask in enumerate(masks):
        mask[10:50, 10 + 10 * t : 50 + 10 * t] = True
    masks[2] = False  # not found in this frame
    kept = masks[:, ::2, ::2].copy()
    masks[[0, 4], 60:110, 100:160] = True
    np.savez(tmp_path / "dyn_masks.npz", **pack_masks(masks))
    frames = np.zeros((5, 60, 100, 3), np.uint8)
    files = [tmp_path / f"masks_dynamic/frame_{number:04d}.png" for number in range(5)]
    assert (segment_dyn.masks(frames, "", files, "") == kept).all()
    # the numbers in the files' names say which frames of the video these are
    assert (segment_dyn.masks(frames[:2], "", files[3:], "") == kept[3:]).all()
    alone = segment_dyn.masks(frames[:1], "", files[:1], "")[0]
    assert (alone == (masks[0, ::2, ::2] & ~kept[0])).all()
    np.savez(tmp_path / "dyn_masks.npz", **pack_masks(masks & False))
    assert not segment_dyn.masks(frames, "", files, "").any()


def test_dynamic_masks_make_object_questions(clips, monkeypatch, tmp_path, capsys):
    """SEGMENTER="dyn": the moving object's mask is the toy's; the landmark is an image's or none."""
    chosen = [clip for clip in clips if len(clip.moving) == 1][:6]
    for number, clip in enumerate(chosen):
        write_clip(tmp_path / "in", f"g/{number}_a", clip, notes_of(clip))
    for has_landmark in (True, False):
        out, words = tmp_path / f"out{has_landmark}", ("SEGMENTER=dyn", "WORKERS=1", "HELD_OUT=0.3")
        rows = generate(monkeypatch, tmp_path / "in", out, *words)
        everything = rows["train"] + rows["test"]
        asked = {row["subtask"].split("_")[0] for row in everything}
        assert "static object" not in capsys.readouterr().out  # nothing is asked of a landmark without images
        assert asked == ({"camera", "object"} if has_landmark else {"object"})
        for row in everything:
            clip, name = chosen[int(row["video"][2])], row["image_output"][0]
            things = clip.static if "static" in name else clip.moving
            thing, t = things[0], int(name[-8:-4])
            marked, frame = (
                np.asarray(Image.open(out / n)).astype(int) for n in (name, row["image_input"][t])
            )
            assert ((np.abs(marked - frame).max(-1) > 40) & ~clip.masks[thing][t]).mean() < 0.02
        for folder in (tmp_path / "in/annotations").rglob("masks_static"):
            shutil.rmtree(folder)


# ---------------------------------------------------------------- SEGMENTER="motion"


def moving_square(step_x, step_y, shift, count=16, seed=0):
    """A textured square on a textured ground: it moves by step, the whole picture by shift a frame."""
    rng = np.random.default_rng(seed)
    ground = np.kron(rng.integers(40, 120, (40, 60)), np.ones((6, 6))).astype(np.uint8)
    thing = np.kron(rng.integers(170, 255, (6, 6)), np.ones((4, 4))).astype(np.uint8)
    frames = []
    for t in range(count):
        picture = np.roll(ground, t * shift, 1)[:120, :160].copy()
        x, y = 20 + t * (step_x + shift), 10 + t * step_y
        picture[y : y + 24, x : x + 24] = thing
        frames.append(np.stack([picture, picture // 2, 255 - picture], 2))
    return np.stack(frames)


def test_windows_stay_inside_a_shot():
    """Cuts at 3 and at 13 of 19 frames: three frames are no clip, windows of eight start at a cut."""
    frames = np.zeros((19, 4, 4, 3), np.uint8)
    frames[3:13] = 200
    places = np.arange(19)
    windows = split_into_windows(frames, places, 8, TOY.CUT_CHANGE)
    assert [part.tolist() for part, _ in windows] == [
        list(range(3, 11)),
        list(range(7, 13)),
        list(range(13, 19)),
    ]
    assert [len(shot) for _, shot in windows] == [10, 10, 6]
    assert split_into_windows(frames[:3], places[:3], 8, TOY.CUT_CHANGE) == []


def test_motion_finds_objects_in_plain_videos(monkeypatch, tmp_path, capsys):
    """True times, motion without the camera's share, splits by scene, unreadable files named."""
    videos = tmp_path / "some clips"
    write_video(videos / "square_a.mp4", moving_square(4, 0, -1))
    write_video(videos / "square_b.mp4", moving_square(4, 0, -1, seed=1))
    write_video(videos / "deep" / "fällt.mp4", moving_square(0, 4, 1))
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "noise.mp4").write_bytes(bytes(range(256)) * 20)
    words = ["SOURCE=videos", f"VIDEOS={videos}", f"OUT={tmp_path / 'real'}", "SEED=3"]
    words += ["SAMPLE_FPS=5.0", "MAX_SIDE=96", "WORKERS=1", "HELD_OUT=0.3"]
    run_script(monkeypatch, "generate_data.py", *words)
    told = capsys.readouterr().out
    assert "2 clips are unreadable" in told and "empty.mp4" in told and "noise.mp4" in told
    rows = {split: rows_of(tmp_path / f"real/{split}_imagery.jsonl") for split in ("train", "test")}
    everything = rows["train"] + rows["test"]
    assert {label_of(row) for row in everything if "direct" in row["id"]} == {"Moving Right", "Moving Down"}
    assert all(np.allclose(np.diff(row["times"]), 0.2, atol=0.01) for row in everything)
    assert all("the moving object" in row["text_input"] for row in everything)
    split_of = {}
    for split, found in rows.items():
        for row in found:
            split_of.setdefault(row["video"].rpartition("_")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    made = read_rows(tmp_path / "real/test_imagery.jsonl")
    assert Image.open(made[0].image_input[0]).size == (96, 72)
    with pytest.raises(SystemExit) as done:
        run_script(monkeypatch, "generate_data.py", *words)
    assert done.value.code == 0


def test_motion_takes_the_camera_out_by_poses_where_there_are_any(tmp_path):
    """SEGMENTER="motion" with poses: object questions alone, since it finds no landmarks; no confidence."""
    poses = np.tile([0, 0, 0, 0, 0, 0, 1.0], (8, 1))
    notes = {"poses": poses, "instructions": {"0->7": ["Pan Left"]}}
    shot = shot_of(moving_square(8, 0, 0, count=8), notes, tmp_path)
    clip, _ = gd.real_clip(constants(SEGMENTER="motion"), shot)
    assert clip.camera == [] and clip.static == [] and clip.evidence == {}
    assert clip.facts["moving object"]["direction"] == "Moving Right"


def test_scenes_share_a_split(tmp_path):
    """Files named alike before the last "_" stay together; a single scene is refused."""
    for name in ("car_1.mp4", "car_2.mp4", "bike.mp4", "dog.mp4"):
        (tmp_path / name).touch()
    jobs = list_videos(str(tmp_path), "", TOY.SEED, TOY.HELD_OUT)
    split_of = {Path(job.path).stem: job.split for job in jobs}
    assert split_of["car_1"] == split_of["car_2"] and set(split_of.values()) == {"train", "test"}
    (tmp_path / "ant.mp4").touch()
    more = list_videos(str(tmp_path), "", TOY.SEED, TOY.HELD_OUT)
    numbers = {job.path: job.number for job in more}
    assert all(numbers[job.path] == job.number for job in jobs)  # a file more renames no clip


def test_one_scene_is_held_out_from_itself_and_said_so(tmp_path, capsys):
    """A folder of one scene: its first video is in both splits, and the run says what that means."""
    for name in ("car_1.mp4", "car_2.mp4"):
        (tmp_path / name).touch()
    jobs = list_videos(str(tmp_path), "", TOY.SEED, TOY.HELD_OUT)
    assert [(job.split, Path(job.path).stem) for job in jobs] == [
        ("train", "car_1"),
        ("train", "car_2"),
        ("test", "car_1"),
    ]
    assert "one scene only" in capsys.readouterr().out


def test_one_name_for_two_objects_mixes_no_masks(clips, monkeypatch, tmp_path):
    """objects.json names both "red thing": the moving object's overlays still show the moving object."""
    clip = next(clip for clip in clips if clip.static and clip.moving and clip.camera)
    notes = notes_of(clip)
    folder = write_clip(tmp_path, "a", clip, notes)
    names = {"static_object": "red thing", "dynamic_object": "red thing"}
    made, _ = gd.real_clip(TOY, shot_of(clip.frames, notes | {"objects": names}, folder))
    for kind in ("static", "moving"):
        truth = clip.masks[getattr(clip, kind)[0]]
        assert (made.masks[getattr(made, kind)[0]] & ~truth).sum() == 0
