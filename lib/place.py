"""How much of a visual token tells where it is, not what it shows; for the making of the tiny base."""

import torch


def place_directions(features, cells, rank=6):
    """Tokens (N, D) of whole frame pairs, `cells` a pair -> mean (D,), directions (rank, D), a share.

    Directions: those in which the mean tokens of the cells differ, whatever they show (6 hold all of a 4 x 4
    grid). Share: of the tokens' variance, what is between these means.
    """
    mean = features.mean(dim=0)
    by_cell = features.unflatten(0, (-1, cells))  # (pairs, cells, D)
    between = by_cell.mean(dim=0) - mean  # (cells, D)

    # lengths squared: of what is between the cells, and of all
    place = between.norm(dim=1).square()
    total = (features - mean).norm(dim=1).square()
    share = place.mean() / total.mean()
    directions = torch.linalg.svd(between).Vh
    return mean, directions[:rank], share.item()
