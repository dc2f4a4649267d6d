"""lib/imagery.py: comparisons within a clip, the readout of latents as pixels."""

import pytest
import torch

from lib import imagery
from lib.rows import Row
from lib.scores import Result

# ---------------------------------------------------------------- within a clip


def follow(thing, frames, clip="a", **changes):
    """A row that follows one thing over some frames of a clip."""
    values = {
        "id": f"{clip}_{thing}",
        "text_input": "?",
        "image_output": [f"{clip}/{thing}_{frame}.png" for frame in frames],
        "clip": clip,
        "overlay_frames": list(frames),
        "overlay_things": [thing] * len(frames),
    }
    return Row(**{**values, **changes})


def test_the_gallery_of_a_moment_holds_each_thing_of_the_clip_once():
    row = follow("ball", (0, 2))
    rows = [
        row,
        follow("cube", (2, 3)),
        follow("cube", (2,)),
        follow("cone", (2,), clip="b"),
        follow("arm", (0,)),
    ]
    moments = imagery.index_overlays(rows)
    assert imagery.same_moment(row, 0, moments) == ["a/ball_0.png", "a/arm_0.png"]
    assert imagery.same_moment(row, 1, moments) == ["a/ball_2.png", "a/cube_2.png"]
    assert imagery.same_moment(rows[1], 1, moments) == ["a/cube_3.png"]  # alone at this moment


@pytest.mark.parametrize("missing", ["overlay_frames", "overlay_things"])
def test_a_row_that_does_not_say_what_it_shows_is_not_compared_with_other_things(missing):
    rows = [follow("ball", (0, 2), **{missing: []}), follow("cube", (0, 2))]
    moments = imagery.index_overlays(rows)
    assert imagery.same_moment(rows[0], 0, moments) == ["a/ball_0.png"]
    assert imagery.same_moment(rows[1], 0, moments) == ["a/cube_0.png"]


def test_the_gallery_of_a_thing_holds_its_other_moments():
    row = follow("ball", (0, 2, 5))
    assert imagery.same_thing(row, 1) == ["a/ball_2.png", "a/ball_0.png", "a/ball_5.png"]
    pair = follow("ball", (0, 2, 5), overlay_things=["ball", "cube", "ball"])
    assert imagery.same_thing(pair, 0) == ["a/ball_0.png", "a/ball_5.png"]
    assert imagery.same_thing(pair, 1) == ["a/ball_2.png"]
    twice = follow("ball", (0, 2, 0))  # a moment that is looked at twice is no rival of itself
    assert imagery.same_thing(twice, 0) == ["a/ball_0.png", "a/ball_2.png"]


def test_a_row_without_things_follows_one_unless_a_frame_comes_twice():
    files = ["a/ball_0.png", "a/ball_2.png"]
    assert imagery.same_thing(follow("ball", (0, 2), overlay_things=[], overlay_frames=[]), 0) == files
    assert imagery.same_thing(follow("ball", (0, 2), overlay_things=[]), 0) == files
    both = follow("ball", (0, 2), overlay_things=[], overlay_frames=[1, 1])
    assert imagery.same_thing(both, 0) == files[:1]


def test_a_block_is_compared_by_the_centred_cosine():
    """Three things of a moment, two latents each: a direction shared by all of them does not count."""
    shared = 10 * torch.ones(4)
    true = shared + torch.eye(4)[:3, None].expand(3, 2, 4)  # (G, K, D)
    near = 3 * (shared + torch.tensor([0.6, 0.5, 0.0, 0.0])).expand(2, 4)
    hit = {"object": True, "object_chance": pytest.approx(1 / 3)}
    assert imagery.compare_block(near, {"object": true}) == hit
    assert imagery.compare_block(near, {"object": true[[1, 0, 2]]})["object"] is False
    found = imagery.compare_block(near, {"retrieval": true, "object": true[:1], "moment": true[[2, 0]]})
    assert (found["retrieval"], found["moment"], found["moment_chance"]) == (True, False, 0.5)
    assert len(found["cosine"]) == 2 and "object" not in found  # a gallery of one is not compared


