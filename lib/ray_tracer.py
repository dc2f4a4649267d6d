"""The toy world's pictures: rays, shapes, light. Lengths in metres, depth along the camera's axis."""

import numpy as np

from lib import vocabulary
from lib.geometry import view_width


def camera_rays(rot, size, hfov):
    """rot (T, 3, 3) -> ray of each pixel (3, T, H, W), scaled so that a ray's parameter is its depth."""
    centres = (np.arange(size) + 0.5) / size - 0.5
    width = np.float32(view_width(hfov))
    u = centres.astype(np.float32) * width
    axes = rot.astype(np.float32).transpose(2, 1, 0)
    right, up, forward = axes[..., None, None]  # each (3, T, 1, 1)
    return right * u - up * u[:, None] + forward


def hit_thing(thing, origin, rays):
    """A thing at zero: origin (3, T, 1, 1), rays (3, T, H, W) -> depth (T, H, W), normals (3, T, H, W).

    Depth is inf where the ray misses.
    """
    if thing.shape == "box":
        return hit_box(origin, rays, thing.half, thing.yaw)
    return hit_round(origin, rays, thing.half, thing.shape)


def hit_round(origin, rays, half, shape):
    """A ball, pillar or cone of radius half[0] and half height half[1] -> depth, normals.

    All are X^2 + Z^2 = p + q Y + s Y^2 with |Y| <= half[1]; a ray that first meets the wall from inside came
    through the flat top, so it is shaded as the top.
    """
    radius, height = half
    slope = (radius / (2 * height)) ** 2
    coefficients = {
        "ball": (radius**2, 0, -1),
        "pillar": (radius**2, 0, 0),
        "cone": (slope * height**2, -2 * slope * height, slope),
    }
    p, q, s = coefficients[shape]
    ox, oy, oz = origin
    dx, dy, dz = rays

    # The ray meets the wall where a t^2 + 2 b t + c = 0.
    a = dx * dx + dz * dz - s * dy * dy
    b = ox * dx + oz * dz - (q / 2 + s * oy) * dy
    c = ox * ox + oz * oz - p - q * oy - s * oy * oy
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    first = (-b - root) / a  # (T, H, W)
    second = (-b + root) / a

    # It counts within the height: from outside at the first point, through the top at the second.
    y = oy + first * dy
    second_y = oy + second * dy
    is_outside = (first > 0) & (np.abs(y) <= height)
    is_inside = (second > 0) & (np.abs(second_y) <= height)
    is_hit = is_outside | is_inside
    is_hit &= discriminant > 0
    point = np.where(is_outside, first, second)
    depth = np.where(is_hit, point, np.inf)

    x = ox + first * dx
    z = oz + first * dz
    slant = -q / 2 - s * y
    wall = np.stack([x, slant, z]) / radius
    top = np.float32([0, 1, 0])[:, None, None, None]
    return depth, np.where(is_outside, wall, top)


