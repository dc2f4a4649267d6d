"""Cameras and masks to numbers, and numbers to labels. Axes: right, up, forward."""

import numpy as np

from lib import vocabulary
from lib.spatialvid import BadAnnotation

# ---------------------------------------------------------------- cameras


def rotation(pan, tilt, roll):
    """Angles (T,) in radians, positive right, up, clockwise -> rot (T, 3, 3), columns right, up, forward."""
    sin_pan, cos_pan = np.sin(pan), np.cos(pan)
    sin_tilt, cos_tilt = np.sin(tilt), np.cos(tilt)
    right = np.stack([cos_pan, np.zeros_like(pan), -sin_pan], -1)
    up = np.stack([-sin_pan * sin_tilt, cos_tilt, -cos_pan * sin_tilt], -1)
    forward = np.stack([sin_pan * cos_tilt, sin_tilt, cos_pan * cos_tilt], -1)
    cos, sin = np.cos(roll)[:, None], np.sin(roll)[:, None]
    rolled_right = right * cos - up * sin
    rolled_up = up * cos + right * sin
    return np.stack([rolled_right, rolled_up, forward], -1)


def view_width(hfov):
    """Horizontal field of view in degrees -> width of the view at depth 1."""
    return 2 * np.tan(np.radians(hfov) / 2)


def project(points, pos, rot, hfov):
    """Points (T, 3), camera pos (T, 3), rot (T, 3, 3) -> x, y in frame widths from the corner, depth (T,)."""
    right, up, depth = np.einsum("tji,tj->it", rot, points - pos)
    x = 0.5 + right / depth / view_width(hfov)
    y = 0.5 - up / depth / view_width(hfov)
    return x, y, depth


def cameras_from_poses(poses):
    """World-to-camera poses (T, 7) in OpenCV axes -> pos (T, 3), rot (T, 3, 3) columns right, up, forward.

    A pose is a translation and a quaternion x, y, z, w. Its matrix is 1 + 2 w [v] + 2 [v][v], where [v] u
    is the cross product of v = (x, y, z) and u.
    """
    lengths = np.linalg.norm(poses[:, 3:], axis=1, keepdims=True)
    if lengths.min() < 1e-6:
        raise BadAnnotation("poses.npy holds a quaternion of zeros")
    quaternion = poses[:, 3:] / lengths
    cross = -np.cross(quaternion[:, None, :3], np.eye(3))  # (T, 3, 3)
    w = quaternion[:, 3, None, None]
    to_camera = np.eye(3) + 2 * w * cross + 2 * cross @ cross
    pos = -np.einsum("tji,tj->ti", to_camera, poses[:, :3])
    rot = to_camera.transpose(0, 2, 1) * [1, -1, 1]  # OpenCV's y points down
    return pos, rot


# ---------------------------------------------------------------- paths to labels


def direction_label(shift):
    """Way (right, up, forward) in the first camera's axes, shares of the depth -> label, None if unclear."""
    lateral = np.hypot(*shift[:2])
    forward = abs(shift[2])
    if max(lateral, forward) < 0.03:
        return "Stationary"
    if lateral < forward / 2:
        return "Moving Away from Camera" if shift[2] > 0 else "Moving Toward Camera"
    if forward >= lateral / 2:
        return None

    # The way is parallel to the image: within 14 degrees of one of eight directions it is that one.
    least_cosine = np.cos(np.radians(14))
    for label in list(vocabulary.DIRECTIONS)[:8]:
        way = vocabulary.DIRECTIONS[label]
        if np.dot(shift, way) > least_cosine * lateral * np.linalg.norm(way):
            return label
    return None


def distance_label(distances):
    """True distances (T,) of an object from the camera -> label, None if unclear."""
    closer, farther, same, closer_then_farther, farther_then_closer = vocabulary.DISTANCES
    d = np.asarray(distances) / distances[0]
    if d.max() < 1.1 * d.min():
        return same

    # One way: it ends a quarter nearer or farther, and hardly ever turns back.
    steps = np.diff(d)
    is_steady = steps.max() < 0.02 or steps.min() > -0.02
    if max(d[-1], 1 / d[-1]) > 1.25 and is_steady:
        return farther if d[-1] > 1 else closer

    # There and back: the turning point lies between the ends and differs clearly from both.
    ends, between = d[[0, -1]], d[2:-2]
    if len(between) == 0:
        return None
    if between.min() * 1.18 < ends.min() and d.max() < 1.1:
        return closer_then_farther
    if between.max() > 1.18 * ends.max() and d.min() > 0.9:
        return farther_then_closer
    return None


def motion_labels(shift, distances):
    """Way (3,) as above, true distances (T,) -> {"direction": label, "distance": label}, None if unclear."""
    ratios = np.asarray(distances) / max(distances[0], 1e-9)
    # a comparison with NaN is false, which would say "stands still" or "not steady"
    if not (np.isfinite(shift).all() and np.isfinite(ratios).all()):
        return {"direction": None, "distance": None}
    return {"direction": direction_label(shift), "distance": distance_label(distances)}


