"""model.py: pooling, positions, samples, vision, the forward pass, generation and its replay."""

import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import N, lively, refused
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_py
from dift import dift_loss
from lib.checkpoints import load_optimizer, save_checkpoint
from lib.images import load_patches
from model import Completion, Sample, Thinker, VisionCache, collate, encode_row, generate, load_model
from model import pair_seconds, pool_latents, rope_positions, sample_token


def batch_of(model, rows, keep=True):
    """Rows -> the batch that the forward pass takes."""
    samples = [encode_row(model, row) for row in rows]
    return VisionCache(model, keep).prepare(collate(samples, model.token_id["pad"]))


# ---------------------------------------------------------------- positions and pooling


def test_positions_of_text_alone():
    assert rope_positions([4], 2).tolist() == [[0, 1, 2, 3]] * 3


def test_positions_of_one_video_by_hand():
    """Two words; two pairs of 2 x 3 tokens at 0 s and 1.5 s, 2 positions a second; three words."""
    table = rope_positions([2, ([0.0, 1.5], 2, 3), 3], 2)
    assert table.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 5, 5, 5, 5, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3, 6, 7, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 6, 7, 8],
    ]


def test_positions_of_uneven_seconds_are_floored():
    """0.9 s · 2 = 1.8 -> 1, 2.25 s -> 4, 7 s -> 14: text goes on at 15 + 1."""
    table = rope_positions([1, ([0.0, 0.9, 2.25, 7.0], 1, 1), 1], 2)
    assert table[0].tolist() == [0, 1, 2, 5, 15, 16]
    assert table[1:].tolist() == [[0, 1, 1, 1, 1, 16]] * 2
    assert rope_positions([([0.0, 0.7 - 0.2], 1, 1)], 2)[0].tolist() == [0, 1]  # 0.49999999999999994 s


def test_text_goes_on_after_the_widest_place():
    """One pair of 2 x 5 tokens: the largest position is the width's, 4."""
    assert rope_positions([([0.0], 2, 5), 2], 2)[:, -2:].tolist() == [[5, 6]] * 3
    assert rope_positions([0, ([0.0], 1, 2), 0, 1], 2)[2].tolist() == [0, 1, 2]  # no text around it
    assert rope_positions([([0.0], 5, 2), 2], 2)[:, -2:].tolist() == [[5, 6]] * 3


def test_positions_of_two_videos_by_hand():
    """One word, one pair of 1 x 2, one word, two pairs of 2 x 1 half a second apart, two words."""
    table = rope_positions([1, ([0.0], 1, 2), 1, ([0.0, 0.5], 2, 1), 2], 2)
    assert table.tolist() == [
        [0, 1, 1, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 1, 3, 4, 5, 4, 5, 6, 7],
        [0, 1, 2, 3, 4, 4, 4, 4, 6, 7],
    ]


def test_seconds_of_pairs():
    times = [3.0, 4.0, 5.5, 7.0, 9.0]
    assert pair_seconds(times) == [0.0, 2.5, 6.0]
    assert pair_seconds(times, 2, 1.0) == [0.0, 1.0, 2.0]
    assert pair_seconds(times, 2, 2.0) == [0.0, 2.0, 4.0]
    assert pair_seconds(times, 1) == [0.0, 1.0, 2.5, 4.0, 6.0]


@pytest.mark.parametrize("step, last", [(None, 5), (1.0, 2), (2.0, 4)])
def test_a_row_gets_its_positions_from_its_seconds(tiny, rows, step, last):
    """Four frames at 0, 1, 2.5 and 4 s: the second pair of 3 x 4 tokens starts 5 positions on."""
    model = load_model(tiny / "base", K=4, pooling="grid", seconds_per_pair=step)
    sample = encode_row(model, rows[0])
    visual = sample.positions[:, sample.is_visual]
    before = int(sample.is_visual.nonzero()[0])
    assert sample.positions[:, :before].tolist() == [list(range(before))] * 3
    assert (visual[0] - before).tolist() == [0] * N + [last] * N
    assert (visual[1] - before).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert (visual[2] - before).tolist() == [0, 1, 2, 3] * 6
    after = before + max(last, 3) + 1
    rest = sample.positions[:, before + 2 * N :]
    assert rest.tolist() == [list(range(after, after + rest.shape[1]))] * 3


def test_strips_are_contiguous_and_the_first_take_the_rest():
    x = torch.arange(7.0)[:, None]
    assert pool_latents(x, 3, "strips", None)[:, 0].tolist() == [1.0, 3.5, 5.5]  # 0 1 2 | 3 4 | 5 6
    assert pool_latents(x, 1, "strips", None)[:, 0].tolist() == [3.0]
    assert pool_latents(x, 7, "strips", None)[:, 0].tolist() == list(range(7))
    x = torch.randn(12, 5)
    assert torch.allclose(pool_latents(x, 4, "strips", (3, 4)), x.view(4, 3, 5).mean(dim=1))


def test_grid_keeps_both_axes():
    """3 x 4 tokens into 2 x 2 sets: rows 0-1 and 2, columns 0-1 and 2-3."""
    x = torch.arange(12.0)[:, None]
    assert pool_latents(x, 4, "grid", (3, 4))[:, 0].tolist() == [2.5, 4.5, 8.5, 10.5]
    assert pool_latents(x, 2, "grid", (3, 4))[:, 0].tolist() == [4.5, 6.5]  # wide: left and right
    assert pool_latents(x, 2, "grid", (4, 3))[:, 0].tolist() == [2.5, 8.5]  # tall: top and bottom
    assert pool_latents(x, 6, "grid", (3, 4)).shape == (6, 1)  # 2 x 3
    assert pool_latents(x, 12, "grid", (3, 4))[:, 0].tolist() == list(range(12))


