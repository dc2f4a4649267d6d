"""SEGMENTER="sam3" on a small random network, and what a missing one says."""

import numpy as np
import pytest
from helpers import refused

from lib.segmenters import sam3


def test_sam3_from_text_to_masks(monkeypatch):
    """A small random SAM3: every step of the library's video model, masks at the size of the video."""
    transformers = pytest.importorskip("transformers")
    import torch

    width = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2}
    backbone = {"model_type": "sam3_vit_model", "num_hidden_layers": 2, "image_size": 112, "window_size": 4}
    backbone |= {"patch_size": 14, "global_attn_indexes": [1], "pretrain_image_size": 112}
    vision = {"model_type": "sam3_vision_model", "backbone_config": backbone | width, "fpn_hidden_size": 128}
    vision["backbone_feature_sizes"] = [[32, 32], [16, 16], [8, 8]]
    text = {"model_type": "clip_text_model", "vocab_size": 100, "num_hidden_layers": 1, "projection_dim": 128}
    text |= {"max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    detector = {"model_type": "sam3", "vision_config": vision, "text_config": text | width}
    detector["detr_decoder_config"] = width | {"num_layers": 1, "num_queries": 5}
    detector["mask_decoder_config"] = {"hidden_size": 128, "num_attention_heads": 2}
    detector |= {f"{name}_config": width | {"num_layers": 1} for name in ("geometry_encoder", "detr_encoder")}
    tracker = {"model_type": "sam3_tracker_video", "vision_config": vision, "image_size": 112}
    tracker["prompt_encoder_config"] = {"hidden_size": 128, "image_size": 112}
    heads = {"hidden_size": 128, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 128}
    tracker |= {
        "mask_decoder_config": heads,
        "memory_attention_num_layers": 1,
        "memory_encoder_hidden_size": 128,
    }
    tracker |= {"memory_attention_hidden_size": 128, "memory_attention_feed_forward_hidden_size": 64}
    tracker |= {"memory_attention_rope_feat_sizes": [8, 8], "mask_downsampler_embed_dim": 128}
    tracker |= {"memory_fuser_embed_dim": 128, "memory_fuser_intermediate_dim": 64}
    easy = {
        "new_det_thresh": 0.0,
        "score_threshold_detection": 0.0,
        "hotstart_delay": 0,
        "det_nms_thresh": 0.0,
    }
    config = transformers.Sam3VideoConfig(
        detector_config=detector, tracker_config=tracker, low_res_mask_size=32, **easy
    )
    torch.manual_seed(0)
    model = transformers.Sam3VideoModel(config).eval()
    told = []

    def tokenizer(phrase, **how):
        told.append((phrase, how["max_length"], how["padding"]))
        ids = torch.tensor([[1, 5, 7, 2] + [0] * 28])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    monkeypatch.setattr(sam3, "load", lambda folder: (model, tokenizer))
    frames = np.random.default_rng(0).integers(0, 255, (3, 40, 60, 3), dtype=np.uint8)
    masks = sam3.masks(frames, "red box", [], "")
    assert masks.shape == (3, 40, 60) and masks.dtype == bool and masks.any()
    assert told == [("red box", 32, "max_length")]


def test_missing_weights_are_one_sentence(tmp_path):
    """A folder without SAM3 ends the run and is named; it is not counted as an unreadable clip."""
    refused(lambda: sam3.load(str(tmp_path)), "WEIGHTS=", str(tmp_path))
