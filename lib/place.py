"""How much of a visual token tells where it is, not what it shows; for the making of the tiny base."""

import torch


def place_directions(features, cells, rank=6):
    """Tokens (N, D) of whole frame pairs, `cells` a pair -> mean (D,), directions (rank, D), a share.

    Directions: those in which the mean tokens of the cells differ, whatever they show (6 hold all of a 4 x 4
    grid). Share: of the tokens' variance, what is between these means.
    """
    mean = features.mean(dim=0)
    between = features.view(-1, cells, features.shape[1]).mean(dim=0) - mean  # (cells, D)
    variance = (features - mean).pow(2).sum(dim=1).mean()
    share = between.pow(2).sum(dim=1).mean() / variance
    _, _, directions = torch.linalg.svd(between, full_matrices=False)
    return mean, directions[:rank], share.item()
