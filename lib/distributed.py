"""Several processes under torchrun: joining them, sums over them, DDP and FSDP2. Without torchrun: one."""

import atexit
import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lib.command_line import require
from lib.safety import end_with_parent, release_locks, report_errors


def init_distributed():
    """Joins the torchrun group if there is one -> (rank, world, device); nccl on CUDA, gloo on CPU.

    From here on the system's errors are reported in one sentence, and the processes end with torchrun.
    """
    report_errors()
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    require(local < gpus or not gpus, f"--nproc_per_node is above the {gpus} GPUs here; set it to that.")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(local)
    if world > 1:
        end_with_parent()
    if world > 1 and not dist.is_initialized():
        # nccl gives up after ten minutes: too soon for those that wait while rank 0 writes a large checkpoint
        patience = datetime.timedelta(hours=3)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=patience)
        atexit.register(end_distributed)
    return rank, world, device


def end_distributed():
    """Leaves the torchrun group and gives back what is locked; also called when a program ends early.

    DDP and FSDP still refer to the group, so gloo's threads live on and let go of tensors a moment after the
    last collective: once Python is ending that would abort the process, so it is waited for.
    """
    release_locks()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.5)


def require_shares(global_batch, world):
    """Ends the program unless a step's rows can be dealt out evenly to the processes."""
    divides = global_batch % world == 0
    require(divides, f"GLOBAL_BATCH={global_batch} is not a multiple of the {world} processes.")


def is_rank0():
    """Whether this is the process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(*words, sep=" "):
    """Prints on rank 0 alone, at once."""
    if is_rank0():
        print(*words, sep=sep, flush=True)


def barrier():
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(sums, device="cpu"):
    """Named numbers {name: value} summed over all processes -> the same names, floats."""
    total = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return dict(zip(sums, total.tolist()))


def all_gather_list(mine):
    """The lists of all processes as one list, in order of rank."""
    if not dist.is_initialized():
        return list(mine)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def wrap_parallel(model, kind, device):
    """Spreads a Thinker over the torchrun processes, if there are any -> what training calls.

    ddp: every process holds all, gradients are averaged. fsdp: weights, gradients and moments are cut up.
    """
    if not dist.is_initialized():
        return model
    if kind == "fsdp":
        return shard(model, device)
    # weights of a pooling have no gradient in a micro-batch without imagery
    has_extra = any(not name.startswith("qwen.") for name, _ in model.named_parameters())
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=has_extra)


def no_sync(model, when):
    """A context in which backward keeps its gradients to itself, for all but a step's last micro-batch."""
    return model.no_sync() if when and hasattr(model, "no_sync") else contextlib.nullcontext()


def shard(model, device):
    """FSDP2: cuts up a Thinker, layer by layer, and returns it; fp32 weights, bf16 arithmetic on a GPU.

    Vision, which is frozen, stays whole, so that each process may encode images when it needs to.
    """
    vision = set(model.qwen.model.visual.parameters())
    arithmetic = torch.bfloat16 if device.type == "cuda" else None
    policy = MixedPrecisionPolicy(arithmetic, torch.float32)
    parts = [*model.qwen.model.language_model.layers, model]
    for part in parts:
        fully_shard(part, mp_policy=policy, ignored_params=vision)
    # By itself FSDP prefetches what was used last before: in generation not the same on all processes.
    for part, before in zip(parts, [model, *parts]):
        part.set_modules_to_backward_prefetch([before])
    return model


@contextlib.contextmanager
def whole_weights(model):
    """A context in which every process holds all of a model, cut up by `shard` or not, and may generate."""
    if not isinstance(model, FSDPModule):
        yield
        return
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    # else FSDP would take the part that is called first for the outermost one
    model._get_fsdp_state()._lazy_init()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def full_tensor(x):
    """A tensor that is cut up (a DTensor), as a whole on every process; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, other):
    """A whole tensor, cut up as `other` is, if it is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x, other.device_mesh, other.placements)


def gather_to_rank0(tensors):
    """Whole tensors by name on the CPU, of rank 0; nothing on the others, which all take part."""
    wholes = {}
    for name, x in tensors.items():
        whole = full_tensor(x.detach())
        if is_rank0():
            wholes[name] = whole.cpu().contiguous()
    return wholes


def autocast(device):
    """bf16 arithmetic on a GPU; on a CPU nothing changes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
