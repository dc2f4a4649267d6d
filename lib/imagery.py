"""Were the right latents imagined? Retrieval of imagined latents among true ones, and a readout as pixels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lib.files import evenly_spaced
from lib.pictures import open_image
from lib.scores import mean

# a comparison -> the name of its chance; an entry of Result.imagery holds both
COMPARISONS = {"object": "object_chance", "moment": "moment_chance", "retrieval": "chance"}
READOUT_SIZE = 28  # pixels; side of the images that latents are read out as
RIDGE = 0.02  # of the mean variance of the latents' entries, which is added to each
CHUNK = 64  # overlays encoded at once for the readout


# ---------------------------------------------------------------- one block among others


def centre(x, gallery):
    """Unit vectors less the gallery's mean one at their latent index: (n, K, D), (G, K, D) -> (n, K, D).

    Pooled features share one direction, so the plain cosine of any two is near 1.
    """
    common = F.normalize(gallery, dim=-1).mean(dim=0)  # (K, D)
    return F.normalize(F.normalize(x, dim=-1) - common, dim=-1)


def retrieval(generated, true):
    """Are latents nearest to their own true ones? (n, K, D), (G, K, D) -> hit (n,), cosine (n, K).

    true[i] is row i's own. A hit: the centred cosine, mean over K, is higher with true[i] than with any other
    of the G; a tie is a miss. Chance is 1/G.
    """
    cosine = torch.einsum("nkd,gkd->ngk", centre(generated, true), centre(true, true))
    near = cosine.mean(dim=-1)  # (n, G)
    others = near.clone().fill_diagonal_(-torch.inf)
    return near.diagonal() > others.amax(dim=1), cosine.diagonal().T


def compare_block(latents, galleries):
    """An imagined block (K, D) against galleries {comparison: (G, K, D), its own true block first} -> dict.

    A gallery of one is not compared; {} if all are. Of retrieval also the centred cosine per latent.
    """
    found = {}
    for name, true in galleries.items():
        if len(true) > 1:
            hit, cosine = retrieval(latents[None], true)
            found[name] = hit.item()
            found[COMPARISONS[name]] = 1 / len(true)
            if name == "retrieval":
                found["cosine"] = cosine[0].tolist()
    return found


# ---------------------------------------------------------------- galleries within a clip


def index_overlays(rows):
    """The overlays of rows that name their frames and things -> {(clip, frame): {thing: file}}."""
    moments = {}
    for row in rows:
        for frame, thing, file in zip(row.overlay_frames, row.overlay_things, row.image_output):
            moments.setdefault((row.clip, frame), {}).setdefault(thing, file)
    return moments


def same_moment(row, block, moments):
    """The overlay of a row's block, then those of other things at this moment of its clip -> files.

    They show one scene: only which thing is highlighted differs. Of a row without overlay_frames or
    overlay_things, such as the release's, it is the block's own alone.
    """
    own = row.image_output[block]
    if not row.overlay_frames or not row.overlay_things:
        return [own]
    things = moments[row.clip, row.overlay_frames[block]]
    others = [file for thing, file in things.items() if thing != row.overlay_things[block]]
    return [own, *dict.fromkeys(file for file in others if file != own)]


def same_thing(row, block):
    """The overlay of a row's block, then those of the same thing at the row's other key moments -> files.

    A row without overlay_things, such as the release's, is taken to follow one thing, unless its
    overlay_frames name a frame twice: then it is the block's own alone.
    """
    own = row.image_output[block]
    frames = row.overlay_frames or list(range(len(row.image_output)))
    things = row.overlay_things
    if not things and len(set(frames)) < len(frames):
        return [own]
    # a moment that the row looks at twice counts once
    files = {}
    for number, file in enumerate(row.image_output):
        is_same = not things or things[number] == things[block]
        if is_same and frames[number] != frames[block] and file != own:
            files.setdefault(frames[number], file)
    return [own, *files.values()]


# ---------------------------------------------------------------- a row's blocks


def same_subtask(rows, index):
    """Indices of the questions of a row's subtask on other clips."""
    row = rows[index]
    others = [i for i, other in enumerate(rows) if other.subtask == row.subtask and other.clip != row.clip]
    return [i for i in others if not rows[i].skip_reason]


def gallery_of(rows, index, block, size=64):
    """The row, and others of its subtask with this block, each of another clip -> up to `size` indices."""
    # several questions may be about one clip, whose overlays are alike: one of them is enough
    of_clip = {}
    for i in same_subtask(rows, index):
        if len(rows[i].image_output) > block:
            of_clip[rows[i].clip] = i
    return [index, *of_clip.values()][:size]


def compare_blocks(rows, index, latents, truth):
    """Imagined blocks (n, K, D) of a row -> [dict], one for each block that could be compared.

    retrieval: with the same ordinal of other clips. object@1, within the clip: with the other things at this
    moment. moment@1: with the same thing at the row's other moments. truth: TrueLatents. Blocks beyond the
    true ones are not compared.
    """
    row = rows[index]
    galleries = []
    for block in range(min(len(latents), len(row.image_output))):
        others = gallery_of(rows, index, block)
        files = {
            "retrieval": [rows[i].image_output[block] for i in others],
            "object": same_moment(row, block, truth.moments),
            "moment": same_thing(row, block),
        }
        galleries.append(files)

    # all overlays in one call, then each block with the true ones of its galleries
    truth.encode([file for files in galleries for some in files.values() for file in some], row.source)
    compared = []
    for block, files in enumerate(galleries):
        true = {name: truth.encode(some, row.source) for name, some in files.items()}  # (G, K, D) each
        found = compare_block(latents[block], true)
        if found:
            compared.append({"block": block, **found})
    return compared


