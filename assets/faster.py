"""The same numbers in less time: logits in blocks of words, keys and values that grow in place.

Read this to see what generation would cost without; in model.py the plain ways, `hidden @ table.T` and the
library's DynamicCache, could stand in their places.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

BLOCK = 1024  # words whose logits a CPU makes at once
SPARE = 256  # positions of room that are added to a cache where there is none left


def head_logits(hidden, table):
    """Hidden states (..., D), the head's table (V, D) -> logits (..., V).

    Of (n, D) on a CPU, where no gradient is asked for, one block of words after the other: of few rows'
    product with a large table most is the copying of the table, and a block's copy stays in the cache. With
    151,668 words that takes a fifth less time.
    """
    if not hidden.is_cpu or hidden.dim() != 2 or torch.is_grad_enabled():
        return hidden @ table.T
    logits = hidden.new_empty(len(hidden), len(table))
    for part, words in zip(logits.split(BLOCK, dim=1), table.split(BLOCK)):
        torch.mm(hidden, words.T, out=part)
    return logits


def head(self, hidden):
    """The head's forward: hidden states (..., D) -> logits (..., V)."""
    return head_logits(hidden, self.weight)


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

    def update(self, key_states, value_states, *rest, **how):
        """Adds keys and values (B, heads, t, d) -> all of them, (B, heads, T + t, d) each."""
        before, added = self.get_seq_length(), key_states.shape[-2]
        if before == 0 or added > 1 or torch.is_grad_enabled():
            return super().update(key_states, value_states, *rest, **how)
        after = before + added
        kept = self.room is not None and self.room[0].data_ptr() == self.keys.data_ptr()  # not replaced
        if not kept or after > self.room[0].shape[-2]:
            self.room = [F.pad(x, (0, 0, 0, SPARE)) for x in (self.keys, self.values)]
        for room, new in zip(self.room, (key_states, value_states)):
            room[..., before:after, :] = new
        self.keys, self.values = (room[..., :after, :] for room in self.room)
        return self.keys, self.values
