"""Checkpoints, which appear whole or not at all, and runs, which go on where they were killed."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib.command_line import require
from lib.distributed import barrier, gather_to_rank0, is_rank0, shard_like
from lib.files import read_json, read_jsonl, to_jsonl, write_text

EXTRA = "extra.safetensors"  # weights that a Thinker was given beside those of the Qwen2.5-VL
MOMENTS = "optimizer.safetensors"


def linear_warmup_decay(step, steps, warmup, peak):
    """Linear warm-up to `peak`, then linear decay that would reach zero at `steps`; step counts from 0."""
    rising = (step + 1) / max(1, warmup)
    falling = (steps - step) / max(1, steps - warmup)
    return peak * min(rising, falling)


# ---------------------------------------------------------------- checkpoints


def newest_checkpoint(path):
    """A checkpoint folder itself, or the newest step_* of a run's folder; exits if neither is there."""
    path = Path(path)
    folders = [file.parent for file in sorted(path.glob("step_*/config.json"))]
    if (path / "config.json").is_file():
        folders.append(path)
    require(folders, f"{path} holds no config.json and no step_*/; train one with dift.py or set MODEL.")
    return folders[-1]


def save_checkpoint(out, step, model, record, optimizer=None, keep=2):
    """Writes out/step_000500/: weights, tokenizer (save_pretrained layout), config.json, AdamW's moments.

    record: the run's constants, kept in config.json under `run`. Written under a temporary name, then
    renamed; only the newest `keep` stay. All processes call it, rank 0 writes: the same files for one
    process, DDP and FSDP.
    """
    out = Path(out)
    folder = out / f"step_{step:06d}"
    weights = dict(model.qwen.named_parameters())
    moments = {}
    if optimizer:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                moments[f"{name.removeprefix('qwen.')}.{key}"] = value
    weights = gather_to_rank0(weights)
    extra = gather_to_rank0(extra_parameters(model))
    moments = gather_to_rank0(moments)
    if is_rank0():
        unfinished = out / f".unfinished_{step:06d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.qwen.save_pretrained(unfinished, state_dict=weights)
        model.tokenizer.save_pretrained(unfinished)
        config = read_json(unfinished / "config.json")
        config["run"] = {**record, "step": step}
        (unfinished / "config.json").write_text(json.dumps(config, indent=1))
        if extra:
            save_file(extra, unfinished / EXTRA)
        if optimizer:
            save_file(moments, unfinished / MOMENTS)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        remove_old_checkpoints(out, folder, keep)
    barrier()
    return folder


def remove_old_checkpoints(out, newest, keep):
    """Deletes all but the `keep` checkpoints up to the newest; a later step is of a run that was left."""
    folders = sorted(out.glob("step_*"))
    kept = [folder for folder in folders if folder <= newest][-keep:]
    for folder in folders:
        if folder not in kept:
            shutil.rmtree(folder)


def extra_parameters(model):
    """The weights of a Thinker that are no part of its Qwen2.5-VL, such as those of a pooling, by name."""
    return {name: x for name, x in model.named_parameters() if not name.startswith("qwen.")}


def load_extra_weights(folder, model):
    """Puts the weights of extra.safetensors into a Thinker; exits if it has no place for one of them."""
    file = Path(folder) / EXTRA
    if not file.is_file():
        return
    parameters = extra_parameters(model)
    for name, stored in load_file(file).items():
        has_place = f"{file} holds weights '{name}' that this code has no place for"
        require(name in parameters, f"{has_place}; use the code that trained them.")
        parameters[name].data.copy_(stored)


def load_optimizer(folder, model, optimizer):
    """Puts the saved moments back, so that training goes on exactly; exits if the file is not there."""
    path = Path(folder) / MOMENTS
    require(
        path.is_file(), f"There is no {path}, so training cannot go on; set RESUME=never to start afresh."
    )
    parameters = {name.removeprefix("qwen."): x for name, x in model.named_parameters()}
    fused = optimizer.defaults["fused"]
    for file_name, x in load_file(path).items():
        name, _, key = file_name.rpartition(".")  # "<name>.exp_avg", "<name>.exp_avg_sq", "<name>.step"
        parameter = parameters[name]
        if key == "step":
            x = x.to(parameter.device if fused else "cpu")
        else:
            x = shard_like(x.to(parameter.device), parameter)
        optimizer.state[parameter][key] = x