def test_a_tie_is_a_miss():
    true = torch.eye(4)[:3, None].expand(3, 2, 4)
    assert imagery.compare_block(true[0], {"object": true})["object"] is True
    assert imagery.compare_block(true[0], {"object": true[[0, 0, 1]]})["object"] is False
    assert imagery.compare_block(torch.zeros(2, 4), {"object": true[:2]})["object"] is False


def test_counts_are_means_over_the_blocks_that_were_compared():
    first = {"block": 0, "retrieval": True, "chance": 0.5, "cosine": [1.0, 0.0]}
    second = {"block": 2, "object": True, "object_chance": 0.25, "moment": False, "moment_chance": 0.5}
    third = {"block": 2, "object": False, "object_chance": 0.25}
    results = [Result(0, "", "", "all", 2, "A", "A", True, "A", 1, False, 3, 9, "", imagery=[first, second])]
    results.append(Result(1, "", "", "all", 2, "A", "A", True, "A", 1, False, 3, 9, "", imagery=[third]))
    assert imagery.summarise_imagery(results) == {
        "compared": 3,
        "retrieval": 1.0,
        "chance": 0.5,
        "object": 0.5,
        "object_chance": 0.25,
        "moment": 0.0,
        "moment_chance": 0.5,
        "cosine": [1.0, 0.0],
        "object_by_block": [None, None, 0.5],
    }


# ---------------------------------------------------------------- the readout


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("n", [9, 40])
def test_ridge_equals_a_direct_solution(n):
    """Fewer overlays than features (2 x 8 = 16), where the dual form is taken, and more of them."""
    latents = normal(n, 2, 8)
    pixels = normal(n, 5, seed=1)
    readout = imagery.fit_readout(latents.float(), pixels.float(), ridge=0.1)
    x = torch.nn.functional.normalize(latents, dim=-1).flatten(1)
    x = x - x.mean(dim=0)
    covariance = x.T @ x / n
    added = 0.1 * covariance.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    weight = torch.linalg.inv(covariance + added) @ (x.T @ (pixels - pixels.mean(dim=0)) / n)
    assert torch.allclose(readout.weight.double(), weight, atol=1e-4)
    assert torch.allclose(readout(7 * latents.float()), readout(latents.float()), atol=1e-4)  # of any length


def test_r_squared_of_a_perfect_map_is_1_and_of_the_mean_0():
    latents = normal(60, 2, 8).float()
    pixels = imagery.flatten(latents) @ normal(16, 5, seed=1).float() + 3
    readout = imagery.fit_readout(latents[:40], pixels[:40], ridge=1e-6)
    assert imagery.r_squared(readout, latents[40:], pixels[40:]) == pytest.approx(1, abs=1e-3)
    readout.weight.zero_()
    assert imagery.r_squared(readout, latents[:40], pixels[:40]) == pytest.approx(0, abs=1e-6)
    assert imagery.r_squared(readout, latents[:0], pixels[:0]) is None


def test_latents_that_are_all_alike_are_read_out_as_the_mean():
    readout = imagery.fit_readout(torch.ones(3, 2, 8), torch.tensor([[0.0], [0.5], [1.0]]))
    assert torch.allclose(readout(torch.ones(1, 2, 8)), torch.tensor([[0.5]]))


def test_half_of_the_clips_are_shown_and_the_first_answered_one_among_them():
    rows = [follow("ball", (0, 1), clip=clip) for clip in "aabbccdd"]
    fitted, shown = imagery.split_rows(rows, None, [2, 3, 4, 5, 6])
    assert shown == [2, 3, 6] and {row.clip for row in fitted} == {"c", "a"}
    assert imagery.split_rows(rows, rows, [2]) == imagery.split_rows(
        rows, [], [2]
    )  # not on what it is shown on
    train = [follow("ball", (0, 1), clip="train")] * 4
    assert imagery.split_rows(rows, train, [2, 3]) == (train, [2, 3])
    # fewer than half of the held-out ones would give a readout that shows nothing
    assert imagery.split_rows(rows, train[:1], [2]) == imagery.split_rows(rows, [], [2])
