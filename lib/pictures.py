"""Image files of any encoding to pixels, as a viewer shows them: the one reader, without torch."""

import math

import numpy as np
from PIL import ExifTags, Image

from lib.command_line import exit_with

# PIL runs another program for some other formats
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")
TURNS = {  # rotation note of a photograph -> how a viewer turns it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGEST = 80_000_000  # pixels of an image; a small file may claim to hold many more


class BadImage(ValueError):
    """A file that cannot be read as an image; the text says why."""


def read_image(path, background=(255, 255, 255)):
    """An image file -> PIL image in RGB as a viewer shows it; BadImage if it cannot be read.

    It is turned as its rotation note says, what is transparent shows the background, and 16 bits a channel
    become 8.
    """
    with open_header(path) as image:
        try:
            turn = TURNS.get(read_orientation(image))
            image = image if turn is None else image.transpose(turn)
            if image.mode.startswith("I"):
                numbers = np.asarray(image)
                # what is not 0 stays so: a mask of the numbers 0 and 1 is not an empty one
                grey = np.maximum(numbers // 257, numbers > 0)
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                behind = Image.new("RGBA", image.size, (*background, 255))
                image = Image.alpha_composite(behind, image)
            return image.convert("RGB")
        except Exception as error:  # PIL raises many kinds
            raise BadImage(f"{path} is not a readable image") from error


def open_header(path):
    """An image file -> PIL image that is not decoded yet; BadImage if it is none, is too large or unusual."""
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImage(f"{path} claims to be an image of more than {LARGEST} pixels") from error
    except Exception as error:
        raise BadImage(f"{path} is not a readable image") from error
    if math.prod(image.size) > LARGEST:
        raise BadImage(f"{path} claims to be an image of more than {LARGEST} pixels")
    if min(image.size) < 1:
        raise BadImage(f"{path} is an image without pixels")
    if image.mode == "F":
        raise BadImage(f"{path} holds floating-point numbers, which have no one look")
    if image.mode == "I" and image.format == "TIFF":
        raise BadImage(f"{path} holds numbers of 32 bits, which have no one look")
    return image


def read_orientation(image):
    """The rotation note of an image, 1 (as it is) to 8; 1 if it has none that can be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken note is none, as for a viewer
        return 1


def open_image(path, source):
    """An image file -> PIL image in RGB; exits on a bad one."""
    try:
        return read_image(path)
    except BadImage as error:
        exit_with(f"{source}: {error}; make it again or drop the row.")