def share_vision(policy, reference, parent, source):
    """Gives both models one visual encoder; exits unless they have the same shapes, vision, K and tokens."""
    shapes = []
    for model in (policy, reference):
        shapes.append({name: tuple(x.shape) for name, x in model.qwen.state_dict().items()})
    agree = shapes[0] == shapes[1] and policy.K == reference.K and policy.token_id == reference.token_id
    if agree:
        pairs = zip(policy.qwen.model.visual.parameters(), reference.qwen.model.visual.parameters())
        agree = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    differs = f"REFERENCE={source} differs from {parent} in shape, vision, K or tokens"
    require(agree, f"{differs}; choose the checkpoint that {parent} started from.")
    policy.qwen.model.visual = reference.qwen.model.visual


# ---------------------------------------------------------------- runs


@dataclass
class Run:
    """A training run in its folder: where it starts, its log, and what its checkpoints record."""

    out: Path
    start: int  # steps that are done
    folder: Path | None  # the checkpoint that it goes on from, None for a new run
    record: dict  # constants as the run's checkpoints keep them
    log: Path
    entries: list = field(default_factory=list)  # of the log so far

    def write(self, entry):
        """Adds one step to the log."""
        self.entries.append(entry)
        if is_rank0():
            with open(self.log, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def save(self, step, model, optimizer):
        """Writes a checkpoint of this step."""
        return save_checkpoint(self.out, step, model, self.record, optimizer)


def read_record(folder, out):
    """The constants that a checkpoint was trained with, under today's names.

    Exits where an earlier version of the code had a constant whose other values are no longer there.
    """
    stored = read_json(folder / "config.json")["run"]
    for name, only in {"TRAIN_VISION": False, "SUPERVISE": "all"}.items():
        value = stored.pop(name, only)
        gone = f"OUT={out} holds a run with {name}={value}, which this version of the code cannot go on with"
        require(value == only, f"{gone}; set another OUT, or RESUME=never.")
    if "W_ACC" in stored:
        stored["REWARD_WEIGHTS"] = {"acc": stored.pop("W_ACC"), "fmt": stored.pop("W_FMT")}
    return stored


def open_run(out, resume, constants, kept):
    """Opens OUT for a run: to go on from its newest checkpoint, or, with RESUME=never or none there, afresh.

    constants: {name: value}; those named in `kept` must be the same as when the run began, or it is refused
    in one sentence.
    """
    out = Path(out)
    checkpoints = sorted(out.glob("step_*/config.json")) if resume == "auto" else []
    if not checkpoints:
        return Run(out, 0, None, dict(constants), out / "log.jsonl")
    stored = read_record(checkpoints[-1].parent, out)
    for name in kept:
        before = stored.get(name)
        same = before == constants[name] or list_of(before) == list_of(constants[name])
        require(same, f"OUT={out} holds a run with {name}={before}; set another OUT, or RESUME=never.")
    record = {**stored, **constants}
    step = record.pop("step")
    entries = read_jsonl(out / "log.jsonl")[:step]
    return Run(out, step, checkpoints[-1].parent, record, out / "log.jsonl", entries)


def list_of(value):
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def clear_run(run, unfinished, results):
    """Rank 0: removes what a new run must not find, and cuts the log to the steps that are done.

    unfinished: whether steps are still to come, which outdate the folder of results.
    """
    if is_rank0():
        outdated = sorted(run.out.glob("step_*")) if run.start == 0 else []
        if unfinished:
            outdated.append(run.out / results)
        for folder in outdated:
            shutil.rmtree(folder, ignore_errors=True)
        write_text(run.log, to_jsonl(run.entries))
