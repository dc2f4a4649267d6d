"""lib/fast.py: the plain methods of model.py and the fast ones that stand in their places, equal to 1e-5."""

import functools
import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import draw_image, lively, make_world
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dift import dift_loss
from lib import fast
from lib.images import load_patches
from model import Sample, Thinker, VisionCache, collate, encode_row, generate, load_model, token_log_probs

METHODS = ("text", "log_probs", "new_cache", "embed_tokens")


@pytest.fixture(scope="module", params=["tied", "untied"])
def world(request, tiny, tmp_path_factory):
    """A folder with a base; the words of an untied head have rows of their own."""
    if request.param == "tied":
        return tiny
    return make_world(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def pair(world):
    """(plain, fast) of the same lively weights, a network that often imagines and sometimes ends."""
    return [with_bias(lively(world, fast=is_fast), 8.0, 6.5) for is_fast in (False, True)]


@pytest.fixture(scope="module")
def calm_pair(world):
    """(plain, fast) of the base's own weights, in which a small difference does not grow with each latent."""
    base = world / "base"
    models = [load_model(base, K=4, pooling="grid", fast=is_fast) for is_fast in (False, True)]
    return [with_bias(model, 9.0, 7.5) for model in models]


def with_bias(model, latent_start, im_end):
    """The model, with a bias on the logits of two tokens."""
    bias = torch.zeros(len(model.qwen.lm_head.weight))
    bias[model.token_id["latent_start"]] = latent_start
    bias[model.token_id["im_end"]] = im_end
    model.qwen.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model


def batch_of(model, rows):
    """Rows -> the batch that the forward pass takes."""
    samples = [encode_row(model, row) for row in rows]
    return VisionCache(model).prepare(collate(samples, model.token_id["pad"]))


def assert_close(mine, theirs, name="", most=1e-5):
    """Equal to 1e-5, of numbers larger than 1 to 1e-5 of the largest."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, name
    if theirs.is_floating_point() and theirs.numel():
        # log-probabilities of words that are left out are -inf in both
        assert torch.equal(mine.isneginf(), theirs.isneginf()), name
        mine, theirs = mine[~mine.isneginf()], theirs[~theirs.isneginf()]
        scale = max(1.0, theirs.abs().max().item())
        difference = (mine - theirs).abs().max().item()
        assert difference <= most * scale, f"{name}: {difference} of {scale}"
    else:
        assert torch.equal(mine, theirs), name


def gradients_of(model):
    """Every weight's gradient by name, dense, and the gradients forgotten; frozen weights have none."""
    gradients = {}
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) is weight.requires_grad, name
        if weight.requires_grad:
            assert weight.grad.layout == torch.strided and weight.grad.abs().sum() > 0, name
            gradients[f"gradient of {name}"] = weight.grad.clone()
    model.zero_grad(set_to_none=True)
    return gradients


# ---------------------------------------------------------------- plain == fast


@torch.no_grad()
def measure_logits(model, rows):
    """Logits of every position, padded on either side."""
    results = {}
    for side in ("left", "right"):
        samples = [encode_row(model, row, answer=False) for row in rows[:4]]
        batch = VisionCache(model).prepare(collate(samples, model.token_id["pad"], side))
        hidden = model.text(model.embed(batch), batch.positions, batch.is_real)
        hidden = hidden[batch.is_real]
        results[f"hidden states, {side}"] = hidden
        results[f"logits, {side}"] = model.qwen.lm_head(hidden)
    return results


def measure_log_probs(model, rows):
    """Log-probabilities with and without the words that are never sampled, states and targets."""
    batch = batch_of(model, rows[:4])
    results = {}
    for forbid, temperature in ((False, 1.0), (True, 1.0), (True, 0.7)):
        logp, imagined, targets = model(batch, forbid=forbid, temperature=temperature)
        results[f"log-probabilities, {forbid}, {temperature}"] = logp.detach()
    results["imagined"] = imagined.detach()
    results["targets"] = targets.detach()
    assert len(logp) > 100 and len(imagined) == 4 * (1 + 2 + 3 + 1)
    return results


