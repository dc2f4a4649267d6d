"""lib/checkpoints.py and load_model: what is written, and what is read, in every layout, or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import lively, make_world, refused
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from lib.checkpoints import clear_run, load_optimizer, newest_checkpoint, open_run, save_checkpoint
from model import SUFFIX, VisionCache, collate, encode_row, load_model


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("untied"), tied=False)


def batch_of(model, rows):
    """Rows -> the batch that the forward pass takes."""
    samples = [encode_row(model, row) for row in rows]
    return VisionCache(model).prepare(collate(samples, model.token_id["pad"]))


# ---------------------------------------------------------------- written and read


def outputs(model, rows):
    """What a checkpoint must keep: the forward pass of two rows."""
    with torch.no_grad():
        logp, imagined, targets = model(batch_of(model, rows[:2]))
    return torch.cat([logp, imagined.flatten(), targets.flatten()])


def test_a_checkpoint_keeps_weights_and_settings(tiny, rows, tmp_path):
    model = lively(tiny, K=3, pooling="strips", suffix="\nThink hard.", max_pixels=2000, seconds_per_pair=2.0)
    model.config.latent_norm = 1.25
    folder = save_checkpoint(tmp_path, 7, model, {"LR": 0.5, "K": 3, "MODEL": "assets/tiny"})
    assert folder == tmp_path / "step_000007"
    again = load_model(tmp_path)
    assert (again.K, again.config.latent_pooling, again.config.latent_norm) == (3, "strips", 1.25)
    assert again.config.prompt_suffix == "\nThink hard."
    assert (again.config.max_pixels, again.config.seconds_per_pair) == (2000, 2.0)
    assert again.token_id == model.token_id and not again.training
    for (name, mine), theirs in zip(model.qwen.state_dict().items(), again.qwen.state_dict().values()):
        assert torch.equal(mine, theirs), name
    assert torch.equal(outputs(model, rows), outputs(again, rows))
    config = json.loads((folder / "config.json").read_text())
    assert config["run"] == {"LR": 0.5, "K": 3, "MODEL": "assets/tiny", "step": 7}
    assert config["latent_size"] == 3 and config["latent_start_id"] == model.token_id["latent_start"]
    changed = load_model(tmp_path, K=3, pooling="strips", suffix="", max_pixels=1500)
    assert changed.config.prompt_suffix == "\nThink hard." and changed.config.max_pixels == 1500


def test_the_newest_two_checkpoints_stay(tiny, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    for step in (1, 9, 10):
        save_checkpoint(tmp_path, step, model, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000009", "step_000010"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000010"
    assert newest_checkpoint(tmp_path / "step_000009") == tmp_path / "step_000009"
    (tmp_path / ".unfinished_000011").mkdir()
    (tmp_path / "step_000012").mkdir()  # without its config.json it is not one
    assert newest_checkpoint(tmp_path) == tmp_path / "step_000010"
    refused(lambda: newest_checkpoint(tmp_path / "nothing"), "nothing", "MODEL")


def test_moments_come_back(tiny, rows, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        logp, _, _ = model(batch_of(model, rows[:2]))
        logp.sum().backward()
        optimizer.step()
    save_checkpoint(tmp_path, 2, model, {}, optimizer)
    again = load_model(tmp_path)
    other = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], 0.01)
    load_optimizer(tmp_path / "step_000002", again, other)
    old, new = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert old.keys() == new.keys() and len(new) > 20
    for index in old:
        assert old[index].keys() == new[index].keys()
        assert all(torch.equal(old[index][key], new[index][key]) for key in old[index])
    refused(lambda: load_optimizer(tmp_path, again, other), "optimizer.safetensors", "RESUME=never")


def test_plain_transformers_opens_our_checkpoint(tiny, rows, tmp_path):
    model = lively(tiny)
    folder = save_checkpoint(tmp_path, 1, model, {"LR": 0.1})
    qwen, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = encode_row(model, rows[0])
    text = model.tokenizer.decode(sample.ids)
    assert text.startswith("<|im_start|>system\n") and "<|latent_pad|>" in text
    assert tokenizer(text)["input_ids"] == sample.ids.tolist()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>user\nHi")
    without_video = replace(rows[3], image_input=[], times=[])
    ids = encode_row(model, without_video, answer=False).ids
    theirs = qwen.eval()(input_ids=ids[None]).logits
    x = model.qwen.get_input_embeddings()(ids)[None]
    ours = model.qwen.lm_head(model.text(x, torch.arange(len(ids)).expand(3, 1, -1)))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert qwen.lm_head.weight is qwen.get_input_embeddings().weight


# ---------------------------------------------------------------- layouts


def write_legacy(source, folder):
    """A checkpoint as Qwen2.5-VL's authors wrote it: flat config, `visual.*` and `model.*` keys."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"]}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    for name in ("model_type", "layer_types"):
        text.pop(name, None)
    vision = config["vision_config"]
    for name in ("rope_parameters", "model_type", "in_channels"):
        vision.pop(name, None)
    vision |= {"in_chans": 3, "spatial_patch_size": vision["patch_size"]}
    (folder / "config.json").write_text(json.dumps(config | text))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        tensors[name] = tensor
    assert any(name.startswith("visual.blocks.0") for name in tensors)
    assert any(name.startswith("model.layers.0") for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_current(source, folder, model):
    """A checkpoint with the module's own names, `model.visual.*` and `model.language_model.*`."""
    shutil.copytree(source, folder)
    tensors = {name: x.clone() for name, x in model.qwen.state_dict().items() if name != "lm_head.weight"}
    assert all(name.startswith(("model.visual.", "model.language_model.")) for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_both_key_layouts_load(tiny, rows, tmp_path):
    model = lively(tiny)
    source = save_checkpoint(tmp_path, 1, model, {})
    write_legacy(source, tmp_path / "legacy")
    write_current(source, tmp_path / "current", model)
    for name in ("legacy", "current"):
        assert torch.equal(outputs(load_model(tmp_path / name), rows), outputs(model, rows)), name


def test_a_checkpoint_of_the_release_has_strips(tiny, tmp_path):
    """Its config.json holds latent_size and the ids, but no name for the pooling and no pixel limits."""
    source = save_checkpoint(tmp_path, 1, lively(tiny), {})
    config = json.loads((source / "config.json").read_text())
    for name in ("latent_pooling", "prompt_suffix", "min_pixels", "max_pixels", "latent_norm", "run"):
        config.pop(name, None)
    config |= {"compress_strategy": "average", "stage": "stage1"}
    (source / "config.json").write_text(json.dumps(config))
    model = load_model(source)
    assert (model.K, model.config.latent_pooling, model.config.latent_norm) == (4, "strips", None)
    assert (model.config.min_pixels, model.config.max_pixels) == (784, 256 * 784)
    assert model.config.prompt_suffix == SUFFIX


# ---------------------------------------------------------------- rows of new tokens


def test_an_untied_head_gets_its_new_rows_too(untied, rows, tmp_path):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(untied / "base")
    model = load_model(untied / "base", K=4, pooling="grid")
    start = model.token_id["latent_pad"]
    names = ("latent_pad", "latent_start", "latent_end")
    assert [model.token_id[name] - start for name in names] == [0, 1, 2]
    tables = [qwen.get_input_embeddings().weight for qwen in (plain, model.qwen)]
    heads = [qwen.get_output_embeddings().weight for qwen in (plain, model.qwen)]
    assert not torch.equal(tables[1], heads[1])
    for old, new in (tables, heads):
        assert torch.equal(new[:start], old[:start]) and torch.equal(new[start + 3 :], old[start + 3 :])
        for row in range(start, start + 3):
            assert torch.allclose(new[row], old[:start].mean(dim=0), atol=1e-7)
            assert not torch.allclose(new[row], old[row], atol=1e-3)
    save_checkpoint(tmp_path, 1, model, {})
    assert torch.equal(outputs(load_model(tmp_path), rows), outputs(model, rows))


def test_new_rows_are_the_mean_of_those_before(tiny):
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny / "base")
    model = load_model(tiny / "base", K=4, pooling="grid")
    start, old = model.token_id["latent_pad"], plain.get_input_embeddings().weight
    new = model.qwen.get_input_embeddings().weight
    assert start + 3 <= len(old) == len(new)  # spare rows, as Qwen2.5-VL has them
    assert torch.allclose(new[start : start + 3], old[:start].mean(dim=0).expand(3, -1), atol=1e-7)
    assert torch.equal(new[:start], old[:start])
    assert new is model.qwen.lm_head.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_when_it_must(tiny, untied, tmp_path, tied):
    source = tiny if tied else untied
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(source / "base")
    tokenizer = AutoTokenizer.from_pretrained(source / "base")
    qwen.resize_token_embeddings(len(tokenizer))
    qwen.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    model = load_model(tmp_path / "full", K=4, pooling="grid")
    for new in (model.qwen.get_input_embeddings().weight, model.qwen.get_output_embeddings().weight):
        assert len(new) == len(tokenizer) + 3 == model.config.text_config.vocab_size
        assert torch.allclose(new[-3:], new[:-3].mean(dim=0).expand(3, -1), atol=1e-6)
    assert (model.qwen.lm_head.weight is model.qwen.get_input_embeddings().weight) is tied
    save_checkpoint(tmp_path / "run", 1, model, {})
    assert torch.equal(load_model(tmp_path / "run").qwen.lm_head.weight, model.qwen.lm_head.weight)


def test_trained_latent_rows_are_kept(tiny, tmp_path):
    """Rows that a stage has trained do not start again at the mean, not even those of a K = 0 stage."""
    for K in (4, 0):
        model = load_model(tiny / "base", K=K, pooling="grid")
        with torch.no_grad():
            model.qwen.get_input_embeddings().weight[model.token_id["latent_start"]] = 3.0
        save_checkpoint(tmp_path / str(K), 1, model, {})
        again = load_model(tmp_path / str(K), K=K, pooling="grid")
        assert again.qwen.get_input_embeddings().weight[model.token_id["latent_start"]].eq(3).all()
    fresh = load_model(tmp_path / "0", K=4, pooling="grid")  # a stage without imagery taught them nothing
    assert fresh.K == 4
    assert not fresh.qwen.get_input_embeddings().weight[model.token_id["latent_start"]].eq(3).any()


# ---------------------------------------------------------------- settings, and what is refused


def test_other_settings_than_the_checkpoints_are_refused(tiny, tmp_path):
    folder = save_checkpoint(tmp_path, 1, load_model(tiny / "base", K=4, pooling="grid"), {})
    refused(lambda: load_model(folder, K=8), str(folder), "K=4", "8")
    refused(lambda: load_model(folder, K=0), "K=4", "0")
    refused(lambda: load_model(folder, K=4, pooling="strips"), "POOLING=grid", "strips")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_start_id": 3}))
    refused(lambda: load_model(folder, K=4, pooling="grid"), "latent_start_id=3")


def test_a_plain_checkpoint_is_refused_where_nothing_says_k(tiny):
    refused(lambda: load_model(tiny / "base"), "latent_size")


def test_a_folder_that_is_no_checkpoint_is_refused(tiny, tmp_path):
    refused(lambda: load_model(tmp_path / "none", K=4), "none", "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    refused(lambda: load_model(tmp_path, K=4), "llama", "Qwen2.5-VL")


def test_missing_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    gone = next(name for name in tensors if "layers.1.mlp" in name)
    tensors.pop(gone)
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(tmp_path / "base", K=4, pooling="grid"), "lacks weights", "layers.1.mlp")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused(lambda: load_model(tmp_path / "base", K=4, pooling="grid"), "holds no weights", "base")


def test_the_instruction_comes_from_a_file(tiny, tmp_path):
    (tmp_path / "words").write_text("\nLook twice — then answer.", encoding="utf-8")
    model = load_model(tiny / "base", K=4, pooling="grid", suffix=f"@{tmp_path / 'words'}")
    assert model.config.prompt_suffix == "\nLook twice — then answer."
    refused(lambda: load_model(tiny / "base", K=4, suffix="@none"), "SUFFIX=@none", "no file")


def test_attention_is_pinned_and_weights_are_float32(tiny, model, tmp_path):
    assert model.config._attn_implementation == "sdpa"
    assert model.qwen.model.language_model.config._attn_implementation == "sdpa"
    assert model.qwen.model.visual.config._attn_implementation == "sdpa"
    qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny / "base").to(torch.bfloat16)
    shutil.copytree(tiny / "base", tmp_path / "half")
    qwen.save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half", K=4, pooling="grid")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


