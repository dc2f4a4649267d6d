"""Reading a Qwen2.5-VL folder: whatever is wrong with it becomes one sentence that says what to do."""

import codecs
import json
import math
import re
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AddedToken, AutoTokenizer
from transformers import Qwen2_5_VLForConditionalGeneration as QwenVL

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from lib.command_line import LARGEST, require
from lib.files import read_json
from lib.rows import NO_TEXT

EXTRA = "extra.safetensors"  # weights that a Thinker was given beside those of the Qwen2.5-VL
MOMENTS = "optimizer.safetensors"
MOST_LATENTS = 4096  # per image, as K of dift.py
IMAGERIES = ("latents", "markers", "pause")  # as IMAGERY of dift.py
LFS = b"version https://git-lfs"  # begins a file that git has not fetched yet
PREFIXES = {  # names of weights begin so after these were saved as they were
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "a LoRA adapter",
}
# a tokenizer of Qwen2.5-VL knows all of these
SPECIAL_TOKENS = (
    "<|im_start|> <|im_end|> <|endoftext|> <|vision_start|> <|vision_end|> <|video_pad|> <|image_pad|>"
).split()


# ---------------------------------------------------------------- checkpoints of a run


def step_of(folder):
    """The step of a checkpoint by its folder's name: step_000500 -> 500."""
    number = Path(folder).name.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def list_checkpoints(out):
    """The checkpoints step_* of a run's folder, the newest last."""
    folders = [file.parent for file in Path(out).glob("step_*/config.json")]
    return sorted(folders, key=step_of)


def remedy_for(folder):
    """What to do about a damaged checkpoint: take the one before it, if there is one."""
    folder = Path(folder)
    before = []
    if folder.name.startswith("step_"):
        before = [other for other in list_checkpoints(folder.parent) if step_of(other) < step_of(folder)]
    if before:
        return f"delete {folder.name} to go on from {before[-1]}, the checkpoint before it"
    return "download or train it again"


# ---------------------------------------------------------------- files of tensors


def is_pointer(file):
    """Whether a file is what git keeps in the place of a large one that it has not fetched."""
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return stream.read(len(LFS)) == LFS


def open_error(file):
    """What is wrong with a safetensors file, "" if its header and its length are right."""
    try:
        with safe_open(file, "pt"):
            return ""
    except (SafetensorError, ValueError) as error:
        return f"it is cut or damaged: {first_line(error)}"