# ---------------------------------------------------------------- counts


def mean_of(blocks, name):
    """The mean of a comparison or chance over the blocks that have it; None if none has."""
    return mean(block[name] for block in blocks if block.get(name) is not None)


def summarise_imagery(results):
    """The compared blocks of results -> counts, means, and object@1 for each ordinal of a block.

    Results of an earlier version have retrieval alone.
    """
    blocks = [block for result in results for block in result.imagery]
    cosines = zip(*(block["cosine"] for block in blocks if "cosine" in block))  # for each latent index
    summary = {"compared": len(blocks)}
    for name, chance in COMPARISONS.items():
        summary[name] = mean_of(blocks, name)
        summary[chance] = mean_of(blocks, chance)
    summary["cosine"] = [mean(cosine) for cosine in cosines]

    by_ordinal = {}
    for block in blocks:
        by_ordinal.setdefault(block.get("block"), []).append(block)
    ordinals = sorted(ordinal for ordinal in by_ordinal if ordinal is not None)
    last = ordinals[-1] + 1 if ordinals else 0
    summary["object_by_block"] = [mean_of(by_ordinal.get(n, []), "object") for n in range(last)]
    return summary


# ---------------------------------------------------------------- latents as pixels


@dataclass
class Readout:
    """A linear map from latents to the pixels of overlays: what a person can see of what is imagined.

    It is fitted to true latents alone and knows nothing of the model's answers.
    """

    latent_mean: torch.Tensor  # (K * D,)
    pixel_mean: torch.Tensor  # (P,), P = 3 * READOUT_SIZE ** 2
    weight: torch.Tensor  # (K * D, P)

    def __call__(self, latents):
        """Latents (n, K, D) of any length -> pixels (n, P), about 0 to 1."""
        return self.pixel_mean + (flatten(latents) - self.latent_mean) @ self.weight

    def draw(self, latents, size):
        """One block of latents (K, D) -> image of this (width, height)."""
        pixels = self(latents[None]).clamp(0, 1).view(READOUT_SIZE, READOUT_SIZE, 3)
        image = Image.fromarray((255 * pixels).byte().numpy())
        return image.resize(size, Image.Resampling.BICUBIC)


def flatten(latents):
    """Latents (n, K, D) as unit vectors, side by side (n, K * D): imagined ones have another length."""
    return F.normalize(latents.float(), dim=-1).flatten(1)


def load_pixels(files, source):
    """Image files -> pixels (n, P) in 0 to 1, each squeezed to READOUT_SIZE x READOUT_SIZE."""
    size = (READOUT_SIZE, READOUT_SIZE)
    images = [np.asarray(open_image(file, source).resize(size, Image.Resampling.BILINEAR)) for file in files]
    return torch.from_numpy(np.stack(images)).float().div(255).flatten(1)


def fit_readout(latents, pixels, ridge=RIDGE):
    """Ridge regression in closed form: latents (n, K, D), pixels (n, P) -> Readout.

    W = (X^T X + c I)^-1 X^T Y = X^T (X X^T + c I)^-1 Y with X, Y less their means and c = ridge times the
    mean variance of X, times n. The second form is the smaller one where n < K * D.
    """
    x = flatten(latents)  # (n, K * D)
    latent_mean = x.mean(dim=0)
    pixel_mean = pixels.mean(dim=0)
    x = x - latent_mean
    y = pixels - pixel_mean
    n, features = x.shape
    # where all latents are alike there is nothing to read
    added = (ridge * x.square().sum() / features).clamp(min=1e-9)
    if n < features:
        weight = x.T @ torch.linalg.solve(x @ x.T + added * torch.eye(n), y)
    else:
        weight = torch.linalg.solve(x.T @ x + added * torch.eye(features), x.T @ y)
    return Readout(latent_mean, pixel_mean, weight)


def r_squared(readout, latents, pixels):
    """1 less the squared error of the readout over that of the mean of its training pixels; None of none."""
    if not len(latents):
        return None
    error = (pixels - readout(latents)).square().sum()
    spread = (pixels - readout.pixel_mean).square().sum()
    return 1 - (error / spread).item()


def learn_readout(truth, rows, most):
    """The readout of at most `most` overlays of rows, evenly spaced -> Readout; None without two of them.

    truth: TrueLatents, of any rows.
    """
    files = list(dict.fromkeys(file for row in rows for file in row.image_output))
    files = evenly_spaced(files, most)
    if not truth.model.K or len(files) < 2:
        return None
    source = rows[0].source
    latents = []
    for start in range(0, len(files), CHUNK):
        latents.append(truth.encode(files[start : start + CHUNK], source))
        truth.vision.clear()
    return fit_readout(torch.cat(latents), load_pixels(files, source))


def split_rows(rows, train_rows, answered):
    """Rows that a readout is fitted on, and those of the answered indices that it may be shown on.

    Half of the clips for each, the first answered one is shown, where there are no training rows, fewer than
    in that half, or the rows themselves.
    """
    held_out = {file for row in rows for file in row.image_output}
    others = [row for row in train_rows or [] if held_out.isdisjoint(row.image_output)]
    if others and 2 * len(others) >= len(rows):
        return others, answered
    clips = [rows[i].clip for i in answered] + [row.clip for row in rows]
    shown = set(list(dict.fromkeys(clips))[::2])
    return [row for row in rows if row.clip not in shown], [i for i in answered if rows[i].clip in shown]
