"""The same numbers in less time and memory: what FAST=True puts in the place of model.py's plain methods.

You can learn 4DThinker without opening this file. `install_fast_paths` is the one place where it is
installed, and tests/test_fast.py holds plain == fast to 1e-5. On the toy they save about a tenth, with
the 151,668 words of Qwen2.5-VL's vocabulary more.
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.cache_utils import DynamicLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

CHUNK = 1024  # supervised tokens whose logits exist at once
WORDS = 1024  # words whose logits a CPU makes at once
SPARE = 256  # positions of room that are added to a cache where there is none left


def install_fast_paths(model):
    """Replaces the plain methods of a Thinker, and three layers of its network, on this one object."""
    visual = model.qwen.model.visual
    last_layer = model.qwen.model.language_model.layers[-1]
    visual.patch_embed.forward = functools.partial(embed_patches, visual.patch_embed)
    for block in visual.blocks:
        block.attn.forward = functools.partial(windowed_attention, block.attn)
    last_layer.forward = functools.partial(last_layer_where_read, last_layer)
    model.qwen.lm_head.forward = functools.partial(head_forward, model.qwen.lm_head)
    model.text = functools.partial(text, model)
    model.log_probs = functools.partial(log_probs, model)
    model.new_cache = new_cache
    if model.config.tie_word_embeddings:
        model.embed_tokens = functools.partial(embed_tokens, model)


def checkpoint_layers(qwen):
    """Activation checkpointing of every layer, by the library's name for it from 5.23 on, or the old one."""
    enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---------------------------------------------------------------- vision


def embed_patches(layer, pixels):
    """The visual encoder's first layer (P, d) -> (P, width) as the product that its convolution is."""
    return F.linear(pixels, layer.proj.weight.flatten(1))


def windowed_attention(attention, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):
    """The visual encoder's attention, all windows of one length in one call -> (P, width).

    In place of the library's loop of one call per window, where a toy run spent half its time.
    """
    qkv = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.unbind(1)  # (P, heads, d) each
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    out = torch.empty_like(v)
    lengths = cu_seqlens.diff()
    starts = cu_seqlens[:-1]
    for length in lengths.unique().tolist():
        offsets = torch.arange(length, device=starts.device)
        index = (starts[lengths == length, None] + offsets).flatten()
        windows = []
        for x in (q, k, v):
            x = x.index_select(0, index).view(-1, length, *x.shape[1:])
            windows.append(x.transpose(1, 2))  # (windows, heads, length, d)
        attended = F.scaled_dot_product_attention(*windows)
        out[index] = attended.transpose(1, 2).flatten(0, 1)
    return attention.proj(out.flatten(1))  # (P, width)


# ---------------------------------------------------------------- the language model


class TiedLookup(torch.autograd.Function):
    """Rows of the table of words, whose gradient waits for the one that the tied head gives the table."""

    @staticmethod
    def forward(ctx, weight, ids, waiting):
        ctx.save_for_backward(ids)
        ctx.waiting = waiting
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, rows):
        (ids,) = ctx.saved_tensors
        ctx.waiting.append((ids.flatten(), rows.flatten(0, 1)))
        return None, None, None


def embed_tokens(model, ids):
    """Token ids (B, T) -> embeddings (B, T, D), for tables tied to the head alone.

    The gradient's rows are added in place into the dense gradient of the head, just before it is accumulated:
    autograd would take a second tensor of the table's size.
    """
    weight = model.qwen.get_input_embeddings().weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(ids, weight)
    waiting = []

    def add_rows(gradient):
        for some_ids, rows in waiting:
            gradient.index_add_(0, some_ids, rows.to(gradient.dtype))
        waiting.clear()
        handle.remove()

    handle = weight.register_hook(add_rows)
    return TiedLookup.apply(weight, ids, waiting)


def text(model, x, positions, is_real=None, cache=None, read=None):
    """Thinker.text; with `read` the last layer's MLP and the norm work only where a state is read."""
    return model.qwen.model.language_model(
        inputs_embeds=x,
        position_ids=positions,
        attention_mask=is_real,
        past_key_values=cache,
        use_cache=cache is not None,
        read=read,
    ).last_hidden_state


def last_layer_where_read(layer, hidden_states, read=None, **arguments):
    """The language model's last layer (B, T, D) -> (n, D): its MLP only where a hidden state will be read.

    `read` (n,) counts in all B · T tokens; None: everywhere, (B, T, D) as in the library's own.
    """
    mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **arguments)
    x = hidden_states + mixed
    if read is not None:
        x = x.flatten(0, 1)[read]  # (n, D)
    return x + layer.mlp(layer.post_attention_layernorm(x))