# ---------------------------------------------------------------- runs


def constants(**changes):
    return {"LR": 0.1, "SIZES": (1, 2), "STEPS": 5, **changes}


def test_a_run_goes_on_from_its_newest_checkpoint(tiny, tmp_path):
    """With the same values of what must stay; STEPS may grow, and the log ends where the checkpoint does."""
    model = load_model(tiny / "base", K=4, pooling="grid")
    run = open_run(tmp_path, "auto", constants(), ["LR", "SIZES"])
    assert (run.start, run.folder, run.entries) == (0, None, [])
    clear_run(run, unfinished=True, results="eval")
    for step in range(3):
        run.write({"step": step + 1})
        if step == 1:
            run.save(step + 1, model, None)
    (tmp_path / "eval").mkdir()

    again = open_run(tmp_path, "auto", constants(STEPS=7), ["LR", "SIZES"])
    assert (again.start, again.folder) == (2, tmp_path / "step_000002")
    assert again.entries == [{"step": 1}, {"step": 2}] and again.record == constants(STEPS=7)
    clear_run(again, unfinished=False, results="eval")
    assert (tmp_path / "eval").is_dir() and len(again.log.read_text().splitlines()) == 2
    clear_run(again, unfinished=True, results="eval")
    assert not (tmp_path / "eval").exists() and again.folder.is_dir()

    # a new run in the same folder finds nothing of the old one
    afresh = open_run(tmp_path, "never", constants(), ["LR", "SIZES"])
    assert afresh.start == 0 and afresh.record == constants()
    clear_run(afresh, unfinished=True, results="eval")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "log.jsonl"]
    assert afresh.log.read_text() == ""