def test_too_few_tokens_are_refused():
    refused(lambda: pool_latents(torch.zeros(3, 5), 4, "strips", None), "3 visual tokens", "K=4")
    refused(lambda: pool_latents(torch.zeros(12, 5), 5, "grid", (3, 4)), "3 x 4 tokens into 1 x 5")


# ---------------------------------------------------------------- samples


def full_text(model, row, answer=True):
    """A row as one string: with pads in place of the video and the latents."""
    video = "<|vision_start|>" + "<|video_pad|>" * 2 * N + "<|vision_end|>" if row.image_input else ""
    prompt = f"{video}{row.text_input}{model.config.prompt_suffix}"
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text += f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant"
    if not answer:
        return text
    block = "<|latent_start|>" + "<|latent_pad|>" * model.K + "<|latent_end|>"
    return text + "\n" + row.text_output.replace("<output_image>", block) + "<|im_end|>"


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("video", [True, False])
def test_pieces_tokenise_like_the_whole(model, rows, answer, video):
    for row in rows[:3]:
        row = row if video else replace(row, image_input=[], times=[])
        sample = encode_row(model, row, answer=answer)
        assert sample.ids.tolist() == model.tokenizer(full_text(model, row, answer))["input_ids"]


def test_masks_of_a_sample(model, rows):
    sample = encode_row(model, rows[2])  # three overlays
    text = full_text(model, rows[2]).split("<|im_start|>assistant")[1]
    assert text.startswith("\n<think>") and text.endswith("<|im_end|>")
    supervised = model.tokenizer.decode(sample.ids[sample.is_text])
    assert supervised == text.replace("<|latent_pad|>", "")  # delimiters and the first newline are supervised
    assert (sample.ids[sample.is_latent] == model.token_id["latent_pad"]).all()
    assert sample.is_latent.sum() == 3 * model.K and sample.is_visual.sum() == 2 * N
    assert not (sample.is_text & sample.is_latent).any() and sample.is_real.all()
    starts = (sample.ids == model.token_id["latent_start"]).nonzero()[:, 0]
    for start in starts:
        block = sample.is_latent[start : start + model.K + 2].tolist()
        assert block == [False] + [True] * model.K + [False]
        assert sample.ids[start + model.K + 1] == model.token_id["latent_end"]
    assert len(starts) == 3
    prompt = len(encode_row(model, rows[2], answer=False).ids)
    assert not sample.is_text[:prompt].any() and not sample.is_latent[:prompt].any()
    assert (sample.is_text | sample.is_latent)[prompt:].all()
    assert sample.overlays == tuple(rows[2].image_output)
    assert sample.video == tuple(rows[2].image_input)


def test_a_prompt_is_the_beginning_of_its_sample_and_ends_in_assistant(model, rows):
    sample, prompt = encode_row(model, rows[1]), encode_row(model, rows[1], answer=False)
    length = len(prompt.ids)
    for name in ("ids", "positions", "is_visual", "is_latent", "is_text"):
        assert torch.equal(getattr(prompt, name), getattr(sample, name)[..., :length]), name
    assert model.tokenizer.decode(prompt.ids).endswith("<|im_end|>\n<|im_start|>assistant")
    assert prompt.overlays == () and not prompt.is_text.any()


def test_only_letters_are_supervised(model, rows):
    """Of "<answer>B. Pan Right" the B; letters in the prompt stay out of the loss."""
    sample = encode_row(model, rows[0])
    letters = torch.tensor(model.tokenizer.convert_tokens_to_ids(list("ABCDEF")))
    assert torch.isin(sample.ids, letters).sum() > 1
    narrow = encode_row(model, replace(rows[0], supervise="letters"))
    assert model.tokenizer.decode(sample.ids[narrow.is_text]) == "B"
    for name in ("ids", "positions", "is_latent", "is_visual", "is_real", "overlays"):
        mine, theirs = getattr(narrow, name), getattr(sample, name)
        assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs, name
    assert rows[0].supervise == "all"  # of a row that does not say
    prompt = encode_row(model, replace(rows[0], supervise="letters"), answer=False)
    assert not prompt.is_text.any()