def measure_losses(model, rows):
    """Eq. 7 and its terms, of a batch and of one with the latents given."""
    batch = batch_of(model, rows[:4])
    results = {}
    for name, latents in (("pooled", None), ("given", torch.linspace(-1, 1, 28 * 64).view(28, 64))):
        logp, imagined, targets = model(batch, latents)
        loss, terms = dift_loss(logp, imagined, targets, len(logp), len(imagined), 0.1, 1.0)
        results[f"loss, {name}"] = loss.detach()
        for term, value in terms.items():
            results[f"{term}, {name}"] = value.detach()
    return results


def measure_gradients(model, rows):
    """Gradients of three micro-batches that are added up, the last of one row."""
    vision = VisionCache(model)
    batches = []
    for some in (rows[:3], rows[3:5], rows[5:6]):
        samples = [encode_row(model, row) for row in some]
        batches.append(vision.prepare(collate(samples, model.token_id["pad"])))
    n_text = sum(len(batch.text_at) for batch in batches)
    n_latent = sum(len(batch.latent_at) for batch in batches)
    for batch in batches:
        loss, _ = dift_loss(*model(batch), n_text, n_latent, 1.0, 0.3)
        loss.backward()
    return gradients_of(model)


def measure_ablations(model, rows):
    """Rows with a bottleneck, that read their own imagery, with both, and with neither, and gradients."""
    kinds = [(True, False), (False, True), (True, True), (False, False)]
    samples = []
    for row, (blind, self_fed) in zip(rows, kinds):
        samples.append(encode_row(model, row, blind=blind, self_fed=self_fed))
    batch = VisionCache(model).prepare(collate(samples, model.token_id["pad"]))
    logp, imagined, targets = model(batch)
    loss, _ = dift_loss(logp, imagined, targets, len(logp), len(imagined), 1.0, 0.3)
    loss.backward()
    results = {"log-probabilities": logp.detach(), "imagined": imagined.detach(), **gradients_of(model)}
    return results