def first_line(error):
    """The first line of an error's text, at most 80 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:80].rstrip(".")


def read_tensors(file):
    """The tensors of a safetensors file; exits if it is damaged, or holds NaN or infinity."""
    wrong = open_error(file)
    remedy = remedy_for(Path(file).parent)
    require(not wrong, f"{file} cannot be read ({wrong}); {remedy}.")
    tensors = load_file(file)
    for name, x in tensors.items():
        require(x.isfinite().all(), f"{file}: {name} holds NaN or infinity; {remedy}.")
    return tensors


def weight_names(path):
    """The names of the weights in a folder's safetensors -> {name: file}; exits if a file is not whole.

    {} for a folder of *.bin files, which torch reads.
    """
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        shards = read_json(index, dict, remedy_for(path)).get("weight_map")
        is_map = isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())
        require(is_map, f"{index} is damaged (it holds no weight_map); {remedy_for(path)}.")
        files = [path / name for name in sorted(set(shards.values()))]
        lacking = [file.name for file in files if not file.is_file()]
        require(not lacking, f"{path} lacks weights: there is no {lacking[:1]}; {remedy_for(path)}.")
    names = {}
    for file in files:
        if not file.is_file():
            continue
        wrong = open_error(file)
        require(not wrong, f"{file} cannot be read ({wrong}); {remedy_for(path)}.")
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                kind = tensors.get_slice(name).get_dtype()
                is_float = kind in ("F64", "F32", "BF16", "F16")
                quantised = f"{file}: {name} holds {kind} numbers, as quantised weights do"
                require(is_float, f"{quantised}; choose the original in bf16, which can be trained.")
                names[name] = file
    return names


# ---------------------------------------------------------------- what is no Qwen2.5-VL


def check_folder(path):
    """Ends the program on a folder that cannot be loaded -> {name of a weight: its file}."""
    remedy = remedy_for(path)
    file = path / "config.json"
    config = read_json(file, dict, remedy)
    has_mark = file.read_bytes().startswith(codecs.BOM_UTF8)
    require(not has_mark, f"{file} begins with a byte-order mark; save it as UTF-8 without one.")
    kind = config.get("model_type")
    require(kind == "qwen2_5_vl", f"{path}/config.json says {kind}; this code reads Qwen2.5-VL checkpoints.")
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    whole = "choose the original in bf16, which can be trained"
    require(not quantised, f"{path} holds quantised weights ({method}); {whole}.")

    own = (EXTRA, MOMENTS)
    files = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin")]
    has_weights = any(file.name not in own for file in files)
    pointers = [file for file in files if is_pointer(file)]
    require(not pointers, f"{path} holds pointers of git in the place of weights; run `git lfs pull`.")
    is_adapter = (path / "adapter_config.json").is_file()
    require(not is_adapter, f"{path} is a LoRA adapter; merge it into its base model, and choose that.")
    require(has_weights, f"{path} holds no weights (*.safetensors or *.bin); download or train it again.")
    names = weight_names(path)
    for prefix, origin in PREFIXES.items():
        found = [name for name in names if name.startswith(prefix)]
        saved = f"{path}: names of weights begin with '{prefix}', as {origin} has them"
        require(not found, f"{saved}; save the model inside, without it.")
    if names:
        check_sizes(path, config, names)
    return names


def check_sizes(path, config, names):
    """Ends the program if config.json gives other sizes than the weights have, before it allocates them."""
    parts = {}
    for part in ("text_config", "vision_config"):
        own = config.get(part)
        # the first checkpoints of Qwen2.5-VL have the sizes of the text part at the top
        parts[part] = config if part == "text_config" and part not in config else own
        is_object = isinstance(parts[part], dict)
        require(is_object, f"{path}/config.json: {part} is no object; {remedy_for(path)}.")
    tables = [name for name in names if name.endswith("embed_tokens.weight")]
    require(tables, f"{path} lacks weights of a Qwen2.5-VL, such as embed_tokens; {remedy_for(path)}.")
    with safe_open(names[tables[0]], "pt") as tensors:
        rows, width = tensors.get_slice(tables[0]).get_shape()
    text = parts["text_config"]
    sizes = {
        "vocab_size": (text, rows),
        "hidden_size": (text, width),
        "num_hidden_layers": (text, count_blocks(names, r"(?<!visual)\.layers\.(\d+)\.")),
        "depth": (parts["vision_config"], count_blocks(names, r"visual\.blocks\.(\d+)\.")),
    }
    for name, (part, stored) in sizes.items():
        # for a size that is not there the library takes one of its own, of a network of 72 billion weights
        libraries = Qwen2_5_VLVisionConfig() if name == "depth" else Qwen2_5_VLTextConfig()
        says = f"says {name}={repr(part[name])[:40]}" if name in part else f"does not say {name}"
        differs = f"{path}/config.json {says}, but the weights have {stored}"
        value = part.get(name, getattr(libraries, name))
        require(value == stored, f"{differs}; {remedy_for(path)}.")


def count_blocks(names, pattern):
    """How many numbered blocks the names of weights have: "...layers.35..." makes 36."""
    found = [re.search(pattern, name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def load_network(path):
    """A Qwen2.5-VL folder, of any key layout, tied or not -> the network; fp32 weights, sdpa attention."""
    names = check_folder(path)
    remedy = remedy_for(path)
    transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        qwen, info = QwenVL.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except Exception as error:  # the library's, of many kinds: each says that the folder cannot be used
        if isinstance(error, OSError) and error.errno:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        require(False, f"{path}: the weights or config.json do not fit this network ({reason}); {remedy}.")
    finally:
        transformers.utils.logging.set_verbosity(verbosity)

    missing = sorted(info["missing_keys"])
    require(not missing, f"{path} lacks weights of a Qwen2.5-VL, such as {missing[:1]}; {remedy}.")
    unused = sorted(name for name in info["unexpected_keys"] if not name.endswith("inv_freq"))
    fits = f"{path}: config.json has no place for weights that are there, such as {unused[:1]}"
    require(not unused, f"{fits}; {remedy}.")
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    require(not misshapen, f"{path}: config.json gives another shape than {misshapen[:1]} has; {remedy}.")
    check_head(path, qwen, names)
    check_rope(path, qwen.config.text_config)
    for name, x in qwen.named_parameters():
        require(x.isfinite().all(), f"{path}: weights {name} hold NaN or infinity; {remedy}.")
    check_output(path, qwen)
    return qwen


@torch.no_grad()
def check_output(path, qwen):
    """Ends the program unless the network gives finite numbers for two tokens.

    Weights that are too large are found here: a NaN would be read as the first token of the vocabulary.
    """
    try:
        hidden = qwen.model.language_model(torch.tensor([[0, 1]]), use_cache=False).last_hidden_state
        is_finite = bool(qwen.lm_head(hidden).isfinite().all())
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason = f"config.json describes a network that cannot run ({first_line(error)})"
        require(False, f"{path}: {reason}; {remedy_for(path)}.")
    broken = f"{path}: the network's output is NaN or infinite, so weights or config.json are damaged"
    require(is_finite, f"{broken}; {remedy_for(path)}.")


def check_head(path, qwen, names):
    """Ends the program if config.json ties the head to the embeddings, but the file has a head of its own.

    Then the flags of the network and of its text part are made to say what the network does.
    """
    head, table = qwen.get_output_embeddings().weight, qwen.get_input_embeddings().weight
    is_tied = head is table
    stored = [name for name in names if name.endswith("lm_head.weight")]
    if is_tied and stored:
        with safe_open(names[stored[0]], "pt") as tensors:
            own = tensors.get_tensor(stored[0]).to(table.dtype)
        same = own.shape == table.shape and torch.equal(own, table)
        says = f"{path}/config.json says tie_word_embeddings, but the weights have a head of their own"
        require(same, f"{says}; set it to false there.")
    qwen.config.tie_word_embeddings = is_tied
    qwen.config.text_config.tie_word_embeddings = is_tied


def check_rope(path, text):
    """Ends the program unless config.json divides each head's rotations among time, height and width."""
    rope = getattr(text, "rope_parameters", None) or {}
    section = rope.get("mrope_section")
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    is_section = isinstance(section, list) and all(type(size) is int for size in section)
    is_right = is_section and len(section) == 3 and 2 * sum(section) == head
    wrong = f"{path}/config.json: mrope_section is {str(section)[:40]}, but must be three sizes"
    require(is_right, f"{wrong} that add up to {head // 2}; {remedy_for(path)}.")
    numbers = {"rope_theta": rope.get("rope_theta"), "rms_norm_eps": text.rms_norm_eps}
    for name, value in numbers.items():
        is_right = type(value) in (int, float) and 0 < value <= LARGEST
        wrong = f"{path}/config.json: {name} is {str(value)[:40]}, but must be a number above 0"
        require(is_right, f"{wrong}; {remedy_for(path)}.")


