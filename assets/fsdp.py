"""FSDP2 for PARALLEL=fsdp: weights, gradients and moments of a Thinker, cut over the torchrun processes.

Read it when a model does not fit one device; with any other `whole`, `full` and `cut_like` change nothing. In
between, `whole` gives every process all the weights, so that generation may take as many steps as it likes
on each.
"""

import contextlib

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model, device):
    """Cuts up a Thinker, layer by layer, and returns it; fp32 weights, bf16 arithmetic on a GPU.

    Vision, which must be frozen, stays whole, so that each process may encode images when it needs to.
    """
    vision = set(model.net.model.visual.parameters())
    policy = MixedPrecisionPolicy(torch.bfloat16 if device.type == "cuda" else None, torch.float32)
    parts = [*model.net.model.language_model.layers, model]
    for part in parts:
        fully_shard(part, mp_policy=policy, ignored_params=vision)
    for part, before in zip(parts, [model, *parts]):  # by itself FSDP prefetches what came before at last:
        part.set_modules_to_backward_prefetch([before])  # in generation, not the same on all processes
    return model


@contextlib.contextmanager
def whole(model):
    """A context in which every process holds all of a model, cut up by `shard` or not, and may generate."""
    if not isinstance(model, FSDPModule):
        yield
        return
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    none, token = torch.zeros(0, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
    batch = {
        "ids": token,
        "positions": token.expand(3, 1, 1),
        "text_at": none,
        "latent_at": none,
        "where": "",
    }
    batch |= {"is_visual": token.bool(), "is_latent": token.bool()}
    with torch.no_grad():  # FSDP takes the module that is called first for the outermost one
        model({name: x.to(model.banned.device) if torch.is_tensor(x) else x for name, x in batch.items()})
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def full(x):
    """A tensor that is cut up (a DTensor), as a whole on every process; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut_like(x, other):
    """A whole tensor, cut up as `other` is, if it is."""
    return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x