def answers_batch(model, rows, count):
    """`count` made-up answers to each prompt, with a latent block in most -> Batch, latents (n, D)."""
    prompts = [encode_row(model, row, answer=False) for row in rows]
    samples = []
    for number in range(len(rows) * count):
        prompt = prompts[number // count]
        ids = encode_row(model, rows[number % len(rows)]).ids[len(prompts[number % len(rows)].ids) :]
        ids = ids[: 12 + 5 * number]  # of different lengths
        n = len(ids)
        is_latent = ids == model.token_id["latent_pad"]
        positions = (prompt.positions.max() + 1 + torch.arange(n)).expand(3, -1)
        nothing = torch.zeros(n, dtype=torch.bool)
        is_text = ~is_latent & (ids != model.token_id["latent_end"])  # what may be sampled
        samples.append(Sample(ids, positions, is_text, is_latent, nothing, ~nothing, source="test:1"))
    vision = VisionCache(model)
    batch = vision.prepare(collate(samples, model.token_id["pad"]))
    batch.prompts = vision.prepare(collate(prompts, model.token_id["pad"], side="left"))
    generator = torch.Generator().manual_seed(3)
    return batch, torch.randn(len(batch.latent_at), 64, generator=generator)


def measure_shared_prompts(model, rows):
    """4DRL: several prompts, or one, that are read once for all answers to each."""
    results = {}
    for questions in (3, 1):
        batch, latents = answers_batch(model, rows[:questions], count=3)
        logp, imagined, _ = model(batch, latents, forbid=True, temperature=0.9)
        (logp.sum() + imagined.sum()).backward()
        assert len(batch.ids) == 3 * questions and len(latents) > 4
        results[f"log-probabilities, {questions}"] = logp.detach()
        results[f"imagined, {questions}"] = imagined.detach()
        for name, gradient in gradients_of(model).items():
            results[f"{name}, {questions}"] = gradient
    return results


@torch.no_grad()
def measure_cache(model, rows):
    """What a cache holds after prompts, their repetition and ten tokens more; decoding equals no cache."""
    results = {}
    samples = [encode_row(model, row, answer=False) for row in rows[:2]]
    samples.append(encode_row(model, replace(rows[2], image_input=[], times=[]), answer=False))
    batch = VisionCache(model).prepare(collate(samples, model.token_id["pad"], side="left"))
    for copies in (1, 2):
        cache, hidden, is_real, position = model.read_prompts(batch, copies)
        inputs = model.embed(batch).repeat_interleave(copies, dim=0)
        positions = batch.positions.repeat_interleave(copies, dim=1)
        states = [hidden]
        for step in range(10):
            token = torch.arange(len(hidden))[:, None] + 20 * step  # (B, 1)
            is_real = torch.cat([is_real, torch.ones_like(is_real[:, :1])], dim=1)
            position = position + 1
            x = model.embed_tokens(token)
            at = position.expand(3, -1)[..., None]
            states.append(model.text(x, at, is_real, cache))
            inputs = torch.cat([inputs, x], dim=1)
            positions = torch.cat([positions, at], dim=2)

        # the whole sequence at once, without a cache
        uncached = model.text(inputs, positions, is_real)[:, -11:]
        states = torch.cat(states, dim=1)
        assert torch.allclose(states, uncached, atol=1e-4)
        results[f"states, {copies}"] = states
        assert cache.get_seq_length() == is_real.shape[1]
        for number, layer in enumerate(cache.layers):
            for name, x in (("keys", layer.keys), ("values", layer.values)):
                # what stands at padded places is never read
                seen = x.transpose(1, 2)[is_real]
                results[f"{name} of layer {number}, {copies}"] = seen
    return results


def measure_answers(model, rows):
    """Generated answers, one or three to a question: ids, masks and latents."""
    samples = [encode_row(model, row, answer=False) for row in rows[:3]]
    samples.append(encode_row(model, replace(rows[3], image_input=[], times=[]), answer=False))
    results = {}
    for temperature, count in ((0.0, 1), (0.9, 1), (0.9, 3)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count * len(samples))]
        generators = generators if temperature else None
        answers = generate(model, samples, 26, temperature=temperature, generators=generators)
        assert len(answers) == count * len(samples)
        assert sum(len(answer.latents) for answer in answers) >= 8
        for number, answer in enumerate(answers):
            name = f"answer {number} at {temperature}, {count}"
            results[f"ids of {name}"] = torch.tensor(answer.ids)
            results[f"is_latent of {name}"] = torch.tensor(answer.is_latent)
            results[f"is_sampled of {name}"] = torch.tensor(answer.is_sampled)
            results[f"truncated of {name}"] = torch.tensor(answer.truncated)
            results[f"latents of {name}"] = answer.latents
    return results


def measure_vision(model, rows):
    """Features of videos and overlays, of several windows each, and the latents that they are pooled to."""
    items = [tuple(row.image_input) for row in rows[:3]]
    items += [(rows[3].image_input[0],), tuple(rows[0].image_input[:3]), (rows[1].image_output[0],)]
    vision = VisionCache(model)
    vision.encode_missing(items, "test:1")
    results = {}
    for number, entry in enumerate(vision.store.values()):
        results[f"features of image {number}"] = entry.features
        if len(entry.features) == 12:
            results[f"latents of image {number}"] = model.pool(entry.features, entry.grid)
    return results


MEASURES = [
    measure_logits,
    measure_log_probs,
    measure_losses,
    measure_gradients,
    measure_ablations,
    measure_shared_prompts,
    measure_cache,
    measure_answers,
    measure_vision,
]


@pytest.fixture(params=[False, True])
def small(request, monkeypatch):
    """Whether chunks, blocks of words and the cache's room are so small that all run out."""
    if request.param:
        for name, value in (("CHUNK", 7), ("WORDS", 100), ("SPARE", 3)):
            monkeypatch.setattr(fast, name, value)
    return request.param


@pytest.mark.parametrize("measure", MEASURES)
def test_plain_equals_fast(pair, calm_pair, rows, small, measure):
    """The one promise of lib/fast.py."""
    for models in (pair, calm_pair):
        plain, quick = (measure(model, rows) for model in models)
        assert plain.keys() == quick.keys() and plain
        for name, expected in plain.items():
            # each latent is made from the one before: in a lively network differences grow
            grows = models is pair and name.startswith("latents of answer")
            assert_close(quick[name], expected, name, 3e-4 if grows else 1e-5)