def load_tokenizer(path, new_tokens):
    """The folder's tokenizer, with the new special tokens if it has none of them yet."""
    remedy = remedy_for(path)
    files = ("tokenizer.json", "vocab.json")
    has_files = any((path / name).is_file() for name in files)
    origin = "copy tokenizer.json and tokenizer_config.json from the model that it was made of"
    require(has_files, f"{path} has no tokenizer (tokenizer.json); {origin}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the library's, of many kinds: each says that the files cannot be used
        if isinstance(error, OSError) and error.errno:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        require(False, f"{path}: its tokenizer cannot be read ({reason}); {remedy}.")
    known = tokenizer.get_vocab()
    unknown = [token for token in SPECIAL_TOKENS if token not in known]
    require(not unknown, f"{path}: its tokenizer does not know {unknown[:1]}; {origin}.")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in new_tokens])
    return tokenizer


# ---------------------------------------------------------------- what config.json holds of ours


def check_settings(path, config):
    """Ends the program if a setting of ours in config.json has a value that cannot be meant."""

    def whole(value):
        return type(value) is int and value >= 0

    def latents(value):
        return whole(value) and value <= MOST_LATENTS

    def is_text(value):
        return isinstance(value, str) and not NO_TEXT.search(value)

    def number(value):
        return type(value) in (int, float) and math.isfinite(value) and value > 0

    rules = {
        "latent_size": (latents, f"a whole number, 0 to {MOST_LATENTS}"),
        "imagery": (lambda value: value in IMAGERIES, " or ".join(IMAGERIES)),
        "latent_token_id": (whole, "the number of a token"),
        "latent_start_id": (whole, "the number of a token"),
        "latent_end_id": (whole, "the number of a token"),
        "min_pixels": (number, "a number above 0"),
        "max_pixels": (number, "a number above 0"),
        "seconds_per_pair": (number, "a number above 0"),
        "latent_norm": (number, "a number above 0"),
        "prompt_suffix": (is_text, "text without NUL or half of a character"),
    }
    for name, (is_right, description) in rules.items():
        value = getattr(config, name, None)
        wrong = f"{path}/config.json: {name} is {json.dumps(value, default=str)[:80]}"
        require(value is None or is_right(value), f"{wrong}, but must be {description}; correct it there.")


