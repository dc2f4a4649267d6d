"""SEGMENTER="sam3": masks by SAM3 from the object's name, one identity tracked over all frames."""

import functools
import sys
from collections import Counter

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import AutoTokenizer, Sam3VideoModel
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession


@functools.cache
def load(folder):
    """SAM3 and its tokenizer from a folder or the hub (gated), on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = Sam3VideoModel.from_pretrained(folder).to(device)
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        sys.exit(f"WEIGHTS={folder} cannot be loaded ({reason}); set it to a folder with SAM3's weights.")


def open_session(model, tokenizer, frames, phrase):
    """Frames (T, H, W, 3) and a phrase -> a session of the library's video model.

    The library's processor needs torchvision; its few steps stand here: resize, scale to -1..1.
    """
    height, width = frames.shape[1:3]
    side = model.config.image_size
    video = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1  # (T, 3, H, W)
    video = interpolate(video, [side, side], mode="bilinear", antialias=True)  # (T, 3, side, side)
    device = model.device
    session = Sam3VideoInferenceSession(video, height, width, device, device, device, dtype=model.dtype)
    text = tokenizer(phrase, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    number = session.add_prompt(phrase)
    session.prompt_input_ids[number] = text.input_ids.to(device)
    session.prompt_attention_masks[number] = text.attention_mask.to(device)
    return session


@torch.inference_mode()
def masks(frames, phrase, files, weights):
    """Frames (T, H, W, 3) and a phrase -> masks (T, H, W) of the identity that SAM3 is surest of."""
    model, tokenizer = load(weights)
    session = open_session(model, tokenizer, frames, phrase)
    steps = list(model.propagate_in_video_iterator(session))

    # The identity with the highest sum of scores over all frames, of those that SAM3 did not take back.
    scores = Counter()
    for step in steps:
        scores.update({identity: float(score) for identity, score in step.obj_id_to_score.items()})
    kept = [number for number, _ in scores.most_common() if number not in session.hotstart_removed_obj_ids]

    found = np.zeros(frames.shape[:3], bool)
    for step in steps:
        is_found = kept and kept[0] in step.obj_id_to_mask
        if is_found and kept[0] not in step.suppressed_obj_ids:
            low = step.obj_id_to_mask[kept[0]][None].float()  # (1, 1, h, w)
            mask = interpolate(low, frames.shape[1:3], mode="bilinear") > 0
            found[step.frame_idx] = mask[0, 0].cpu()
    return found
