"""Were the right latents imagined? Retrieval of imagined latents among true ones."""

import torch
import torch.nn.functional as F

from lib.scores import mean

# a comparison -> the name of its chance; an entry of Result.imagery holds both
COMPARISONS = {"retrieval": "chance", "object": "object_chance", "moment": "moment_chance"}


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
