"""lib/distributed.py: two processes hold, train, save and generate what one does, with DDP and with FSDP2."""

import torch
from helpers import refused, two_processes
from torch import nn

from lib.checkpoints import extra_parameters
from lib.distributed import all_gather_list, all_reduce_sum, autocast, full_tensor, gather_to_rank0
from lib.distributed import init_distributed, is_rank0, no_sync, print0, shard_like, whole_weights
from lib.distributed import wrap_parallel
from model import load_model

# What both processes run. Each first makes the step alone, on all rows, as what is to be expected.
SCRIPT = '''
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

import model as model_py
from dift import dift_loss
from lib.checkpoints import load_optimizer, save_checkpoint
from lib.distributed import all_gather_list, all_reduce_sum, barrier, end_distributed, full_tensor
from lib.distributed import init_distributed, is_rank0, no_sync, print0, shard_like, whole_weights
from lib.distributed import wrap_parallel
from lib.rows import read_rows
from model import Thinker, VisionCache, collate, encode_row, generate, load_model

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
rows = read_rows(folder / "data" / "train_imagery.jsonl")[:4]
torch.set_num_threads(1)


class PoolingThinker(Thinker):
    """With weights beside those of its Qwen2.5-VL."""

    def __init__(self, qwen, tokenizer):
        super().__init__(qwen, tokenizer)
        self.token_weight = nn.Parameter(torch.ones(12, 1))

    def pool(self, features, grid):
        return super().pool(features * self.token_weight, grid)


model_py.Thinker = PoolingThinker


def train(thinker, model, rank, world):
    """One step on four rows, a micro-batch each -> the optimiser, its norm and gradients, whole."""
    trained = [weight for weight in thinker.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)
    vision = VisionCache(thinker)
    samples = [encode_row(thinker, row) for row in rows]
    n_text = sum(int(sample.is_text.sum()) for sample in samples)
    n_latent = sum(int(sample.is_latent.sum()) for sample in samples)
    mine = samples[rank::world]
    thinker.train()
    for number, sample in enumerate(mine, 1):
        batch = vision.prepare(collate([sample], thinker.token_id["pad"]))
        with no_sync(model, when=number < len(mine)):
            loss, _ = dift_loss(*model(batch), n_text, n_latent, 1.0, 0.3)
            (loss * world).backward()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(thinker.parameters(), 0.5))
    gradients = {name: full_tensor(x.grad) for name, x in thinker.named_parameters() if x.requires_grad}
    optimizer.step()
    thinker.eval()
    return optimizer, norm, gradients


def weights_of(thinker):
    return {name: full_tensor(weight.detach()) for name, weight in thinker.named_parameters()}


def answer(thinker, rank):
    """As many answers and steps as the rank says: with shared weights the processes would wait for ever."""
    samples = [encode_row(thinker, row, answer=False) for row in rows[: 1 + rank]]
    answers = generate(thinker, samples, 3 + 5 * rank)
    return [one.ids for one in answers]


rank, world, device = init_distributed()
assert (rank, world, device.type) == (rank, 2, "cpu") and is_rank0() == (rank == 0)
expected = load_model(folder / "base", device, 4, "grid")
answers_before = answer(expected, rank)
_, expected_norm, expected_gradients = train(expected, expected, 0, 1)
answers_after = answer(expected, rank)

for kind in ("ddp", "fsdp"):
    thinker = load_model(folder / "base", device, 4, "grid")
    model = wrap_parallel(thinker, kind, device)
    cut_up = [name for name, weight in thinker.named_parameters() if isinstance(weight, DTensor)]
    frozen = {name for name, weight in thinker.named_parameters() if not weight.requires_grad}
    assert bool(cut_up) == (kind == "fsdp") and not frozen & set(cut_up)
    if kind == "fsdp":
        assert len(cut_up) + len(frozen) == len(list(thinker.parameters()))

    # generation before anything else, a step, generation again, and another step
    with whole_weights(thinker):
        assert answer(thinker, rank) == answers_before
    optimizer, norm, gradients = train(thinker, model, rank, world)
    assert torch.allclose(norm, expected_norm, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys() and "token_weight" in gradients
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected_gradients[name], atol=1e-6), name
    with whole_weights(thinker):
        assert answer(thinker, rank) == answers_after
    after = [name for name, weight in thinker.named_parameters() if isinstance(weight, DTensor)]
    assert after == cut_up

    # a checkpoint's files are those of one process; its moments come back cut up as they were
    checkpoint = save_checkpoint(out / kind, 1, thinker, {"LR": 1e-3}, optimizer)
    extra = load_file(checkpoint / "extra.safetensors")
    assert torch.allclose(extra["token_weight"], expected.token_weight, atol=2e-6)
    reloaded = load_model(checkpoint)
    for name, weight in weights_of(thinker).items():
        assert torch.equal(weight, weights_of(reloaded)[name]), name
    trained = [weight for weight in thinker.parameters() if weight.requires_grad]
    other = torch.optim.AdamW(trained, 1e-3, fused=True)
    load_optimizer(checkpoint, thinker, other)
    for weight in trained:
        for key, x in optimizer.state[weight].items():
            y = other.state[weight][key]
            assert type(x) is type(y) and torch.equal(full_tensor(x), full_tensor(y)), key
    train(thinker, model, rank, world)

    # one weight, whole and cut up again
    weight = thinker.qwen.lm_head.weight.detach()
    again = shard_like(full_tensor(weight), weight)
    assert type(again) is type(weight) and torch.equal(full_tensor(again), full_tensor(weight))
    print0("the same with", kind)

assert all_reduce_sum({"a": 1 + rank, "b": torch.tensor(0.5)}) == {"a": 3.0, "b": 1.0}
assert all_gather_list([rank, "x"] * (1 + rank)) == [0, "x", 1, "x", 1, "x"]
barrier()
end_distributed()
'''


def test_two_processes_do_what_one_does(tiny, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = two_processes(tmp_path / "script.py", tiny, tmp_path / "out")
    assert printed.splitlines() == ["the same with ddp", "the same with fsdp"]  # one process speaks
    for name in ("model.safetensors", "extra.safetensors", "optimizer.safetensors", "config.json"):
        for kind in ("ddp", "fsdp"):
            assert (tmp_path / "out" / kind / "step_000001" / name).is_file(), name


def test_one_process_changes_nothing(tiny, capsys):
    """Without torchrun there is no group: the same functions hand back what they were given."""
    assert init_distributed() == (0, 1, torch.device("cpu"))
    model = load_model(tiny / "base", K=4, pooling="grid")
    for kind in ("ddp", "fsdp"):
        assert wrap_parallel(model, kind, torch.device("cpu")) is model
    with whole_weights(model), no_sync(model, when=True):
        pass
    x = torch.arange(3.0)
    assert full_tensor(x) is x and shard_like(x, x) is x
    assert all_reduce_sum({"a": 1, "b": torch.tensor(0.5)}) == {"a": 1.0, "b": 0.5}
    assert all_gather_list((1, 2)) == [1, 2] and is_rank0()
    model.token_weight = nn.Parameter(x)
    wholes = gather_to_rank0(extra_parameters(model))
    assert list(wholes) == ["token_weight"] and torch.equal(wholes["token_weight"], x)
    print0("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused(init_distributed, "--nproc_per_node", "1 GPUs")


def test_a_cpu_calculates_in_float32():
    with autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
