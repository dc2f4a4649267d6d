"""Checkpoints, which appear whole or not at all, and runs, which go on where they were killed."""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib.command_line import require
from lib.distributed import all_reduce_sum, barrier, gather_to_rank0, is_rank0, shard_like
from lib.files import (
    append_jsonl,
    force_to_disk,
    parse_json,
    read_json,
    read_jsonl,
    remove_folder,
    remove_leftovers,
)
from lib.files import replace_folder, to_jsonl, write_text
from lib.loading import EXTRA, MOMENTS, list_checkpoints, read_tensors, remedy_for, step_of
from lib.safety import take_lock

KEPT = 2  # checkpoints of a run that stay
RESULTS = ("eval", "before", "after")  # folders of scores that training writes beside its checkpoints


def linear_warmup_decay(step, steps, warmup, peak):
    """Linear warm-up to `peak`, then linear decay that would reach zero at `steps`; step counts from 0."""
    rising = (step + 1) / max(1, warmup)
    falling = (steps - step) / max(1, steps - warmup)
    return peak * min(rising, falling)


# ---------------------------------------------------------------- checkpoints


def newest_checkpoint(path):
    """A checkpoint folder itself, or the newest step_* of a run's folder; exits if neither is there."""
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    folders = list_checkpoints(path)
    remedy = "train one with dift.py or set MODEL"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.exists():
        command = f"hf download {path} --local-dir {path.name}"
        hub = f"if this is a name on the hub, run `{command}` and set MODEL={path.name}"
        remedy = f"MODEL must be a folder: train one with dift.py, or, {hub}"
    require(folders, f"{path} holds no config.json and no step_*/; {remedy}.")
    return folders[-1]


def save_checkpoint(out, step, model, record, optimizer=None, keep=KEPT):
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
    require_finite(out, step, {**dict(model.named_parameters()), **moments})
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
        # the library sorts the names of a run that goes on, so they are sorted from the beginning
        (unfinished / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=1))
        if extra:
            save_file(extra, unfinished / EXTRA)
        if optimizer:
            save_file(moments, unfinished / MOMENTS)
        # also after a loss of power the older checkpoint goes only when this one is whole on the disk
        for path in (*unfinished.rglob("*"), unfinished):
            force_to_disk(path)
        replace_folder(unfinished, folder)
        force_to_disk(out)
        remove_old_checkpoints(out, folder, keep)
    barrier()
    return folder


def remove_old_checkpoints(out, newest, keep):
    """Deletes all but the `keep` checkpoints up to the newest; a later step is of a run that was left."""
    # one that a user renamed has no step, and stays
    folders = [folder for folder in list_checkpoints(out) if step_of(folder) >= 0]
    kept = [folder for folder in folders if step_of(folder) <= step_of(newest)][-keep:]
    for folder in folders:
        if folder not in kept:
            remove_folder(folder)


def require_finite(out, step, tensors):
    """Ends the program on all processes, before anything is written, if a tensor is NaN or infinite."""
    broken = {}
    for name, x in tensors.items():
        local = x.to_local() if hasattr(x, "to_local") else x
        broken[name] = not local.detach().isfinite().all()
    device = next(iter(tensors.values())).device
    total = all_reduce_sum({"broken": sum(broken.values())}, device)
    first = next((name for name, is_broken in broken.items() if is_broken), "a weight")
    require(not total["broken"], f"{first} is NaN or infinite after step {step}; {remedy_after_nan(out)}.")


def is_finite(value):
    """Whether a value is no number, or a finite one."""
    return not isinstance(value, float) or math.isfinite(value)


def remedy_after_nan(out):
    """What a sentence on NaN says of the last good checkpoint and of what to do."""
    good = list_checkpoints(out)
    kept = f"{good[-1]} is the last good checkpoint and stays" if good else "no checkpoint was written"
    return f"{kept}; lower LR, raise WARMUP, or check DATA"


def extra_parameters(model):
    """The weights of a Thinker that are no part of its Qwen2.5-VL, such as those of a pooling, by name."""
    return {name: x for name, x in model.named_parameters() if not name.startswith("qwen.")}