def hit_box(origin, rays, half, yaw):
    """A box of half sizes half[0], half[1], half[0] turned by yaw -> depth, normals."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.float32([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    origin = np.tensordot(turn, origin, 1)
    rays = np.tensordot(turn, rays, 1)
    reach = np.float32([half[0], half[1], half[0]])[:, None, None, None]

    # Where the ray enters and leaves the slab of each axis; it hits if it is in all three at once.
    is_parallel = np.abs(rays) < 1e-6
    step = 1 / np.where(is_parallel, np.float32(1e-6), rays)
    middle = -origin * step  # (3, T, H, W)
    half_way = reach * np.abs(step)
    enters = middle - half_way
    last = (middle + half_way).min(0)
    depth = enters.max(0)
    is_hit = (depth < last) & (depth > 0)
    face = np.where(enters == depth, -np.sign(rays), 0)
    normal = np.tensordot(turn.T, face, 1)
    return np.where(is_hit, depth, np.inf), normal


def paint_background(pos, rays, style, shadows):
    """Ground, shadows, mountains, sky and sun -> colour (3, T, H, W), depth (T, H, W), is_sun (T, H, W)."""
    dx, dy, dz = rays
    height = pos[:, 1, None, None]
    below_horizon = np.maximum(-dy, 1e-6)
    depth = np.where(dy < 0, height / below_horizon, np.inf)
    depth = depth.astype(np.float32)
    is_ground = np.isfinite(depth)
    light = ground_light(pos, rays, depth, style, shadows)

    # The sky grows darker upwards. Sun and mountains are at infinity.
    length = np.sqrt(dx * dx + dy * dy + dz * dz)
    steepness = np.maximum(dy / length, 0)
    sky_light = 1.05 - 0.5 * steepness
    colour = np.multiply.outer(style.sky, sky_light)
    towards_sun = np.einsum("cthw,c->thw", rays, style.sun)
    is_sun = towards_sun > style.sun_cos * length

    # Only rays that are low enough for the highest mountain are looked up by their angle.
    highest = style.ridge.max()
    is_mountain = (dy < highest * length) & (dy >= 0)
    angle = np.degrees(np.arctan2(dx[is_mountain], dz[is_mountain]))
    ridge = style.ridge[angle.astype(np.int32) % 360]
    is_below_ridge = dy[is_mountain] < ridge * length[is_mountain]
    is_mountain[is_mountain] = is_below_ridge

    colour[:, is_sun] = np.float32([[255], [250], [190]])
    colour[:, is_mountain] = style.mountain[:, None]
    colour[:, is_ground] = np.multiply.outer(style.ground, light[is_ground])
    return colour, depth, is_sun & ~is_mountain & ~is_ground


def ground_light(pos, rays, depth, style, shadows):
    """Light (T, H, W) on the ground where rays meet it: 32 x 32 tiles, repeated, and the things' shadows."""
    dx, _, dz = rays
    camera_x, _, camera_z = pos.T[..., None, None]  # each (T, 1, 1)
    reach = np.minimum(depth, 1e4)
    x = camera_x + reach * dx  # (T, H, W)
    z = camera_z + reach * dz
    column = np.floor(x / style.cell).astype(np.int32) & 31
    line = np.floor(z / style.cell).astype(np.int32) & 31
    fading = np.exp(-reach / 14)  # far tiles look alike
    light = 1 + style.tiles[column, line] * fading
    for centre, radius in shadows:
        centre_x, _, centre_z = centre.T[..., None, None]
        distance = (x - centre_x) ** 2 + (z - centre_z) ** 2
        light = np.where(distance < radius**2, light * 0.6, light)
    return light


def render(scene, style, size, hfov, line_greys):
    """A scene -> frames (T, H, W, 3) uint8, masks {name: (T, H, W)}, silhouettes' areas {name: (T,)}.

    The sun has a mask too. line_greys: of the viewfinder's upright lines, left to right.
    """
    pos = scene.pos.astype(np.float32)
    rays = np.ascontiguousarray(camera_rays(scene.rot, size, hfov))
    paths = [thing.path.astype(np.float32) for thing in scene.things]
    shadows = [(path, thing.half[0]) for path, thing in zip(paths, scene.things)]
    colour, nearest, is_sun = paint_background(pos, rays, style, shadows)

    # Things are painted one after the other, each where it is nearer than what is there already.
    owner = np.full(nearest.shape, -1)
    areas = {}
    for number, (thing, path) in enumerate(zip(scene.things, paths)):
        origin = (pos - path).T[:, :, None, None]  # (3, T, 1, 1)
        depth, normal = hit_thing(thing, origin, rays)
        areas[thing.name] = np.isfinite(depth).sum((1, 2))
        is_front = depth < nearest
        nearest[is_front] = depth[is_front]
        owner[is_front] = number
        facing = style.light @ normal[:, is_front]
        light = 0.7 + 0.4 * np.maximum(facing, 0)
        rgb = np.float32(vocabulary.COLOURS[thing.colour])
        colour[:, is_front] = np.multiply.outer(rgb, light)
    picture = colour * style.brightness + style.noise[..., 0]  # (3, T, H, W)
    frames = np.clip(picture, 0, 255).astype(np.uint8)
    frames = np.ascontiguousarray(frames.transpose(1, 2, 3, 0))  # (T, H, W, 3)

    # Nothing is visible under the lines of the viewfinder.
    width = max(1, size // 28)
    lefts = np.linspace(0, size - width, len(line_greys)).round().astype(int)
    for left, grey in zip(lefts, line_greys):
        columns = slice(left, left + width)
        frames[:, :, columns] = grey
        owner[:, :, columns] = -1
        is_sun[:, :, columns] = False
    masks = {thing.name: owner == number for number, thing in enumerate(scene.things)}
    masks["sun"] = is_sun & (owner < 0)
    return frames, masks, areas