QWEN_TEMPLATE = (  # of Qwen2.5-VL's own tokenizer, less its numbering of pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE])
def test_the_prompt_equals_the_chat_template(model, rows, template):
    text = rows[0].text_input + model.config.prompt_suffix
    content = [{"type": "video", "video": "x"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if template is None:  # the tiny base's own template has no default system turn
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    settings = {"tokenize": False, "add_generation_prompt": True, "chat_template": template}
    theirs = model.tokenizer.apply_chat_template(messages, **settings)
    ours = model.tokenizer.decode(encode_row(model, rows[0], answer=False).ids)
    assert re.sub(r"(<\|video_pad\|>)+", "<|video_pad|>", ours) + "\n" == theirs


def test_collate_pads_either_side():
    def sample(n):
        return Sample(
            ids=torch.arange(1, n + 1),
            positions=torch.arange(n).expand(3, -1) + 5,
            is_text=torch.ones(n, dtype=torch.bool),
            is_latent=torch.arange(n) == 1,
            is_visual=torch.ones(n, dtype=torch.bool),
            is_real=torch.ones(n, dtype=torch.bool),
            is_blind=torch.zeros(n, dtype=torch.bool),
            is_self_fed=torch.zeros(n, dtype=torch.bool),
            video=(f"v{n}",),
            overlays=(f"o{n}", "o"),
            source=f"rows:{n}",
        )

    right, left = (collate([sample(3), sample(2)], 99, side) for side in ("right", "left"))
    assert right.ids.tolist() == [[1, 2, 3], [1, 2, 99]]
    assert left.ids.tolist() == [[1, 2, 3], [99, 1, 2]]
    for name in ("is_text", "is_visual", "is_real"):
        assert getattr(right, name).int().tolist() == [[1, 1, 1], [1, 1, 0]], name
        assert getattr(left, name).int().tolist() == [[1, 1, 1], [0, 1, 1]], name
    assert right.is_latent.int().tolist() == [[0, 1, 0], [0, 1, 0]]
    assert left.is_latent.int().tolist() == [[0, 1, 0], [0, 0, 1]]
    # the same masks as places in all six tokens
    assert right.text_at.tolist() == [0, 1, 2, 3, 4] and right.latent_at.tolist() == [1, 4]
    assert left.text_at.tolist() == [0, 1, 2, 4, 5] and left.latent_at.tolist() == [1, 5]
    assert right.positions.shape == (3, 2, 3)
    assert right.positions[0].tolist() == [[5, 6, 7], [5, 6, 0]]
    assert left.positions[2].tolist() == [[5, 6, 7], [0, 5, 6]]
    assert right.videos == [("v3",), ("v2",)] and right.overlays == [("o3",), ("o",), ("o2",), ("o",)]
    assert right.source == "rows:3" and right.video_features is None and right.prompts is None


# ---------------------------------------------------------------- vision


def test_features_of_several_images_equal_those_of_each(model, rows):
    items = [tuple(rows[0].image_input), (rows[0].image_output[0],), tuple(rows[1].image_input[:3])]
    loaded = [load_patches(item, model.config) for item in items]
    together = model.encode(torch.cat([pixels for pixels, _ in loaded]), [grid for _, grid in loaded])
    for features, (pixels, grid) in zip(together, loaded):
        alone = model.qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
        assert torch.allclose(features, alone, atol=1e-5)


def spy(monkeypatch, module, name="forward"):
    """Records the first argument of each call of a module's method."""
    calls, real = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(args[0] if args else kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


def test_vision_runs_once_per_distinct_image(tiny, rows, monkeypatch):
    model = lively(tiny)
    calls = spy(monkeypatch, model.qwen.model.visual)
    some = [rows[0], rows[4], rows[1], rows[0]]  # clips 0, 0, 1, 0; overlays 0 | 0 1 | 0 1 | 0 of their clip
    model(batch_of(model, some, keep=False))
    assert [len(pixels) for pixels in calls] == [4 * N * (2 + 2 + 2 + 2)]  # 2 clips of 2 pairs, 4 overlays
    vision = VisionCache(model)
    for batch in (some, some, rows[:2]):
        model(vision.prepare(collate([encode_row(model, row) for row in batch], 0)))
    assert [len(pixels) for pixels in calls[1:]] == [4 * N * 8]
    vision.clear()
    vision.prepare(collate([encode_row(model, rows[0])], 0))
    assert [len(pixels) for pixels in calls[2:]] == [4 * N * 3]
    forgetful = VisionCache(model, keep=False)
    for _ in range(2):
        forgetful.prepare(collate([encode_row(model, rows[0])], 0))
    assert [len(pixels) for pixels in calls[3:]] == [4 * N * 3] * 2 and forgetful.store == {}


def test_the_store_holds_features_as_they_are_encoded(model, rows):
    """On the CPU, in raster order, pooled nowhere: Eq. 5 is computed where it is used."""
    vision = VisionCache(model)
    video, overlay = tuple(rows[0].image_input), (rows[0].image_output[0],)
    vision.encode_missing([video, overlay, video], rows[0].source)
    assert {item: entry.grid for item, entry in vision.store.items()} == {
        video: (2, 6, 8),
        overlay: (1, 6, 8),
    }
    for item, entry in vision.store.items():
        pixels, grid = load_patches(item, model.config)
        features = model.qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
        assert entry.features.shape == (math.prod(grid) // 4, 64) and not entry.features.requires_grad
        assert torch.allclose(entry.features, features, atol=1e-5)


def test_kept_features_equal_forgotten_ones(tiny, rows):
    model, results = lively(tiny), []
    kept = VisionCache(model)
    batch = collate([encode_row(model, row) for row in rows[:4]], model.token_id["pad"])
    kept.prepare(batch)
    for vision in (VisionCache(model, keep=False), VisionCache(model), kept):
        model.zero_grad()
        logp, imagined, targets = model(vision.prepare(batch))
        (logp.sum() + imagined.sum()).backward()
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        results.append([logp, imagined, targets, *gradients])
    assert len(results[0]) > 20
    for mine, theirs, again in zip(*results):
        for other in (mine, again):
            assert torch.allclose(other, theirs, atol=1e-5 * max(1, theirs.abs().max().item()))


def test_preparing_a_batch_leaves_it_as_it_was(model, rows):
    batch = collate([encode_row(model, rows[0])], model.token_id["pad"])
    prepared = VisionCache(model).prepare(batch)
    assert batch.video_features is None and batch.overlay_features == []
    assert prepared.video_features.shape == (2 * N, 64)
    assert [features.shape for features in prepared.overlay_features] == [(N, 64)]
    assert prepared.overlay_grids == [(1, 6, 8)]


def test_vision_is_frozen_and_all_else_is_trained(tiny, rows):
    """(paper) No gradient reaches the encoder, nor any target that is pooled without weights."""
    model = load_model(tiny / "base", K=4, pooling="grid")
    visual = set(model.qwen.model.visual.parameters())
    logp, imagined, targets = model(batch_of(model, rows[:2]))
    assert not targets.requires_grad
    (logp.sum() + imagined.sum()).backward()
    assert len(visual) > 10 and not any(weight.requires_grad for weight in visual)
    for name, weight in model.named_parameters():
        assert (weight.grad is None) is (weight in visual), name


# ---------------------------------------------------------------- the forward pass


@pytest.mark.parametrize("fast", [True, False])
def test_teacher_forced_latents_are_the_pooled_overlays(tiny, rows, monkeypatch, fast):
    """Eq. 5 and 6: what stands at latent positions, and what is compared with the states before them."""
    model = lively(tiny, fast=fast)
    inputs = spy(monkeypatch, model.qwen.model.language_model)
    batch = batch_of(model, rows[:3])
    logp, imagined, targets = model(batch)
    true = []
    for row in rows[:3]:
        for path in row.image_output:
            pixels, grid = load_patches([path], model.config)
            features = model.qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
            raster = features.view(3, 4, -1)
            sets = [raster[:2, :2], raster[:2, 2:], raster[2:, :2], raster[2:, 2:]]
            true += [part.mean(dim=(0, 1)) for part in sets]
    x, ids = inputs[0]["inputs_embeds"], batch.ids
    assert torch.allclose(targets, torch.stack(true), atol=1e-5)
    assert torch.allclose(x[batch.is_latent], targets, atol=1e-6)  # fed, in row order
    videos = []
    for row in rows[:3]:
        pixels, grid = load_patches(row.image_input, model.config)
        videos.append(model.qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output)
    assert torch.allclose(x[batch.is_visual], torch.cat(videos), atol=1e-5)
    words = ~batch.is_latent & ~batch.is_visual
    assert torch.equal(x[words], model.qwen.get_input_embeddings().weight[ids[words]])
    everywhere = {name: value for name, value in inputs[0].items() if name != "read"}
    hidden = model.qwen.model.language_model(**everywhere).last_hidden_state
    places = batch.is_latent.nonzero().tolist()
    assert torch.allclose(imagined, torch.stack([hidden[b, t - 1] for b, t in places]), atol=1e-5)
    places = batch.is_text.nonzero().tolist()
    logits = torch.stack([hidden[b, t - 1] @ model.qwen.lm_head.weight.T for b, t in places])
    table = logits.log_softmax(dim=-1)
    expected = torch.stack([table[n, ids[b, t]] for n, (b, t) in enumerate(places)])
    assert torch.allclose(logp, expected, atol=1e-4)


def test_a_batch_equals_its_rows(model, rows):
    logp, imagined, _ = model(batch_of(model, rows[:4]))
    alone = [model(batch_of(model, [row])) for row in rows[:4]]
    assert torch.allclose(logp, torch.cat([one[0] for one in alone]), atol=1e-4)
    assert torch.allclose(imagined, torch.cat([one[1] for one in alone]), atol=1e-4)


class Wide(TorchDispatchMode):
    """Notes the rows of each result that is as wide as the vocabulary."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.ndim and result.shape[-1] == self.width:
            self.rows.append(result.numel() // self.width)
        return result


@pytest.mark.parametrize("fast", [True, False])
def test_the_head_sees_supervised_positions_only(tiny, rows, fast):
    model = lively(tiny, fast=fast)
    batch = batch_of(model, rows[:3])
    with Wide(len(model.qwen.lm_head.weight)) as wide:
        model(batch)
    supervised, positions = batch.is_text.sum(), batch.ids.numel()
    assert supervised in wide.rows and max(wide.rows) == supervised < positions / 2


class Answers(TorchDispatchMode):
    """Notes each operation whose result Python has to know, for which it would wait for a GPU."""

    asked = "_local_scalar_dense nonzero masked_select unique _unique2 unique_consecutive bincount".split()

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        name = call.__name__.split(".")[0]
        places = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        by_mask = any(x.dtype == torch.bool for x in places if torch.is_tensor(x))
        self.found += [name] * (name in self.asked or by_mask)
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast", [True, False])
def test_forward_and_backward_do_not_wait_for_the_device(tiny, rows, fast):
    model = lively(tiny, fast=fast)
    batch = batch_of(model, rows[:3])
    with Answers() as answers:
        logp, imagined, targets = model(batch)
        (logp.sum() + F.cosine_similarity(imagined, targets, dim=-1).sum()).backward()
    assert answers.found == [] and model.qwen.get_input_embeddings().weight.grad.abs().sum() > 0
    with Answers() as answers:  # and the test can see it
        logp[logp > 0].sum().item()
    assert answers.found == ["index", "_local_scalar_dense"]


@pytest.mark.parametrize("given", [0, 4, 11, 13])
def test_another_number_of_latents_raises(model, rows, given):
    batch = batch_of(model, rows[:2])  # three overlays
    assert batch.is_latent.sum() == 12
    with pytest.raises(ValueError, match=f"train_imagery.jsonl:1: 12 latent positions, {given} latents"):
        model(batch, latents=torch.zeros(given, 64))
    model(batch, latents=torch.zeros(12, 64))


def test_imagery_is_never_left_out_silently(model, rows):
    batch = batch_of(model, rows[:1])
    batch.overlay_features = []
    with pytest.raises(ValueError, match="4 latent positions, 0 latents"):
        model(batch)


def test_a_stage_without_imagery_takes_rows_with_overlays(tiny, rows):
    """K = 0, as in pretraining: delimiters stay, nothing stands between them, no overlay is encoded."""
    model = load_model(tiny / "base", K=0, pooling="grid")
    for keep in (False, True):
        batch = batch_of(model, rows[:2], keep)
        assert batch.overlays == [] and batch.overlay_features == []
        logp, imagined, _ = model(batch)
        assert len(imagined) == 0 and torch.isfinite(logp).all()


class PoolingThinker(Thinker):
    """What a researcher may write: a pooling with a weight for each visual token of an overlay."""

    def __init__(self, qwen, tokenizer):
        super().__init__(qwen, tokenizer)
        self.token_weight = nn.Parameter(torch.ones(N, 1))

    def pool(self, features, grid):
        return super().pool(features * self.token_weight, grid)


@pytest.mark.parametrize("fast", [True, False])
def test_a_pooling_with_weights_is_trained_and_saved(tiny, rows, tmp_path, monkeypatch, fast):
    """Pooling happens on use, also of kept features, so a gradient reaches its weights in every step."""
    plain = load_model(tiny / "base", K=4, pooling="grid", fast=fast)
    monkeypatch.setattr(model_py, "Thinker", PoolingThinker)
    model = load_model(tiny / "base", K=4, pooling="grid", fast=fast)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.05)
    vision = VisionCache(model)
    samples = [encode_row(model, row) for row in rows[:3]]
    batch = collate(samples, model.token_id["pad"])
    start, *_, targets_before = plain(batch_of(plain, rows[:3]))

    # of the second step on, the features come from the store
    for step in range(2):
        logp, imagined, targets = model(vision.prepare(batch))
        if step == 0:  # weights of one change nothing yet
            assert torch.equal(logp, start) and torch.equal(targets, targets_before)
        else:
            assert not torch.allclose(targets, targets_before, atol=1e-3)
        optimizer.zero_grad()
        loss, _ = dift_loss(logp, imagined, targets, len(logp), len(imagined), 1.0, 0.3)
        loss.backward()
        assert model.token_weight.grad.abs().min() > 0
        optimizer.step()
    assert not torch.allclose(model.token_weight, torch.ones(N, 1), atol=1e-2)

    # the weights and their moments come back, beside a checkpoint that transformers can open
    folder = save_checkpoint(tmp_path, 2, model, {}, optimizer)
    assert (folder / "extra.safetensors").is_file()
    again = load_model(folder, fast=fast)
    assert torch.equal(again.token_weight, model.token_weight)
    other = torch.optim.AdamW([weight for weight in again.parameters() if weight.requires_grad], 0.05)
    load_optimizer(folder, again, other)
    mine, theirs = other.state[again.token_weight], optimizer.state[model.token_weight]
    assert mine.keys() == theirs.keys() and mine["exp_avg"].abs().max() > 0
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        expected, found = (one(batch_of(one, rows[:3])) for one in (model, again))
    assert all(torch.equal(x, y) for x, y in zip(expected, found))


# ---------------------------------------------------------------- generation


MAX_NEW = 26


def bias_head(model, **bonus):
    """Adds to the logits of some tokens; "word" stands for all other ones."""
    bias = torch.full((model.qwen.lm_head.weight.shape[0],), float(bonus.pop("word", 0)))
    for name, value in bonus.items():
        bias[model.token_id[name]] += value
    model.qwen.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)


@pytest.fixture(scope="module")
def talker(tiny):
    """A network that often imagines and sometimes ends."""
    model = lively(tiny)
    bias_head(model, latent_start=8.0, im_end=7.5)
    return model


def prompts(model, rows):
    """Prompts of different lengths: short and long questions, two clips, three frames, no video."""
    some = [
        rows[0],
        replace(rows[1], text_input="Why is the box red, and where?\n\nA. Pan Left\nB. Left"),
        replace(rows[2], image_input=rows[2].image_input[:3], times=[0.0, 2.0, 9.5]),
        replace(rows[3], image_input=[], times=[]),
        rows[4],
        replace(rows[5], text_input="Where?"),
    ]
    samples = [encode_row(model, row, answer=False) for row in some]
    assert len({len(sample.ids) for sample in samples}) >= 4
    return samples


@torch.no_grad()
def slow_generate(model, sample, max_new, temperature=0.0, uniform=None):
    """The reference: one row, no cache, no padding; the whole sequence runs again for each token (Eq. 8)."""
    qwen, token_id = model.qwen, model.token_id
    x = qwen.get_input_embeddings()(sample.ids)
    if sample.video:
        pixels, grid = load_patches(sample.video, model.config)
        x[sample.is_visual] = qwen.model.visual(pixels, grid_thw=torch.tensor([grid])).pooler_output
    positions = sample.positions
    ids, is_latent, is_sampled, latents = [], [], [], []
    due = []  # what must come next: latents, then the end
    while len(ids) < max_new:
        hidden = qwen.model.language_model(inputs_embeds=x[None], position_ids=positions[:, None])
        hidden = hidden.last_hidden_state[0, -1]
        logits = qwen.lm_head(hidden)
        for name in ("latent_pad", "latent_end", "image_pad", "video_pad"):
            logits[token_id[name]] = -math.inf
        logp = (logits / (temperature or 1)).log_softmax(dim=-1)
        kind = due.pop(0) if due else "sampled"
        embedding = None
        if kind == "latent":
            token, embedding = token_id["latent_pad"], model.feedback(hidden)
            latents.append(embedding)
        elif kind == "end":
            token = token_id["latent_end"]
        elif temperature == 0:
            token = int(logits.argmax())
        else:  # inverse transform: the first token at which the summed probability exceeds the draw
            total = logp.double().exp().cumsum(dim=-1)
            token = int((total <= uniform[len(ids)] * total[-1]).sum())
        if kind == "sampled":
            due = ["latent"] * model.K + ["end"] if token == token_id["latent_start"] else []
        ids.append(token)
        is_latent.append(kind == "latent")
        is_sampled.append(kind == "sampled")
        if kind == "sampled" and token == token_id["im_end"]:
            break
        embedding = qwen.get_input_embeddings().weight[token] if embedding is None else embedding
        x = torch.cat([x, embedding[None]])
        after = positions[:, -1:].amax() + torch.ones(3, 1, dtype=torch.long)
        positions = torch.cat([positions, after], dim=1)
    latents = torch.stack(latents) if latents else torch.zeros(0, x.shape[-1])
    truncated = ids[-1] != token_id["im_end"]
    return Completion(ids, is_latent, is_sampled, latents, truncated, model.tokenizer.decode(ids))


def assert_same(mine, theirs):
    """Two answers of one row: tokens and masks equal, latents to 3e-4 (each is made from the one before)."""
    for name in ("ids", "is_latent", "is_sampled", "truncated", "text"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine.latents.shape == theirs.latents.shape
    assert torch.allclose(mine.latents, theirs.latents, atol=3e-4)


@pytest.fixture(scope="module")
def answered(talker, rows):
    """(samples, their greedy answers as one batch)."""
    samples = prompts(talker, rows)
    return samples, generate(talker, samples, MAX_NEW)


def test_the_batch_holds_rows_in_every_state(answered):
    """What the tests below rest on: blocks that start at various steps, rows that end early or are cut."""
    answers = answered[1]
    length = max(len(answer.ids) for answer in answers)
    states = []
    for step in range(length):
        now = [a.is_latent[step] if step < len(a.ids) else None for a in answers]
        states.append(set(now))
    assert sum({True, False} <= state for state in states) >= 5  # inside and outside at once
    assert sum({True, None} <= state for state in states) >= 1  # a row imagines, another has finished
    assert {answer.truncated for answer in answers} == {True, False}
    assert len({len(answer.ids) for answer in answers}) >= 3
    assert sum(len(answer.latents) > 4 for answer in answers) >= 2  # several blocks


def test_generation_equals_the_slow_reference(talker, answered):
    """Cached = uncached, batched = one by one, padded = unpadded."""
    for sample, answer in zip(*answered):
        assert_same(answer, slow_generate(talker, sample, MAX_NEW))


def test_batched_equals_one_by_one(talker, answered):
    samples, answers = answered
    for sample, answer in zip(samples, answers):
        assert_same(generate(talker, [sample], MAX_NEW)[0], answer)
    for answer, reversed_answer in zip(answers, generate(talker, samples[::-1], MAX_NEW)[::-1]):
        assert_same(reversed_answer, answer)


def test_cached_features_do_not_change_an_answer(talker, answered):
    for vision in (VisionCache(talker), VisionCache(talker, keep=False)):
        for _ in range(2):
            for mine, theirs in zip(generate(talker, answered[0], MAX_NEW, vision), answered[1]):
                assert_same(mine, theirs)


def test_blocks_are_exactly_k_long_and_end_by_force(talker, answered):
    token_id, blocks = talker.token_id, 0
    for answer in answered[1]:
        assert len(answer.ids) == len(answer.is_latent) == len(answer.is_sampled)
        for step, token in enumerate(answer.ids):
            if token == token_id["latent_start"] and step + talker.K + 1 < len(answer.ids):
                inside = answer.ids[step + 1 : step + talker.K + 2]
                assert inside == [token_id["latent_pad"]] * talker.K + [token_id["latent_end"]]
                blocks += 1
            assert answer.is_latent[step] == (token == token_id["latent_pad"])
            assert answer.is_sampled[step] == (token not in (token_id["latent_pad"], token_id["latent_end"]))
        assert len(answer.latents) == sum(answer.is_latent)
        assert answer.text == talker.tokenizer.decode(answer.ids)
        assert answer.text.count("<|latent_pad|>") == len(answer.latents)
    assert blocks >= 6


def test_latents_are_the_hidden_states_fed_back(talker, rows, monkeypatch):
    """Eq. 8: the input at a latent position is the output at the position before, elsewhere an embedding."""
    inputs, outputs = [], []
    real = talker.qwen.model.language_model.forward

    def call(**kwargs):
        out = real(**kwargs)
        inputs.append(kwargs["inputs_embeds"][0, -1])
        outputs.append(out.last_hidden_state[0, -1])
        return out

    monkeypatch.setattr(talker.qwen.model.language_model, "forward", call)
    answer = generate(talker, [encode_row(talker, rows[0], answer=False)], MAX_NEW)[0]
    table, latents = talker.qwen.get_input_embeddings().weight, iter(answer.latents)
    assert sum(answer.is_latent) >= 4
    for step, token in enumerate(answer.ids[:-1]):
        expected = outputs[step] if answer.is_latent[step] else table[token]
        assert torch.equal(inputs[step + 1], expected)
        if answer.is_latent[step]:
            assert torch.equal(next(latents), expected)


def test_fed_back_states_take_the_norm_of_the_targets(tiny, rows):
    model = lively(tiny)
    model.config.latent_norm = 2.5
    bias_head(model, latent_start=20.0)
    sample = encode_row(model, rows[0], answer=False)
    answer = generate(model, [sample], 12)[0]
    assert len(answer.latents) == 8
    assert torch.allclose(answer.latents.norm(dim=-1), torch.full((8,), 2.5))
    assert_same(answer, slow_generate(model, sample, 12))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_some_ids_are_never_sampled(tiny, rows, temperature):
    model = lively(tiny)
    bias_head(model, latent_pad=30, latent_end=30, image_pad=30, video_pad=30, latent_start=6)
    samples = [encode_row(model, row, answer=False) for row in rows[:3]]
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    answers = generate(model, samples, 20, temperature=temperature, generators=generators)
    forbidden = {model.token_id[name] for name in ("latent_pad", "latent_end", "image_pad", "video_pad")}
    assert forbidden == set(model.forbidden_ids.tolist())
    for answer in answers:
        assert not forbidden & {t for t, sampled in zip(answer.ids, answer.is_sampled) if sampled}


def test_the_cut_flag(tiny, rows):
    model = lively(tiny)
    bias_head(model, im_end=60)
    sample = encode_row(model, rows[0], answer=False)
    for max_new in (1, 5):
        answer = generate(model, [sample], max_new)[0]
        assert (answer.ids, answer.truncated) == ([model.token_id["im_end"]], False)
    model = lively(tiny)
    bias_head(model, latent_start=60)
    for max_new in (1, 3, 5, 6, 8):
        answer = generate(model, [sample], max_new)[0]
        assert answer.truncated and len(answer.ids) == max_new
        assert len(answer.latents) == sum(answer.is_latent)


def test_a_feed_replaces_what_is_fed(talker, rows):
    seen = []

    def feed(hidden, block, k):
        seen.append((hidden, block.tolist(), k.tolist()))
        row = torch.arange(len(hidden))
        return (100 * row + 10 * block + k).float()[:, None].expand_as(hidden)

    samples = prompts(talker, rows)
    answers = generate(talker, samples, MAX_NEW, feed=feed)
    fed = 0
    for row, answer in enumerate(answers):
        marks = answer.latents[:, 0].tolist()
        assert marks == [100 * row + 10 * (i // talker.K) + i % talker.K for i in range(len(marks))]
        assert answer.latents.eq(answer.latents[:, :1]).all()
        fed += len(marks)
    assert fed > 20
    plain = generate(talker, samples, MAX_NEW)
    first = plain[0].is_latent.index(True)
    assert answers[0].ids[:first] == plain[0].ids[:first]  # the same until something else was fed
    assert any(mine.ids != theirs.ids for mine, theirs in zip(answers, plain))


def test_what_is_fed_at_other_rows_does_not_leak(talker, rows, answered):
    """A feed that breaks the first row's latents leaves the others as they were."""
    row = max(range(1, len(answered[1])), key=lambda i: len(answered[1][i].latents))

    def feed(hidden, block, k):
        return torch.cat([torch.full_like(hidden[:1], 7.0), hidden[1:]])

    answers = generate(talker, answered[0], MAX_NEW, feed=feed)
    assert answers[0].latents.eq(7).all() and len(answers[0].latents)
    assert_same(answers[row], answered[1][row])


def test_generation_in_training_mode_raises(tiny, rows):
    model = lively(tiny).train()
    with pytest.raises(RuntimeError, match="eval"):
        generate(model, [encode_row(model, rows[0], answer=False)], 4)


def test_the_answer_depends_on_the_video(talker, rows):
    """Not blind: another clip's frames, their order, and their times each change what is said or thought."""
    row, other = rows[0], rows[1]
    variants = [
        row,
        replace(row, image_input=other.image_input),
        replace(row, image_input=row.image_input[::-1]),
        replace(row, times=[0.0, 1.0, 9.0, 10.0]),
        replace(row, image_input=[], times=[]),
    ]
    hidden = []
    for variant in variants:
        fed = generate(talker, [encode_row(talker, variant, answer=False)], MAX_NEW)[0]
        hidden.append((tuple(fed.ids), fed.latents.flatten()[:256].tolist()))
    assert len({str(one) for one in hidden}) == len(variants)


# sampling


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_sampling_is_a_function_of_the_rows_generator(talker, rows):
    """The same again, alone, in another order, beside other rows: never another answer."""
    samples, seeds = prompts(talker, rows), [11, 12, 13, 14, 15, 16]
    settings = {"max_new": 16, "temperature": 0.9}
    answers = generate(talker, samples, **settings, generators=generators(*seeds))
    again = generate(talker, samples, **settings, generators=generators(*seeds))
    back = generate(talker, samples[::-1], **settings, generators=generators(*seeds[::-1]))[::-1]
    for row, answer in enumerate(answers):
        alone = generate(talker, [samples[row]], **settings, generators=generators(seeds[row]))[0]
        for other in (again[row], back[row], alone):
            assert_same(other, answer)
    other = generate(talker, samples, **settings, generators=generators(*range(6)))
    assert sum(mine.ids != theirs.ids for mine, theirs in zip(answers, other)) >= 5
    twins = generate(talker, [samples[0]] * 3, **settings, generators=generators(1, 2, 1))
    assert twins[0].ids == twins[2].ids != twins[1].ids


def test_sampling_equals_the_slow_reference(talker, rows):
    samples = prompts(talker, rows)[:3]
    answers = generate(talker, samples, 16, temperature=0.8, generators=generators(1, 2, 3))
    for sample, answer, generator in zip(samples, answers, generators(1, 2, 3)):
        uniform = torch.rand(16, generator=generator, dtype=torch.float64)
        assert_same(answer, slow_generate(talker, sample, 16, 0.8, uniform))


LOGITS = torch.tensor([2.0, -1.0, 1.5, 0.0, 1.0, -math.inf])


def shares(temperature, top_p, n=40000):
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sample_token(LOGITS.expand(n, -1), uniform, temperature, top_p).bincount(minlength=6) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_samples_follow_the_full_softmax(temperature):
    p = (LOGITS / temperature).softmax(dim=-1)
    assert torch.allclose(shares(temperature, 1.0), p, atol=0.012) and shares(temperature, 1.0)[5] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    p = LOGITS.softmax(dim=-1)  # 0.45, 0.02, 0.27, 0.06, 0.17, 0
    kept = torch.tensor([1.0, 0, 1, 0, 1, 0]) * p
    assert torch.allclose(shares(1.0, 0.8), kept / kept.sum(), atol=0.012)
    assert shares(1.0, 0.8)[[1, 3, 5]].sum() == 0
    assert shares(1.0, 0.1).tolist() == [1, 0, 0, 0, 0, 0]


def test_draws_at_the_ends_give_tokens_that_exist():
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([-math.inf, 0.0, 1.0, -math.inf]).expand(2, -1)
    assert sample_token(logits, ends, 1.0, 1.0).tolist() == [1, 2]
    assert sample_token(logits, ends, 1.0, 0.99).tolist() == [2, 1]  # sorted, the likelier one first
    assert sample_token(logits, ends, 0, 1.0).tolist() == [2, 2]


# replay, what 4DRL rests on


def with_answer(sample, answer):
    """A prompt's sample, and what was generated after it."""
    n = len(answer.ids)
    added = {
        "ids": torch.tensor(answer.ids),
        "positions": (sample.positions.max() + 1 + torch.arange(n)).expand(3, -1),
        "is_text": torch.tensor(answer.is_sampled),
        "is_latent": torch.tensor(answer.is_latent),
        "is_visual": torch.zeros(n, dtype=torch.bool),
        "is_real": torch.ones(n, dtype=torch.bool),
    }
    joined = {name: torch.cat([getattr(sample, name), x], dim=-1) for name, x in added.items()}
    return replace(sample, **joined)


@pytest.mark.parametrize("norm", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_replayed_log_probabilities_equal_the_samplers(tiny, rows, monkeypatch, norm, temperature):
    """forward over what was sampled, with the latents as they were fed, gives the sampler's own numbers."""
    model, seen = lively(tiny), []
    model.config.latent_norm = norm
    with torch.no_grad():
        for name in ("latent_start", "im_end"):  # long rows of the head are drawn more often
            model.qwen.get_input_embeddings().weight[model.token_id[name]] *= 5
    real = model_py.sample_token

    def recorded(logits, *args):
        token = real(logits, *args)
        seen.append((logits / temperature).log_softmax(dim=-1)[range(len(token)), token])
        return token

    monkeypatch.setattr(model_py, "sample_token", recorded)
    samples = prompts(model, rows)
    answers = generate(model, samples, MAX_NEW, temperature=temperature, generators=generators(*range(6)))
    replay, expected = [], []
    for row, (sample, answer) in enumerate(zip(samples, answers)):
        replay.append(with_answer(sample, answer))
        expected += [seen[step][row] for step in range(len(answer.ids)) if answer.is_sampled[step]]
    batch = VisionCache(model).prepare(collate(replay, model.token_id["pad"]))
    fed = torch.cat([answer.latents for answer in answers])
    assert len(fed) > 10
    logp, imagined, targets = model(batch, latents=fed, forbid=True, temperature=temperature)
    assert torch.allclose(logp, torch.stack(expected), atol=1e-4)
    assert torch.equal(targets, fed)
    assert torch.allclose(model.feedback(imagined), fed, atol=1e-4)  # h_{t-1} is what was fed at t
    pads = model.qwen.get_input_embeddings().weight[[model.token_id["latent_pad"]]].expand_as(fed)
    wrong, _, _ = model(batch, latents=pads, forbid=True, temperature=temperature)
    assert (wrong - logp).abs().max() > 0.01  # the pitfall would be seen
