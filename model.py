"""What the stages of nano4DThinker share: latent pooling, positions, the forward pass, recurrent generation.

4DThinker (arXiv 2605.05997) lets a vision-language model (Qwen2.5-VL) *imagine* in the middle of its chain of
thought: after `<|latent_start|>` it reads its own last hidden state K times instead of a token, then goes on
with `<|latent_end|>`. Read this file first, in README's order; it is imported by the stages and never run.

Letters in shape comments: B rows, T tokens, D width, V vocabulary, K latents per image, N visual tokens of
one image or video, P patches (before the 2 x 2 merge), n any count.

Differs from the paper:
- a latent block is exactly K long: most of its logits are not trained, so `<|latent_end|>` is forced (ours)
- `grid` pooling beside the paper's `strips` (ours); temporal positions come from real seconds (ours)
- text after a video starts at the largest position + 1, as Qwen2.5-VL was trained; transformers continues at
  another position

`require(condition, sentence)` ends the program with that sentence unless the condition holds.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

from lib.checkpoints import load_extra_weights, newest_checkpoint
from lib.command_line import require
from lib.distributed import autocast
from lib.fast import install_fast_paths
from lib.images import load_patches, patch_grid
from lib.loading import check_latent_config, check_pixels, check_settings, check_vocabulary
from lib.loading import knows_latents, load_network, load_tokenizer, read_suffix
from lib.rows import LETTERS, PLACEHOLDER
from lib.text import as_text, tokenize

# ---------------------------------------------------------------- latent pooling and positions


def pool_latents(features, K, pooling, shape):
    """Eq. 5: visual tokens (N, D) in raster order -> (K, D), the mean over each of K sets.

    shape: (h, w), the tokens' rows and columns. `strips` (paper): K contiguous runs; when K does not divide
    N, the first N mod K runs hold one token more. `grid` (ours): rows x columns cells, as square as K allows
    (4 -> 2 x 2); sides that do not divide give their rest to the first rows and columns. N < K is refused.
    """
    # strips: as in the paper, over the raster order
    N = len(features)
    require(N >= K, f"{N} visual tokens cannot be pooled into K={K} latents; lower K or raise MAX_PIXELS.")
    if pooling == "strips":
        runs = torch.tensor_split(features, K)  # K of about (N / K, D)
        return torch.stack([run.mean(dim=0) for run in runs])  # (K, D)

    # a pooling of your own is another `if` here
    require(pooling == "grid", f"POOLING={pooling} is not known; set it to grid or strips.")

    # grid: the divisors of K that are closest to each other, the larger one along the longer side
    h, w = shape
    short = max(side for side in range(1, math.isqrt(K) + 1) if K % side == 0)
    rows, columns = (short, K // short) if w >= h else (K // short, short)
    possible = rows <= h and columns <= w
    sizes = f"{h} x {w} tokens into {rows} x {columns} cells"
    require(possible, f"POOLING=grid cannot divide {sizes}; lower K or raise MAX_PIXELS.")
    # bands from top to bottom, cells of each from left to right
    cells = []
    for band in torch.tensor_split(features.view(h, w, -1), rows, dim=0):
        cells += torch.tensor_split(band, columns, dim=1)  # each about (h / rows, w / columns, D)
    return torch.stack([cell.mean(dim=(0, 1)) for cell in cells])  # (K, D)


def pair_seconds(times, frames_per_pair=2, seconds_per_pair=None):
    """Seconds of each frame pair since the start: [0, 1, 2, 3.5] -> [0, 2]; or a given step instead."""
    starts = times[::frames_per_pair]
    if seconds_per_pair is None:
        return [start - starts[0] for start in starts]
    return [index * seconds_per_pair for index in range(len(starts))]


def rope_positions(segments, tokens_per_second):
    """3-D rotary positions (time, height, width) of a sequence -> (3, T) long.

    `segments` lists what the sequence holds: a number of text tokens, or (seconds of each pair, h, w) of a
    video in merged tokens. With 2 tokens a second, [2, ([0.0, 1.5], 1, 2), 1] gives (columns are tokens)

        text  text | pair 0        pair 1      | text
        0     1    | 2 2           5 5         | 6       time: 2 + floor(1.5 · 2)
        0     1    | 2 2           2 2         | 6       height
        0     1    | 2 3           2 3         | 6       width; text goes on at the largest position + 1
    """
    columns = []
    start = 0
    for segment in segments:
        if isinstance(segment, int):
            # text: all three positions count the tokens
            offsets = torch.arange(segment).expand(3, -1)  # (3, n)
            length = segment
        else:
            # video: time in ticks of 1 / tokens_per_second, height and width in merged tokens
            seconds, h, w = segment
            ticks = [math.floor(second * tokens_per_second + 1e-6) for second in seconds]
            axes = torch.tensor(ticks), torch.arange(h), torch.arange(w)
            offsets = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (3, t·h·w)
            length = max(ticks[-1] + 1, h, w)
        columns.append(start + offsets)
        start += length
    return torch.cat(columns, dim=1)  # (3, T)


# ---------------------------------------------------------------- rows to tokens

# release: the prompt ends in "assistant", the newline after it is the first supervised token
PROMPT_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
PROMPT_END = "<|im_end|>\n<|im_start|>assistant"
SUFFIX = "\nThink in <think>, imagining the object in view where it helps, then answer in <answer>."  # ours


@dataclass
class Sample:
    """One row as tokens, with a mask for each kind of token."""

    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T)
    is_text: torch.Tensor  # (T,) bool, supervised text: the answer, delimiters too, latents not
    is_latent: torch.Tensor  # (T,) bool
    is_visual: torch.Tensor  # (T,) bool
    is_real: torch.Tensor  # (T,) bool, False only where a batch pads
    video: tuple = ()  # frame files
    overlays: tuple = ()  # an overlay file for each latent block
    source: str = ""  # "file:line"
    is_blind: torch.Tensor | None = None  # (T,) bool, text that does not look at the video (BOTTLENECK)
    is_self_fed: torch.Tensor | None = None  # (T,) bool, latents that are read as imagined (SELF_FED)

    def __post_init__(self):
        """No token is blind or self-fed unless told so."""
        none = torch.zeros_like(self.is_text)
        self.is_blind = none if self.is_blind is None else self.is_blind
        self.is_self_fed = none if self.is_self_fed is None else self.is_self_fed


def encode_row(model, row, answer=True, blind=False, self_fed=False):
    """Eq. 4 and 6: one row -> Sample; `answer=False` stops where the model is to speak.

    blind: text after the first imagery does not look at the video; self_fed: see Thinker.forward (ours).

    A row has text_input (question and options), text_output (chain of thought and answer), image_input (frame
    files), times, and image_output (an overlay file for each `<output_image>` of text_output). For K = 2:

    ids        <user> v v v v How? <assistant> \\n The ball <start> . . <end> moves left <im_end>
    is_visual         1 1 1 1
    is_latent                                                      1 1
    is_text                                    1   1   1     1         1     1    1      1
    is_blind                                                           1     1    1      1
    """
    config = model.config
    vision = config.vision_config
    # special tokens in the words of a row are text, not tokens
    question = as_text(row.text_input + config.prompt_suffix) + PROMPT_END
    ids = []
    segments = []

    # the video: a visual token for each 2 x 2 patches of each frame pair
    if row.image_input:
        t, h, w = patch_grid(row.image_input, config, row.source)
        h, w = h // vision.spatial_merge_size, w // vision.spatial_merge_size
        seconds = pair_seconds(row.times, vision.temporal_patch_size, config.seconds_per_pair)
        ids += model.tokenize(PROMPT_START + "<|vision_start|>")
        segments += [len(ids), (seconds, h, w)]
        ids += [model.token_id["video_pad"]] * (t * h * w)
        question = "<|vision_end|>" + question
    else:
        question = PROMPT_START + question

    # the question, then the answer, in which each placeholder becomes a latent block (Eq. 6)
    text_start = len(ids)
    ids += model.tokenize(question)
    answer_start = len(ids)
    if answer:
        block = "<|latent_start|>" + "<|latent_pad|>" * model.K + "<|latent_end|>"
        text = as_text(row.text_output).replace(PLACEHOLDER, block)
        ids += model.tokenize(f"\n{text}<|im_end|>")
    segments.append(len(ids) - text_start)

    # supervised is all of the answer but its latents; supervise="letters" (pretraining of the tiny base)
    # keeps only the option letters
    ids = torch.tensor(ids)
    is_latent = ids == model.token_id["latent_pad"]
    is_text = (torch.arange(len(ids)) >= answer_start) & ~is_latent
    if row.supervise == "letters":
        is_text &= torch.isin(ids, model.letter_ids)
    has_latents = answer and model.K > 0
    # what starts a block and its latents must see the video, to imagine
    imagines = is_latent | (ids == model.token_id["latent_start"])
    has_imagined = (ids == model.token_id["latent_end"]).cumsum(dim=0) > 0
    return Sample(
        ids=ids,
        positions=rope_positions(segments, vision.tokens_per_second),
        is_text=is_text,
        is_latent=is_latent,
        is_visual=ids == model.token_id["video_pad"],
        is_real=torch.ones(len(ids), dtype=torch.bool),
        is_blind=has_imagined & ~imagines & blind,
        is_self_fed=is_latent & self_fed,
        video=tuple(row.image_input),
        overlays=tuple(row.image_output) if has_latents else (),
        source=row.source,
    )


@dataclass
class Batch:
    """Samples padded to one length, and what their images show."""

    ids: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (3, B, T)
    is_text: torch.Tensor  # (B, T) bool, as the next five
    is_latent: torch.Tensor
    is_visual: torch.Tensor
    is_real: torch.Tensor
    is_blind: torch.Tensor
    is_self_fed: torch.Tensor
    text_at: torch.Tensor  # (n,) places of is_text in all B · T tokens, row after row
    latent_at: torch.Tensor  # (n,) places of is_latent
    videos: list  # frame files of each row that has a video
    overlays: list  # (overlay file,) of each latent block
    source: str  # of the first row, for error sentences
    has_blind: bool = False  # whether any token is; known on the CPU, so that a GPU need not be waited for
    has_self_fed: bool = False
    video_features: torch.Tensor | None = None  # (n, D), from here on filled in by VisionCache
    overlay_features: list = field(default_factory=list)  # (N, D) of each overlay
    overlay_grids: list = field(default_factory=list)  # patches (1, h, w) of each overlay
    prompts: "Batch | None" = None  # 4DRL: the rows are answers to these, padded left

    def to(self, device):
        """The same batch with its tensors on a device."""
        moved = {}
        for name, value in vars(self).items():
            moved[name] = value.to(device) if torch.is_tensor(value) else value
        return Batch(**moved)


def collate(samples, pad_id, side="right"):
    """Samples -> Batch without features, padded on one side.

    is_real of rows of 3 and 2 tokens: [[1, 1, 1], [1, 1, 0]]; padded left: [[1, 1, 1], [0, 1, 1]].
    """
    # all rows get the length of the longest
    T = max(len(sample.ids) for sample in samples)

    def stack(name, value, dim=0):
        padded = []
        for sample in samples:
            x = getattr(sample, name)
            missing = T - x.shape[-1]
            padded.append(F.pad(x, (0, missing) if side == "right" else (missing, 0), value=value))
        return torch.stack(padded, dim)

    names = ("is_text", "is_latent", "is_visual", "is_real", "is_blind", "is_self_fed")
    masks = {name: stack(name, False) for name in names}
    return Batch(
        ids=stack("ids", pad_id),
        positions=stack("positions", 0, dim=1),
        **masks,
        # the same masks as places, found here on the CPU, so that a GPU need not be waited for
        text_at=masks["is_text"].flatten().nonzero()[:, 0],
        latent_at=masks["is_latent"].flatten().nonzero()[:, 0],
        videos=[sample.video for sample in samples if sample.video],
        overlays=[(file,) for sample in samples for file in sample.overlays],
        source=samples[0].source,
        has_blind=bool(masks["is_blind"].any()),
        has_self_fed=bool(masks["is_self_fed"].any()),
    )


# ---------------------------------------------------------------- frozen vision


@dataclass
class VisionEntry:
    """What the visual encoder made of one video or overlay."""

    features: torch.Tensor  # (N, D) in raster order, on the CPU
    grid: tuple  # patches (t, h, w)


class VisionCache:
    """Encodes the images of batches. Vision is frozen, so each distinct image is encoded once.

    Features are kept and pooled only where they are used (Eq. 5), so a pooling with weights can learn.
    `keep=False` forgets them after each batch.
    """

    def __init__(self, model, keep=True):
        self.model = model
        self.keep = keep
        self.store = {}  # tuple of files -> VisionEntry

    def prepare(self, batch):
        """A collated batch -> the same on the model's device, with the features of its images."""
        device = self.model.device
        self.encode_missing([*batch.videos, *batch.overlays], batch.source)
        batch = batch.to(device)
        # features stand in the order of the visual tokens, row after row
        if batch.videos:
            videos = [self.store[video].features for video in batch.videos]
            batch.video_features = torch.cat(videos).to(device)  # (n, D)
        # overlays go to the device together and are pooled in the forward pass
        if batch.overlays:
            entries = [self.store[overlay] for overlay in batch.overlays]
            features = torch.cat([entry.features for entry in entries]).to(device)
            batch.overlay_features = features.split([len(entry.features) for entry in entries])
            batch.overlay_grids = [entry.grid for entry in entries]
        if not self.keep:
            self.clear()
        return batch

    @torch.no_grad()
    def encode_missing(self, items, source):
        """Encodes, in one call, those items (tuples of files) that are not in the store yet."""
        missing = [item for item in dict.fromkeys(items) if item not in self.store]
        if not missing:
            return
        loaded = [load_patches(item, self.model.config, source) for item in missing]
        pixels = torch.cat([patches for patches, _ in loaded])
        grids = [grid for _, grid in loaded]
        encoded = self.model.encode(pixels.to(self.model.device), grids)
        for item, features, grid in zip(missing, encoded, grids):
            self.store[item] = VisionEntry(features.cpu(), grid)

    def clear(self):
        """Forgets all features."""
        self.store = {}


