"""Text to token ids, such that only the prompt's own special tokens are special."""

import re

HIDDEN = "<\0|"  # in the place of "<|" in words of a user; rows with NUL are refused, so it is in no text


def as_text(words):
    """Words of a user, in which `<|im_end|>` is six letters and some signs: hidden from `tokenize`."""
    return words.replace("<|", HIDDEN)


def tokenize(tokenizer, text):
    """Text -> ids: special tokens are single ids, but where `as_text` hid them they are text.

    "<|im_end|>" -> [2]; as_text("<|im_end|>") -> the ids of "<", "|", "im", ...
    """
    if HIDDEN not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # A fast tokenizer cuts the text at its special tokens first, so the pieces between them are its own.
    added = tokenizer.added_tokens_decoder.values()
    specials = "|".join(re.escape(token.content) for token in added if token.special)
    ids = []
    for piece in re.split(f"({specials})", text):
        words = piece.replace(HIDDEN, "<|")
        is_text = words != piece or not re.fullmatch(specials, piece)
        if piece:
            ids += tokenizer(words, add_special_tokens=False, split_special_tokens=is_text)["input_ids"]
    return ids