def load_extra_weights(folder, model):
    """Puts the weights of extra.safetensors into a Thinker; exits if it has no place for one of them."""
    file = Path(folder) / EXTRA
    if not file.is_file():
        return
    parameters = extra_parameters(model)
    stored = read_tensors(file)
    for name, x in stored.items():
        has_place = f"{file} holds weights '{name}' that this code has no place for"
        fits = name in parameters and parameters[name].shape == x.shape
        require(fits, f"{has_place}; use the code that trained them.")
        parameters[name].data.copy_(x)
    lacking = sorted(parameters.keys() - stored.keys())
    require(not lacking, f"{file} lacks the weights {lacking[:1]}; use the code that trained them.")


def load_optimizer(folder, model, optimizer):
    """Puts the saved moments back, so that training goes on exactly; exits if any are missing or wrong."""
    path = Path(folder) / MOMENTS
    require(
        path.is_file(), f"There is no {path}, so training cannot go on; set RESUME=never to start afresh."
    )
    parameters = {name.removeprefix("qwen."): x for name, x in model.named_parameters()}
    stored = read_tensors(path)
    require_moments(path, stored, model)
    fused = optimizer.defaults["fused"]
    for file_name, x in stored.items():
        name, _, key = file_name.rpartition(".")  # "<name>.exp_avg", "<name>.exp_avg_sq", "<name>.step"
        parameter = parameters[name]
        if key == "step":
            x = x.to(parameter.device if fused else "cpu")
        else:
            x = shard_like(x.to(parameter.device), parameter)
        optimizer.state[parameter][key] = x


def require_moments(path, stored, model):
    """Ends the program unless the moments are those of the trained weights, all of them, in their shapes.

    Weights beside those of the Qwen2.5-VL, which not every step uses, may have none yet.
    """
    expected = {}
    needed = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        short = name.removeprefix("qwen.")
        shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size([])}
        for key, shape in shapes.items():
            expected[f"{short}.{key}"] = shape
        if short != name:
            needed.update(f"{short}.{key}" for key in shapes)
    remedy = remedy_for(path.parent)
    lacking = sorted(needed - stored.keys())
    require(not lacking, f"{path} lacks {lacking[:1]}, so training cannot go on exactly; {remedy}.")
    for name, x in stored.items():
        fits = name in expected and x.shape == expected[name]
        require(fits, f"{path} holds {name} {tuple(x.shape)}, which fits no trained weight; {remedy}.")


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
        """Adds one step to the log; ends the program if its loss or gradient is NaN or infinite."""
        broken = [name for name in entry if not is_finite(entry[name])]
        values = ", ".join(f"{name} {entry[name]}" for name in broken)
        stops = {"loss", "gnorm"} & set(broken)
        require(not stops, f"Stopped at step {entry['step']}: {values}; {remedy_after_nan(self.out)}.")
        self.entries.append(entry)
        if is_rank0():
            append_jsonl(self.log, [entry])

    def save(self, step, model, optimizer):
        """Writes a checkpoint of this step."""
        return save_checkpoint(self.out, step, model, self.record, optimizer)


def read_record(folder, out):
    """The constants that a checkpoint was trained with, under today's names.

    Exits where an earlier version of the code had a constant whose other values are no longer there.
    """
    remedy = remedy_for(folder)
    stored = read_json(folder / "config.json", dict, remedy).get("run")
    is_right = isinstance(stored, dict) and type(stored.get("step")) is int and stored["step"] >= 0
    require(is_right, f"{folder}/config.json is damaged (it holds no record of a run); {remedy}.")
    for name, only in {"TRAIN_VISION": False, "SUPERVISE": "all"}.items():
        value = stored.pop(name, only)
        gone = f"OUT={out} holds a run with {name}={value}, which this version of the code cannot go on with"
        require(value == only, f"{gone}; set another OUT, or RESUME=never.")
    if "W_ACC" in stored:
        stored["REWARD_WEIGHTS"] = {"acc": stored.pop("W_ACC"), "fmt": stored.pop("W_FMT", None)}
    # what came to dift.py later: without it
    if "W_SIM" in stored:
        w_sim = stored["W_SIM"]
        without = {"IMAGERY": "latents", "BOTTLENECK": 0.0, "SELF_FED": 0.0, "W_SIM_END": w_sim}
        for name, value in without.items():
            stored.setdefault(name, value)
    return stored