def test_activation_checkpointing_changes_nothing(tiny, rows):
    """In training mode: the same numbers, fast or not, and the imagery is still there."""
    results = []
    for is_fast in (False, True):
        for on in (False, True):
            model = lively(tiny, fast=is_fast)
            if on:
                fast.checkpoint_layers(model.qwen)
            model.train()
            logp, imagined, _ = model(batch_of(model, rows[:2]))
            (logp.sum() + imagined.sum()).backward()
            results.append([logp, imagined, *gradients_of(model).values()])
    assert len(results) == 4 and len(results[0][1]) == 12
    for expected, *others in zip(*results):
        for mine in others:
            assert_close(mine, expected)


# ---------------------------------------------------------------- what is installed, and what is not


def patched_parts(model):
    """Names of what stands on this one object in the place of a method of its class."""
    found = {name for name in METHODS if name in vars(model)}
    for name, module in model.named_modules():
        if "forward" in vars(module):
            found.add(name)
    return found


def test_fast_is_installed_at_one_place_and_plain_has_nothing_of_it(pair):
    plain, quick = pair
    assert patched_parts(plain) == set()
    expected = {"text", "log_probs", "new_cache", "qwen.lm_head", "qwen.model.visual.patch_embed"}
    expected |= {f"qwen.model.visual.blocks.{number}.attn" for number in range(2)}
    expected |= {"qwen.model.language_model.layers.1"}
    # an untied table has one gradient, that of its words
    tied = {"embed_tokens"} if quick.config.tie_word_embeddings else set()
    assert patched_parts(quick) == expected | tied
    assert type(plain.new_cache()) is DynamicCache


def test_plain_runs_nothing_of_the_fast_file(tiny, rows, monkeypatch):
    """Every function and class of lib/fast.py fails when it is called: FAST=False does not notice."""

    def fail(*words, **arguments):
        raise AssertionError("lib/fast.py was run")

    own = [name for name, value in vars(fast).items() if inspect.getmodule(value) is fast]
    assert {"install_fast_paths", "text", "log_probs", "TargetLogProbs", "RoomyLayer"} <= set(own)
    for name in own:
        monkeypatch.setattr(fast, name, fail)
    monkeypatch.setattr("model.install_fast_paths", fail)
    model = load_model(tiny / "base", K=4, pooling="grid", fast=False)
    for measure in (measure_losses, measure_gradients, measure_shared_prompts, measure_vision):
        measure(model, rows)
    generate(model, [encode_row(model, rows[0], answer=False)], 8)
    with pytest.raises(AssertionError, match="was run"):
        load_model(tiny / "base", K=4, pooling="grid")


def test_a_fast_method_takes_the_arguments_of_the_plain_one():
    """Whoever calls a method need not know which one stands there."""
    for name in METHODS:
        plain = list(inspect.signature(getattr(Thinker, name)).parameters)
        quick = list(inspect.signature(getattr(fast, name)).parameters)
        assert quick[-len(plain) + 1 :] == plain[1:] if len(plain) > 1 else quick == [], name


# ---------------------------------------------------------------- vision


@pytest.mark.parametrize("sizes, windows", [([(56, 56), (28, 56)], {16}), ([(56, 42), (42, 70)], {4, 8, 16})])
def test_windowed_attention_equals_the_library(tiny, tmp_path, sizes, windows):
    """Windows of equal and of unequal length: outputs and gradients of the whole visual encoder."""
    plain, quick = (lively(tiny, fast=is_fast) for is_fast in (False, True))
    rng = np.random.default_rng(0)
    loaded = []
    for index, size in enumerate(sizes):
        draw_image(tmp_path / f"{index}.png", rng, size)
        loaded.append(load_patches([tmp_path / f"{index}.png"], plain.config))
    pixels = torch.cat([pixels for pixels, _ in loaded])
    grids = [grid for _, grid in loaded]

    # lengths of the windows in each layer of the library's own attention
    lengths = []
    for block in plain.qwen.model.visual.blocks:
        keep = functools.partial(keep_lengths, lengths)
        block.attn.register_forward_pre_hook(keep, with_kwargs=True)

    def run(model):
        visual = model.qwen.model.visual.requires_grad_(True)
        features = torch.cat(model.encode(pixels, grids))
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        return features.detach(), [weight.grad for weight in visual.parameters()]

    theirs, their_grads = run(plain)
    ours, our_grads = run(quick)
    # a layer of windows, a layer of whole images
    assert set(lengths[0]) == windows and lengths[0] != lengths[1]
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert max(grad.abs().max() for grad in their_grads) > 0.1
    for mine, grad in zip(our_grads, their_grads):
        assert torch.allclose(mine, grad, atol=1e-5 * max(1, grad.abs().max().item()))