# ---------------------------------------------------------------- the head


class TargetLogProbs(torch.autograd.Function):
    """log softmax(hidden · weightᵀ) at one id a row, forbidden ids left out -> (n,) float32.

    hidden (n, D), weight (V, D) of the head, ids (n,). The logits' memory becomes exp(logits - largest) and
    in the backward pass their gradient, for a row g (onehot - softmax): no second tensor of this size (with
    bf16 arithmetic a copy of half of it).
    """

    @staticmethod
    def forward(ctx, weight, forbidden_ids, hidden, ids):
        x = head_logits(hidden, weight).float()
        if forbidden_ids is not None:
            x.index_fill_(-1, forbidden_ids, -torch.inf)
        x.sub_(x.amax(dim=-1, keepdim=True))
        target = x.gather(-1, ids[:, None])  # (n, 1)
        total = x.exp_().sum(dim=-1, keepdim=True)
        ctx.save_for_backward(hidden, weight, x, ids[:, None], total)
        return (target - total.log())[:, 0]

    @staticmethod
    def backward(ctx, g):
        hidden, weight, x, ids, total = ctx.saved_tensors
        g = g[:, None]
        g = x.mul_(-g / total).scatter_add_(-1, ids, g).to(hidden.dtype)  # (n, V)
        return g.T @ hidden, None, g @ weight, None


def log_probs(model, hidden, ids, forbid=False, temperature=1.0):
    """Thinker.log_probs in chunks; beyond one chunk, logits are made again in the backward pass."""
    forbidden_ids = model.forbidden_ids if forbid else None
    weight = model.qwen.lm_head.weight
    hidden = hidden / temperature  # here a few rows, there all their logits
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
        weight = weight.to(torch.get_autocast_dtype(kind))
    one_chunk = functools.partial(TargetLogProbs.apply, weight, forbidden_ids)
    if len(ids) > CHUNK:
        one_chunk = functools.partial(checkpoint, one_chunk, use_reentrant=False)
    chunks = [one_chunk(rows, some) for rows, some in zip(hidden.split(CHUNK), ids.split(CHUNK))]
    return torch.cat(chunks)


def head_logits(hidden, weight):
    """Hidden states (..., D), the head's weight (V, D) -> logits (..., V).

    Of (n, D) on a CPU, where no gradient is asked for, one block of words after the other: of few rows'
    product with a large table most is the copying of the table, and a block's copy stays in the processor's
    cache. With 151,668 words that takes a fifth less time.
    """
    if not hidden.is_cpu or hidden.dim() != 2 or torch.is_grad_enabled():
        return hidden @ weight.T
    logits = hidden.new_empty(len(hidden), len(weight))
    for part, words in zip(logits.split(WORDS, dim=1), weight.split(WORDS)):
        torch.mm(hidden, words.T, out=part)
    return logits


def head_forward(head, hidden):
    """The head's forward: hidden states (..., D) -> logits (..., V)."""
    return head_logits(hidden, head.weight)


# ---------------------------------------------------------------- the cache


def new_cache():
    """An empty cache of keys and values that grows in place."""
    return Cache(layer_class_to_replicate=RoomyLayer)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (B, heads, T, d): the first T positions of tensors with room for more.

    The library's own makes a longer copy of all it holds for each new token. Only a single token without a
    graph is written in place; prompts, and whatever a gradient goes through, take the library's way.
    """

    room = None

    def batch_repeat_interleave(self, repeats):
        """Makes `repeats` rows of each, side by side; of one row no copy is made."""
        if repeats > 1:
            super().batch_repeat_interleave(repeats)

    def update(self, key_states, value_states, *rest, **arguments):
        """Adds keys and values (B, heads, t, d) -> all of them, (B, heads, T + t, d) each."""
        before = self.get_seq_length()
        added = key_states.shape[-2]
        if before == 0 or added > 1 or torch.is_grad_enabled():
            return super().update(key_states, value_states, *rest, **arguments)
        after = before + added
        # somebody may have put other keys in the place of those that stand in our room
        is_ours = self.room is not None and self.room[0].data_ptr() == self.keys.data_ptr()
        if not is_ours or after > self.room[0].shape[-2]:
            self.room = [F.pad(x, (0, 0, 0, SPARE)) for x in (self.keys, self.values)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[..., before:after, :] = new
        self.keys, self.values = (room[..., :after, :] for room in self.room)
        return self.keys, self.values