def require_own_folder(out, kept):
    """Ends the program if OUT holds what a run would delete or overwrite and what is not this script's.

    Ours are folders with a checkpoint whose record has the script's constants, or with a log of steps.
    """
    found = [path for path in out.glob("step_*") if path.is_dir()]
    found += [out / name for name in (*RESULTS, "log.jsonl") if (out / name).exists()]
    if not found:
        return
    remedy = "a run would overwrite it; set another OUT"
    records = []
    for folder in out.glob("step_*"):
        file = folder / "config.json"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "{}"
        config, is_damaged = parse_json(text)
        record = config.get("run") if isinstance(config, dict) else None
        is_run = is_damaged or isinstance(record, dict)
        require(is_run, f"{folder} was not written by this script; {remedy}.")
        if record:
            # half of them, for an earlier version of the code had fewer
            is_same_stage = 2 * sum(name in record for name in kept) >= len(kept)
            require(is_same_stage, f"OUT={out} holds a run of another stage; {remedy}.")
            records.append(record)
    is_ours = records or is_log(out / "log.jsonl")
    require(is_ours, f"{found[0]} was not written by this script; {remedy}.")


def is_log(path):
    """Whether a file is the log of a run: empty, or its first line an entry of a step."""
    if not path.is_file():
        return False
    lines = path.read_bytes().splitlines()
    # a kill may have left half of a first line
    if not lines or b'{"step": '.startswith(lines[0][:9]):
        return True
    entry, _ = parse_json(lines[0].decode(errors="replace"))
    return isinstance(entry, dict) and "step" in entry


def fingerprint(rows):
    """What rows say, as a short text that changes with any of them; paths count by their last parts."""
    digest = hashlib.sha256()
    for row in rows:
        images = [Path(path).name for path in (*row.image_input, *row.image_output)]
        facts = [row.id, row.text_input, row.text_output, row.times, row.key, row.options, row.supervise]
        digest.update(json.dumps([*facts, images]).encode())
    return digest.hexdigest()[:16]


def open_run(out, resume, constants, kept, rows=None):
    """Opens OUT for a run: to go on from its newest checkpoint, or, with RESUME=never or none there, afresh.

    constants: {name: value}; those named in `kept` must be the same as when the run began, or it is refused
    in one sentence; so must the training rows, if they are given. Rank 0 locks OUT until the program ends.
    """
    out = Path(out)
    is_folder = out.is_dir() or not (out.exists() or out.is_symlink())
    require(is_folder, f"OUT={out} is a file or a link to nothing; set OUT to a folder.")
    require_own_folder(out, kept)
    # a new folder is not made, and so not locked, before all else is known to be right
    if is_rank0() and out.is_dir():
        take_lock(out)
        remove_leftovers(out)
    content = {"data_content": fingerprint(rows)} if rows else {}
    checkpoints = list_checkpoints(out) if resume == "auto" else []
    if not checkpoints:
        return Run(out, 0, None, {**constants, **content}, out / "log.jsonl")
    stored = read_record(checkpoints[-1], out)
    for name in kept:
        before = stored.get(name)
        same = before == constants[name] or list_of(before) == list_of(constants[name])
        require(same, f"OUT={out} holds a run with {name}={before}; set another OUT, or RESUME=never.")
    # a run of an earlier version of the code does not know what its rows were
    for name, value in content.items():
        same = stored.get(name, value) == value
        changed = f"OUT={out} holds a run on other rows than DATA={constants.get('DATA')} has now"
        require(same, f"{changed}; restore them, set another OUT, or RESUME=never.")
    record = {**stored, **constants, **content}
    step = record.pop("step")
    entries = read_jsonl(out / "log.jsonl")[:step]
    return Run(out, step, checkpoints[-1], record, out / "log.jsonl", entries)


def list_of(value):
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def clear_run(run, unfinished, results):
    """Rank 0: locks OUT, removes what a new run must not find, and cuts the log to the steps that are done.

    unfinished: whether steps are still to come, which outdate the folder of results.
    """
    if is_rank0():
        take_lock(run.out)
        outdated = sorted(run.out.glob("step_*")) if run.start == 0 else []
        if unfinished:
            outdated.append(run.out / results)
        for folder in outdated:
            remove_folder(folder)
        # a kill may have come between writing a checkpoint and removing an old one
        if run.folder:
            remove_old_checkpoints(run.out, run.folder, KEPT)
        write_text(run.log, to_jsonl(run.entries))
