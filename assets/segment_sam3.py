"""SEGMENTER="sam3": masks by SAM3 from the object's name, one identity tracked over all frames."""

import functools
import sys
from collections import Counter

import numpy as np
import torch
from transformers import AutoTokenizer, Sam3VideoModel
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession


@functools.cache
def load(folder):
    """SAM3 and its tokenizer from a folder or the hub (gated), on a GPU if there is one."""
    try:
        model = Sam3VideoModel.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        return model.eval(), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        why = str(error).split("\n")[0]
        sys.exit(f"WEIGHTS={folder} cannot be loaded ({why}); set it to a folder with SAM3's weights.")


@torch.inference_mode()
def masks(frames, phrase, files, weights):
    """Frames (T, H, W, 3) and a phrase -> masks (T, H, W) of the identity that SAM3 is surest of.

    The library's processor needs torchvision; its few steps stand here: resize, scale to -1..1, upsample.
    """
    model, tokenizer = load(weights)
    resize = functools.partial(torch.nn.functional.interpolate, mode="bilinear")
    video = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1  # (T, 3, H, W)
    video = resize(video, [model.config.image_size] * 2, antialias=True)  # (T, 3, side, side)
    session = Sam3VideoInferenceSession(video, *frames.shape[1:3], *[model.device] * 3, dtype=model.dtype)
    text = tokenizer(phrase, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    number = session.add_prompt(phrase)
    session.prompt_input_ids[number] = text.input_ids.to(model.device)
    session.prompt_attention_masks[number] = text.attention_mask.to(model.device)
    found, scores = np.zeros(frames.shape[:3], bool), Counter()
    steps = list(model.propagate_in_video_iterator(session))
    for step in steps:
        scores.update({thing: float(score) for thing, score in step.obj_id_to_score.items()})
    known = [thing for thing, _ in scores.most_common() if thing not in session.hotstart_removed_obj_ids]
    for step in steps:
        for thing in {*known[:1]} & {*step.obj_id_to_mask} - {*step.suppressed_obj_ids}:
            low = step.obj_id_to_mask[thing][None].float()  # (1, 1, h, w)
            found[step.frame_idx] = (resize(low, frames.shape[1:3]) > 0)[0, 0].cpu()
    return found