def check_pixels(path, config):
    """Ends the program if a frame would need more pixels than it may have."""
    low, high = config.min_pixels, config.max_pixels
    require(low <= high, f"{path}: MIN_PIXELS={low} is above MAX_PIXELS={high}; lower it.")


def knows_latents(config, K, imagery):
    """Whether a checkpoint's latent tokens were trained, for a requested K and IMAGERY (None: any).

    A base that never imagined (latent_size 0) is new to them, unless it is asked for no imagery. One that was
    trained with IMAGERY=markers has latent_size 0 as well, and knows its delimiters.
    """
    stored = getattr(config, "latent_size", None)
    if stored == 0 and getattr(config, "imagery", "") != "markers":
        return not K and imagery != "markers"
    return stored is not None


def check_latent_config(config, latent_ids, path, K, pooling):
    """Ends the program if the checkpoint's K, pooling or latent ids are not the requested ones."""
    config.latent_pooling = getattr(config, "latent_pooling", "strips")  # release: contiguous groups
    requested = {"K": (K, config.latent_size), "POOLING": (pooling, config.latent_pooling)}
    for name, token in latent_ids.items():
        requested[name] = (token, getattr(config, name, token))
    for name, (value, stored) in requested.items():
        agrees = value is None or value == stored
        trained = f"{path} was trained with {name}={stored}, but {name}={value} was requested"
        remedy = f"set {name}={stored} or choose another MODEL" if name.isupper() else "choose another MODEL"
        require(agrees, f"{trained}; {remedy}.")


def check_vocabulary(path, qwen, tokenizer):
    """Ends the program if a trained checkpoint has fewer rows of embeddings than its tokenizer has tokens."""
    rows = qwen.get_input_embeddings().num_embeddings
    tokens = len(tokenizer)
    too_few = f"{path}: its tokenizer has {tokens} tokens, but its weights have {rows} rows"
    require(tokens <= rows, f"{too_few}; copy the tokenizer that it was trained with.")


def read_suffix(suffix):
    """The words of SUFFIX; those of a file where it is @file; None where it is empty."""
    if not suffix:
        return None
    if not suffix.startswith("@"):
        return suffix
    file = Path(suffix[1:])
    require(file.is_file(), f"SUFFIX={suffix} names no file; write the words, or @ and a path.")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        require(False, f"SUFFIX={suffix} is no text in UTF-8; write the words, or @ and a text file.")