def keep_lengths(lengths, module, inputs, arguments):
    lengths.append(arguments["cu_seqlens"].diff().tolist())


# ---------------------------------------------------------------- the last layer


def test_the_last_layer_is_the_librarys_where_it_is_read(tiny, rows):
    """States and all gradients equal those of the library's layer; its MLP works on no other token."""
    results, widths = [], []
    for is_fast in (True, False):
        model = lively(tiny, fast=is_fast)
        batch = batch_of(model, rows[:3])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(*batch.ids.shape, model.config.text_config.hidden_size, generator=generator)
        read = batch.is_text.flatten().nonzero()[:, 0] - 1
        layers = model.qwen.model.language_model.layers
        layers[-1].mlp.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].numel()))
        entry = x.clone().requires_grad_()
        hidden = model.text(entry, batch.positions, read=read)
        (hidden * torch.arange(len(read))[:, None]).sum().backward()
        results.append([hidden, entry.grad, *(weight.grad for weight in layers.parameters())])
    assert widths == [len(read) * x.shape[-1], x.numel()] and len(read) < 0.7 * x[..., 0].numel()
    for mine, expected in zip(*results):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


# ---------------------------------------------------------------- table and head


def table_and_head(table, head, forbidden_ids=None):
    """A Thinker of which there is no more than a table of words and a head."""
    words = SimpleNamespace(weight=table)
    qwen = SimpleNamespace(get_input_embeddings=lambda: words, lm_head=SimpleNamespace(weight=head))
    return SimpleNamespace(qwen=qwen, forbidden_ids=forbidden_ids)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("chunk", [512, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_is_looked_up_and_predicted_from_gets_one_gradient(monkeypatch, tied, chunk, half):
    """embed_tokens and TargetLogProbs against autograd's own way; 5000 words, so that there are blocks."""
    monkeypatch.setattr(fast, "CHUNK", chunk)
    torch.manual_seed(0)
    table, other = (torch.randn(5000, 8, requires_grad=True) for _ in range(2))
    head = table if tied else other
    model = table_and_head(table, head)
    ids, targets = torch.randint(0, 60, (2, 6)), torch.randint(0, 5000, (12,))
    results = []
    for ours in (True, False):
        x = fast.embed_tokens(model, ids) if ours and tied else F.embedding(ids, table)
        hidden = torch.tanh(x).flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            if ours:
                logp = fast.log_probs(model, hidden, targets)
            else:
                logp = F.linear(hidden, head).float().log_softmax(dim=-1)[range(12), targets]
        (logp * torch.arange(12)).sum().backward()
        results.append([logp, *(x.grad for x in (table, other) if x.grad is not None)])
        table.grad = other.grad = None
    assert len(results[0]) == len(results[1]) == (2 if tied else 3)
    for mine, expected in zip(*results):
        assert mine.dtype == torch.float32 and mine.layout == torch.strided
        assert torch.allclose(mine, expected, atol=0.01 * expected.abs().max().item() if half else 1e-4)


def test_the_tables_gradient_takes_no_second_tensor_of_its_size():
    """The head makes one, and what a tied table gets from its lookup is added to it in place."""
    torch.manual_seed(0)
    table = torch.randn(1000, 64, requires_grad=True)
    model = table_and_head(table, table)
    ids, targets = torch.randint(0, 60, (2, 6)), torch.randint(0, 1000, (12,))
    large = []
    for lookup in (fast.embed_tokens, Thinker.embed_tokens):
        table.grad = None
        hidden = torch.tanh(lookup(model, ids)).flatten(0, 1)
        loss = fast.log_probs(model, hidden, targets).sum()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loss.backward()
        events = [event for event in profiler.events() if event.self_cpu_memory_usage >= table.nbytes]
        large.append([event.name for event in events])
    assert len(large[1]) == 2  # autograd's own way, so that the test can see it
    assert large[0] == ["aten::mm"]


@pytest.mark.parametrize("temperature, forbid", [(1.0, False), (0.7, True)])
def test_chunked_log_probabilities_equal_the_whole(monkeypatch, temperature, forbid):
    """The fast ones in chunks of any size, and the plain ones of model.py."""
    torch.manual_seed(0)
    head, ids = nn.Linear(16, 50, bias=False), torch.randint(3, 50, (23,))
    forbidden_ids = torch.tensor([0, 2])
    model = table_and_head(None, head.weight, forbidden_ids)
    results = []
    for chunk in (512, 23, 22, 5, 1, "plain", "by hand"):
        hidden = torch.randn(23, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        if chunk == "plain":
            given = forbidden_ids if forbid else None
            logp = token_log_probs(hidden, head.weight, ids, given, temperature)
        elif chunk == "by hand":
            logits = head(hidden) / temperature
            if forbid:
                logits[:, [0, 2]] = -math.inf
            logp = logits.log_softmax(dim=-1)[range(23), ids]
        else:
            monkeypatch.setattr(fast, "CHUNK", chunk)
            logp = fast.log_probs(model, hidden, ids, forbid, temperature)
        head.zero_grad()
        (logp * torch.arange(23)).sum().backward()
        results.append((logp, hidden.grad, head.weight.grad.clone()))
    for result in results[:-1]:
        for mine, expected in zip(result, results[-1]):
            assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("rows, words", [(1, 1024), (5, 2500), (3, 40)])
def test_the_head_in_blocks_equals_the_whole(rows, words):
    """Blocks of 1,024 words, the last one shorter; where a gradient is asked for it is a plain product."""
    hidden, weight = torch.randn(rows, 8), torch.randn(words, 8, requires_grad=True)
    plain = fast.head_logits(hidden, weight)
    with torch.no_grad():
        assert torch.allclose(fast.head_logits(hidden, weight), hidden @ weight.T, atol=1e-6)
    plain.sum().backward()
    assert torch.allclose(weight.grad, hidden.sum(dim=0).expand(words, 8))


# ---------------------------------------------------------------- the cache


def test_the_cache_grows_in_place(monkeypatch):
    """The library's keys and values, for prompts and tokens; they move only where room has run out."""
    monkeypatch.setattr(fast, "SPARE", 3)
    ours, theirs = fast.RoomyLayer(), DynamicLayer()
    places = []
    for number, length in enumerate([5, 1, 1, 1, 1, 1, 2, 1, 1]):
        new = torch.rand(2, 2 if number < 3 else 4, 2, length, 4)  # keys and values (B, heads, t, d)
        with torch.no_grad():
            found, true = ours.update(*new), theirs.update(*new)
            places.append(ours.keys.data_ptr())
            if number == 2:  # the prompt's answers, after two tokens: what was written in place is left
                for layer in (ours, theirs):
                    layer.batch_repeat_interleave(2)
        assert all(torch.equal(a, b) for a, b in zip(found, true)), number
        assert ours.get_seq_length() == theirs.get_seq_length() == [5, 6, 7, 8, 9, 10, 12, 13, 14][number]
    moved = [number for number in range(1, 9) if places[number] != places[number - 1]]
    assert moved == [1, 3, 6, 7]


def test_the_cache_keeps_a_graph():
    """A token through which a gradient goes is not written in place."""
    layer, new = fast.RoomyLayer(), torch.rand(3, 1, 2, 1, 4, requires_grad=True)
    for x in new:
        keys, _ = layer.update(x, x)
    keys.pow(2).sum().backward()
    assert torch.equal(new.grad, 2 * new.detach())