def path_labels(path, pos, rot):
    """A world path (T, 3) seen by a camera pos (T, 3), rot (T, 3, 3) -> its motion_labels, camera-free."""
    to_first_camera = rot[0].T
    shift = to_first_camera @ (path[-1] - path[0])
    middle = to_first_camera @ ((path[0] + path[-1]) / 2 - pos[0])
    return motion_labels(shift / middle[2], np.linalg.norm(path - pos, axis=1))


# ---------------------------------------------------------------- masks to numbers and words


def centroid_and_area(masks, least_area):
    """Masks (n, H, W) of a thing -> mean centre x, y and area, shares of the frame; None if it is hidden."""
    area = float(masks.mean())
    if area < least_area:
        return None
    _, y, x = np.nonzero(masks)
    return (x.mean() + 0.5) / masks.shape[2], (y.mean() + 0.5) / masks.shape[1], area


def mask_box(mask):
    """mask (H, W) -> [x1, y1, x2, y2] in pixels; x2 and y2 are the far edges, so x2 - x1 is the width."""
    y, x = np.nonzero(mask)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def bin_word(words, share):
    """The word for a share 0..1 of the frame: bin_word(X_WORDS, 0.1) -> "leftmost"."""
    index = int(share * len(words))
    return words[min(max(index, 0), len(words) - 1)]


def describe_location(location):
    """x, y, area of `centroid_and_area` -> "left upper small"; None -> "hidden"."""
    if location is None:
        return "hidden"
    x, y, area = location
    size = int(np.searchsorted(vocabulary.SIZE_EDGES, np.sqrt(area)))
    x_word = bin_word(vocabulary.X_WORDS, x)
    y_word = bin_word(vocabulary.Y_WORDS, y)
    return f"{x_word} {y_word} {vocabulary.SIZE_WORDS[size]}"


def depth_inside(depth, mask):
    """Depth map (h, w) of any size, mask (H, W) -> the median depth inside the mask; NaN if it has none."""
    y, x = np.nonzero(mask)
    row = y * depth.shape[0] // mask.shape[0]
    column = x * depth.shape[1] // mask.shape[1]
    inside = depth[row, column]
    has_value = np.isfinite(inside)
    return np.median(inside[has_value]) if has_value.any() else np.nan


# ---------------------------------------------------------------- real objects


def object_labels(masks, notes, hfov):
    """Masks (T, H, W) of a moving object, annotations of its clip -> {"direction": label, "distance": label}.

    Only what is clear is in the result. Distances go by the depth maps, which have the poses' scale; a label
    must hold for the visible surface and for a middle 15 % behind it. Without depth maps they go by the
    mask's height (the width changes when a thing turns) and are of unknown scale: if the camera travels, a
    label must hold for a thing at 2 and at 20 times its way. There is no direction without poses or the
    background's shifts (T, 2), which replace a turning camera. hfov: degrees, where there are no intrinsics.
    Without a depth inside the first or the last mask there are no labels; other frames without one are left
    out.
    """
    visible = np.flatnonzero(masks.any((1, 2)))
    if "depths" in notes:
        depth = np.array([depth_inside(notes["depths"][t], masks[t]) for t in visible])
        has_depth = np.isfinite(depth)
        if not has_depth[[0, -1]].all():
            return {}
        visible, depth = visible[has_depth], depth[has_depth]
    masks = masks[visible]
    standing_still = np.tile(np.eye(7)[6], (len(visible), 1))
    poses = notes["poses"][visible] if "poses" in notes else standing_still
    pos, rot = cameras_from_poses(poses)
    rays = object_rays(masks, visible, rot, notes, hfov)  # (n, 3), of depth 1

    if "depths" in notes:
        depth = depth[:, None]  # (n, 1)
        scales = [1, 1.15]
    else:
        heights = np.array([[np.nonzero(mask)[0].std()] for mask in masks])  # (n, 1), pixels
        depth = 1 / heights.clip(0.25)
        travelled = np.linalg.norm(pos - pos[0], axis=1).max()
        scales = np.array([2, 20]) * travelled / depth.mean() if travelled > 0 else [1]

    # A label is kept if the nearest and the farthest possible scale agree on it.
    nearest, *others = [path_labels(pos + scale * depth * rays, pos, rot) for scale in scales]
    has_direction = "poses" in notes or "shifts" in notes
    labels = {}
    for kind in ("direction", "distance") if has_direction else ("distance",):
        is_agreed = all(other[kind] == nearest[kind] for other in others)
        if nearest[kind] and is_agreed:
            labels[kind] = nearest[kind]
    return labels


def object_rays(masks, visible, rot, notes, hfov):
    """Masks (n, H, W) of the frames `visible` -> world directions (n, 3) of the object's centre, depth 1."""
    height, width = masks.shape[1:]
    if "intrinsics" in notes:
        focal = notes["intrinsics"][visible, :2]  # shares of the width and of the height
    else:
        focal = np.array([1, width / height]) / view_width(hfov)
    centres = np.array([centroid_and_area(mask[None], 0)[:2] for mask in masks])  # (n, 2)
    if "shifts" in notes:
        centres = centres - notes["shifts"][visible, ::-1] / [width, height]  # x, y
    from_middle = (centres - 0.5) * [1, -1] / focal
    directions = np.concatenate([from_middle, np.ones((len(masks), 1))], 1)
    return np.einsum("tij,tj->ti", rot, directions)