def test_a_run_with_other_constants_is_refused(tiny, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    save_checkpoint(tmp_path, 2, model, constants())

    def open_with(kept="LR SIZES", **changes):
        return open_run(tmp_path, "auto", constants(**changes), kept.split())

    refused(lambda: open_with(LR=0.2), f"OUT={tmp_path}", "LR=0.1", "RESUME=never")
    refused(lambda: open_with(SIZES=(1, 3)), "SIZES=[1, 2]")
    refused(lambda: open_with("LR SIZES NEW", NEW="b"), "NEW=None")


def test_a_record_of_former_code_gets_todays_names(tiny, tmp_path):
    model = load_model(tiny / "base", K=4, pooling="grid")
    former = {"LR": 0.1, "W_ACC": 2.0, "W_FMT": 0.5, "TRAIN_VISION": False, "SUPERVISE": "all"}
    save_checkpoint(tmp_path, 2, model, former)
    today = {"LR": 0.1, "REWARD_WEIGHTS": {"acc": 2.0, "fmt": 0.5}}
    assert open_run(tmp_path, "auto", today, list(today)).record == today
    save_checkpoint(tmp_path, 3, model, {**former, "TRAIN_VISION": True})
    refused(lambda: open_run(tmp_path, "auto", today, list(today)), "TRAIN_VISION=True", "RESUME=never")