# ---------------------------------------------------------------- the model


def token_log_probs(hidden, head_weight, ids, forbidden_ids=None, temperature=1.0):
    """log p of each token (n,) given the hidden state before it (n, D) -> (n,) float32.

    head_weight (V, D); forbidden_ids are left out of the softmax, as the sampler leaves them out.
    """
    logits = (hidden @ head_weight.T).float() / temperature  # (n, V)
    if forbidden_ids is not None:
        logits = logits.index_fill(-1, forbidden_ids, -torch.inf)
    return logits.log_softmax(dim=-1).gather(-1, ids[:, None])[:, 0]


class Thinker(nn.Module):
    """Qwen2.5-VL with latent tokens; one forward for the whole network, so DDP and FSDP2 can wrap it."""

    def __init__(self, qwen, tokenizer):
        super().__init__()
        # a researcher may add weights here, such as those of a pooling: they are trained and saved too
        self.qwen = qwen
        self.tokenizer = tokenizer
        self.config = qwen.config
        self.K = qwen.config.latent_size
        # special tokens by name; ids differ between tokenizers, so none stands in the code
        names = ("im_end", "video_pad", "image_pad", "latent_pad", "latent_start", "latent_end")
        self.token_id = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
        self.token_id["pad"] = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.letter_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS)))
        # these are never sampled as text: a block's latents and end are forced, images come from the user
        forbidden = ("latent_pad", "latent_end", "image_pad", "video_pad")
        forbidden_ids = torch.tensor([self.token_id[name] for name in forbidden])
        self.register_buffer("forbidden_ids", forbidden_ids, persistent=False)

    @property
    def device(self):
        """Where the weights are."""
        return self.forbidden_ids.device

    def tokenize(self, text):
        """Text, special tokens included, -> list of ids; those that `as_text` hides are text."""
        return tokenize(self.tokenizer, text)

    def encode(self, pixels, grids):
        """Patches (P, d) and grids [(t, h, w)] of several images -> list of (N, D), each in raster order."""
        merge = self.config.vision_config.spatial_merge_size
        # a thread that prepares the next step does not inherit this step's autocast
        with autocast(pixels.device):
            features = self.qwen.model.visual(pixels, torch.tensor(grids, device=pixels.device)).pooler_output
        return list(features.split([t * h * w // merge**2 for t, h, w in grids]))

    def pool(self, features, grid):
        """Eq. 5 for one overlay: (N, D), its patches (1, h, w) -> (K, D)."""
        _, h, w = grid
        merge = self.config.vision_config.spatial_merge_size
        return pool_latents(features, self.K, self.config.latent_pooling, (h // merge, w // merge))

    def feedback(self, hidden):
        """Eq. 8: what a latent position reads is the hidden state, scaled to `latent_norm` if one is set."""
        if self.config.imagery == "pause":
            return self.pad_embedding().expand_as(hidden)
        if self.config.latent_norm is None:
            return hidden
        return F.normalize(hidden, dim=-1) * self.config.latent_norm

    def pad_embedding(self):
        """What a latent position holds where nothing is put in its place (D,)."""
        return self.qwen.get_input_embeddings().weight[self.token_id["latent_pad"]]

    def embed_tokens(self, ids):
        """Token ids (B, T) -> embeddings (B, T, D)."""
        return F.embedding(ids, self.qwen.get_input_embeddings().weight)

    def embed(self, batch, latents=None):
        """Input of the language model (B, T, D): token embeddings, visual features, latents (n, D)."""
        # pads of the video and of latent blocks hold the places of what is put there
        x = self.embed_tokens(batch.ids)
        if batch.video_features is not None:
            x = x.masked_scatter(batch.is_visual[..., None], batch.video_features.to(x.dtype))
        if latents is not None:
            x = x.masked_scatter(batch.is_latent[..., None], latents.to(x.dtype))
        return x

    def text(self, x, positions, is_real=None, cache=None, read=None):
        """The language model: x (B, T, D), positions (3, B, T) -> hidden states after the norm (B, T, D).

        With `read` (n,), places in all B · T tokens, only those (n, D). Rows padded on the right need no mask
        `is_real` (B, T): causal attention never looks at what follows. A mask may be (B, 1, T, T) bool, too.
        """
        hidden = self.qwen.model.language_model(
            inputs_embeds=x,
            position_ids=positions,
            attention_mask=is_real,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden if read is None else hidden.flatten(0, 1)[read]

    def log_probs(self, hidden, ids, forbid=False, temperature=1.0):
        """token_log_probs with this model's head; `forbid` leaves out what may not be sampled."""
        forbidden_ids = self.forbidden_ids if forbid else None
        return token_log_probs(hidden, self.qwen.lm_head.weight, ids, forbidden_ids, temperature)

    def new_cache(self):
        """An empty cache of keys and values."""
        return DynamicCache()

    def forward(self, batch, latents=None, forbid=False, temperature=1.0):
        """Teacher-forced pass over right-padded rows -> logp (n_text,), imagined and targets (n_latent, D).

        logp: of every supervised token given what stands before it; imagined: h_{t-1} at latent positions t;
        targets: z_t, the input at t (Eq. 7), or the given `latents` (n, D) as sampled (4DRL); None if none.
        """
        # 4DRL's cheaper form of the same, to be skipped at first reading
        if batch.prompts is not None:
            return self.forward_answers(batch, latents, forbid, temperature)
        # Eq. 5: the targets are the pooled overlays, and the very vectors that the model reads (Eq. 7)
        targets = latents
        is_pause = self.config.imagery == "pause"  # an ablation: pads stand where latents would
        if latents is None and batch.overlay_features and not is_pause:
            pooled = [self.pool(*overlay) for overlay in zip(batch.overlay_features, batch.overlay_grids)]
            targets = torch.cat(pooled)  # (n_latent, D)
        if not is_pause:
            require_latents(batch, targets)
        x = self.embed(batch, targets)
        mask = bottleneck_mask(batch)
        if batch.has_self_fed:
            x = self.embed(batch, self.own_latents(batch, x, mask, targets))

        # The hidden state at t - 1 predicts token t, and is what the model imagines for latent position t.
        # A row begins with its prompt, so the place before is never in the row before.
        predicted = torch.cat([batch.text_at, batch.latent_at])
        hidden = self.text(x, batch.positions, mask, read=predicted - 1)  # (n_text + n_latent, D)
        text_hidden, imagined = hidden.split([len(batch.text_at), len(batch.latent_at)])
        text_ids = batch.ids.flatten()[batch.text_at]
        logp = self.log_probs(text_hidden, text_ids, forbid, temperature)
        return logp, imagined, targets

    def own_latents(self, batch, x, mask, targets):
        """SELF_FED (ours): targets (n_latent, D); in self-fed rows, the model's own imagery instead.

        A first pass over the true latents gives h_{t-1} of all positions t at once, scaled as at inference.
        None stays None: pads, or a micro-batch without imagery.
        """
        # made without imagery too: under FSDP all processes make the same passes
        with torch.no_grad():
            own = self.feedback(self.text(x, batch.positions, mask, read=batch.latent_at - 1))
        if targets is None:
            return None
        is_self_fed = batch.is_self_fed.flatten()[batch.latent_at]
        return torch.where(is_self_fed[:, None], own.to(targets.dtype), targets)

    def forward_answers(self, batch, latents, forbid, temperature):
        """The same for 4DRL: rows are G answers to each of batch.prompts, and each prompt is read once."""
        # each prompt is computed once, its keys and values are repeated for its answers
        require_latents(batch, latents)
        G = len(batch.ids) // len(batch.prompts.ids)
        cache, last_hidden, is_real, _ = self.read_prompts(batch.prompts, copies=G)
        # a single prompt is not padded, so its answers, padded on the right, need no mask
        several = len(batch.prompts.ids) > 1
        is_real = torch.cat([is_real, batch.is_real], dim=1) if several else None
        hidden = self.text(self.embed(batch, latents), batch.positions, is_real, cache)  # (B, T, D)

        # The prompt's last hidden state predicts an answer's first token.
        hidden = torch.cat([last_hidden, hidden[:, :-1]], dim=1).flatten(0, 1)  # (B · T, D)
        text_ids = batch.ids.flatten()[batch.text_at]
        logp = self.log_probs(hidden[batch.text_at], text_ids, forbid, temperature)
        return logp, hidden[batch.latent_at], latents

    def read_prompts(self, batch, copies=1):
        """Reads left-padded prompts once, for `copies` answers to each, side by side: B = rows · copies.

        -> cache, last hidden state (B, 1, D), is_real (B, T), largest position (B,). RuntimeError in training
        mode.
        """
        if self.training:
            raise RuntimeError("Prompts are read in evaluation mode: checkpointing drops cache and imagery.")
        rows, T = batch.ids.shape
        cache = self.new_cache()
        last = torch.arange(1, rows + 1, device=self.device) * T - 1  # each row's last place
        hidden = self.text(self.embed(batch), batch.positions, batch.is_real, cache, read=last)
        position = batch.positions.amax(dim=(0, 2))  # (rows,)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        shared = (hidden[:, None], batch.is_real, position)
        return cache, *(x.repeat_interleave(copies, dim=0) for x in shared)


def bottleneck_mask(batch):
    """BOTTLENECK (ours): may token i look at token j? (B, 1, T, T) bool [.., i, j]; None: plain causal.

    In rows with a bottleneck the text after the first imagery attends to all but the video's own tokens.
    """
    if not batch.has_blind:
        return None
    T = batch.ids.shape[1]
    is_before = torch.ones(T, T, dtype=torch.bool, device=batch.ids.device).tril()
    is_hidden = batch.is_blind[:, :, None] & batch.is_visual[:, None, :]  # (B, T, T)
    return (is_before & ~is_hidden)[:, None]


def require_latents(batch, latents):
    """Raises ValueError unless there is a latent for each latent position: else imagery would be lost."""
    given = 0 if latents is None else len(latents)
    if given != len(batch.latent_at):
        raise ValueError(f"{batch.source}: {len(batch.latent_at)} latent positions, {given} latents.")


# ---------------------------------------------------------------- generation


@dataclass
class Completion:
    """What was generated for one prompt, from the first new token to the end of turn."""

    ids: list  # latents are recorded as latent_pad
    is_latent: list  # bool
    is_sampled: list  # bool, False for latents and for the forced end of a block
    latents: torch.Tensor  # (n, D) as they were fed, on the CPU
    truncated: bool  # max_new came before the end of turn
    text: str


def sample_token(logits, uniform, temperature, top_p):
    """One token per row: greedy at temperature 0, else by inverse transform from the softmax's top-p part.

    logits (B, V) float32, uniform (B,) float64 in [0, 1) -> (B,) long
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # in double precision, so that the order of a sum does not change a sample
    p = (logits.double() / temperature).softmax(dim=-1)
    order = None
    if top_p < 1:
        # keep the most likely tokens, up to the one at which their sum reaches top_p
        p, order = p.sort(dim=-1, descending=True)
        p = p * (p.cumsum(dim=-1) - p < top_p)
    # the first token at which the cumulative probability passes the uniform number
    cumulative = p.cumsum(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, threshold, right=True)  # (B, 1)
    index = index.clamp(max=p.shape[-1] - 1)
    return (index if order is None else order.gather(1, index))[:, 0]


@torch.no_grad()
def generate(model, samples, max_new, vision=None, temperature=0.0, top_p=1.0, generators=None, feed=None):
    """Recurrent generation (Eq. 8), batched with left padding -> one Completion per answer.

    After a sampled `<|latent_start|>` a row's next K inputs are its own last hidden states, then
    `<|latent_end|>` is forced; each row is in its own state. `generators`: one CPU torch.Generator per
    answer, for temperature > 0; G times as many as samples give G answers to each, whose prompt is read once.
    `feed` (latents (B, D), block (B,), k (B,), counted from 0) -> (B, D) replaces what is fed inside blocks
    (controls); it is called for all rows, those outside a block (k >= K) do not use it.
    RuntimeError in training mode.
    """
    # read the prompts once, for all answers to each
    token_id = model.token_id
    device = model.device
    vision = vision or VisionCache(model)
    batch = vision.prepare(collate(samples, token_id["pad"], side="left"))
    copies = len(generators) // len(samples) if generators else 1
    cache, hidden, is_real, position = model.read_prompts(batch, copies)
    hidden = hidden[:, 0]  # (B, D)
    B = len(hidden)
    # one uniform number for each token of each answer, so that batch-mates do not change a sample
    uniform = torch.zeros(B, max_new, device=device)
    if temperature > 0:
        draws = [torch.rand(max_new, generator=g, dtype=torch.float64, device="cpu") for g in generators]
        uniform = torch.stack(draws).to(device)  # (B, max_new)

    # The state of each row: how many latents it still has to read. 0: the block's end is due. -1: outside.
    # One row with K = 2:
    #     token          The   <start>  pad     pad     <end>   is
    #     latents_left   -1    -1       2       1       0       -1     when the token is chosen
    #     next input     emb.  emb.     hidden  hidden  emb.    emb.   of the token, or the last hidden state
    latents_left = torch.full((B,), -1, device=device)
    block = torch.full((B,), -1, device=device)  # number of its current or last block
    is_done = torch.zeros(B, dtype=torch.bool, device=device)
    any_in_latent = False
    steps = []  # of each step: token, is it a latent?, a forced end?, was the row done?, each (B,)
    latents = []  # of each step: (B, D), or None where no row was in a block
    for step in range(max_new):
        # the next token of each row: sampled outside a block, forced inside and at its end
        logits = model.qwen.lm_head(hidden).float()  # (B, V)
        logits = logits.index_fill_(-1, model.forbidden_ids, -torch.inf)
        token = sample_token(logits, uniform[:, step], temperature, top_p)
        in_latent = latents_left > 0
        at_end = latents_left == 0
        token = token.masked_fill(in_latent, token_id["latent_pad"])
        token = token.masked_fill(at_end, token_id["latent_end"])
        token = token.masked_fill(is_done, token_id["pad"])
        steps.append(torch.stack([token, in_latent, at_end, is_done]))

        # Eq. 8: inside a block the input is the last hidden state, elsewhere the token's embedding
        x = model.qwen.get_input_embeddings()(token)  # (B, D)
        if any_in_latent:
            latent = model.feedback(hidden)
            if feed:
                latent = feed(latent, block, model.K - latents_left)
            x = torch.where(in_latent[:, None], latent.to(x.dtype), x)
        latents.append(x.float() if any_in_latent else None)

        # the next state of each row
        starts = (token == token_id["latent_start"]) & ~is_done
        ends_turn = (token == token_id["im_end"]) & ~in_latent & ~at_end
        block = block + starts
        latents_left = torch.where(latents_left >= 0, latents_left - 1, latents_left)
        latents_left = torch.where(starts, model.K, latents_left)
        is_done = is_done | ends_turn
        flags = torch.stack([(latents_left > 0).any(), is_done.all()])
        any_in_latent, all_done = flags.tolist()  # of the next step; the one wait for the device in this one
        if all_done or step == max_new - 1:
            break
        is_real = torch.cat([is_real, ~is_done[:, None]], dim=1)
        position = position + 1
        hidden = model.text(x[:, None], position.expand(3, -1)[..., None], is_real, cache)[:, -1]

    steps = torch.stack(steps).cpu()  # (steps, 4, B)
    latents = [x if x is None else x.cpu() for x in latents]
    return [to_completion(model, steps[..., row], latents, row) for row in range(B)]


def to_completion(model, steps, latents, row):
    """One row of what `generate` recorded: steps (n, 4) of token, latent?, forced end?, done before?."""
    # a row's own steps end with its end of turn, later ones are padding
    length = int((steps[:, 3] == 0).sum())
    token, is_latent, is_forced, _ = steps[:length].T
    # of its latents, what was fed at the steps that were latents
    fed = [latents[step][row] for step in range(length) if is_latent[step]]
    none = torch.zeros(0, model.config.text_config.hidden_size)
    ids = token.tolist()
    return Completion(
        ids=ids,
        is_latent=is_latent.bool().tolist(),
        is_sampled=((is_latent == 0) & (is_forced == 0)).tolist(),
        latents=torch.stack(fed) if fed else none,
        truncated=ids[-1] != model.token_id["im_end"],
        text=model.tokenizer.decode(ids),
    )


# ---------------------------------------------------------------- loading

DEFAULTS = {  # settings of a checkpoint that has none of its own
    "min_pixels": 28 * 28,  # (release)
    "max_pixels": 256 * 28 * 28,  # of one frame (release)
    "seconds_per_pair": None,  # None: real time (ours)
    "imagery": "latents",  # IMAGERY of dift.py
    "latent_norm": None,  # None: hidden states are fed back as they are (paper)
    "prompt_suffix": SUFFIX,
}
LATENT_FIELDS = {  # release: their names in config.json
    "<|latent_pad|>": "latent_token_id",
    "<|latent_start|>": "latent_start_id",
    "<|latent_end|>": "latent_end_id",
}


def load_model(path, device="cpu", K=None, pooling=None, suffix=None, fast=True, **settings):
    """Loads a Qwen2.5-VL folder (any key layout, tied or not) as a Thinker; fp32 weights, sdpa attention.

    The checkpoint's config holds latent_size, latent_pooling, the latent ids and prompt_suffix; a given K or
    pooling that differs is refused in one sentence; a checkpoint without them (a plain Qwen2.5-VL, the tiny
    base) takes the given ones and gets new token rows. suffix: words, or @ and the path of a file of words.
    `settings`: any of DEFAULTS; None keeps the stored. fast: the stages' constant FAST, see lib/fast.py.
    """
    # the network, in fp32: bf16 is for the arithmetic alone; what cannot be loaded is refused
    path = newest_checkpoint(path)
    settings["prompt_suffix"] = read_suffix(suffix)
    qwen = load_network(path)
    check_settings(path, qwen.config)
    qwen.model.visual.requires_grad_(False)  # (paper)

    # the tokenizer, and the latent tokens: known to a checkpoint of dift.py, new to a plain Qwen2.5-VL
    tokenizer = load_tokenizer(path, LATENT_FIELDS)
    # their K, pooling and ids must agree with what was asked for; new tokens get new rows
    latent_ids = dict(zip(LATENT_FIELDS.values(), tokenizer.convert_tokens_to_ids(list(LATENT_FIELDS))))
    if knows_latents(qwen.config, K, settings.get("imagery")):
        check_latent_config(qwen.config, latent_ids, path, K, pooling)
        check_vocabulary(path, qwen, tokenizer)
    else:
        require(K is not None, f"{path}/config.json has no latent_size; choose a checkpoint of dift.py.")
        qwen.config.latent_size = K
        qwen.config.latent_pooling = pooling
        start_token_rows(qwen, len(tokenizer), list(latent_ids.values()))

    # an unknown pooling is refused here, not at the first overlay
    K = qwen.config.latent_size
    if K > 0:
        square = torch.zeros(K * K, qwen.config.text_config.hidden_size)
        pool_latents(square, K, qwen.config.latent_pooling, (K, K))

    # settings: what was given, else what the checkpoint has, else the default
    for name, default in DEFAULTS.items():
        value = settings.get(name)
        if value is None:
            value = getattr(qwen.config, name, default)
        setattr(qwen.config, name, value)
    check_pixels(path, qwen.config)
    for name, token in latent_ids.items():
        setattr(qwen.config, name, token)

    # FAST: from here on `text`, `log_probs`, `embed_tokens` and `new_cache` are lib/fast.py's
    model = Thinker(qwen, tokenizer)
    load_extra_weights(path, model)
    if fast:
        install_fast_paths(model)
    return model.to(device).eval()


@torch.no_grad()
def start_token_rows(qwen, vocabulary, ids):
    """New tokens' rows start at the mean of the rows before them, in an untied head too."""
    if vocabulary > qwen.get_input_embeddings().num_embeddings:
        qwen.resize_token_embeddings(vocabulary, mean_resizing=False)
    for weight in {qwen.get_input_embeddings().weight, qwen.get_output_embeddings().weight}:
        weight[ids] = weight[: min(ids)].mean(dim=0)
