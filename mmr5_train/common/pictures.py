"""A page picture as a person sees it. Every stage, the server and the reports use `as_seen`."""

from __future__ import annotations

import numpy as np
from PIL import ExifTags, Image, ImageOps

GREY_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
"""Pillow's modes of grey values beyond 8 bits. Its own conversion to RGB cuts off everything above 255."""

TURNED = (5, 6, 7, 8)
"""The EXIF orientations that exchange width and height."""


def as_seen(image: Image.Image) -> Image.Image:
    """The picture upright, in RGB, on white where it is transparent.

    Grey values of 16 bits become 8 bits. Floating-point values must lie in 0 to 1, or in 0 to 255. Raises
    `ValueError`, which says what was found, for other values.
    """
    image = upright(image)
    if image.mode in GREY_MODES:
        image = _grey_of_8_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer)
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image) if orientation(image) != 1 else image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1: as stored."""
    if image.format == "PNG" and "exif" not in image.info and image.fp is not None:  # type: ignore[attr-defined]
        return 1  # Pillow would decode the whole file to look behind the pixels
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(2, 9) else 1


def seen_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the picture upright. It reads the header only."""
    width, height = image.size
    return (height, width) if orientation(image) in TURNED else (width, height)


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
            raise ValueError(f"its grey values are from {low:g} to {high:g}, expected 0 to 1 or 0 to 255")
        scale = 255.0 if high <= 1 else 1.0
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"its grey values are from {low:g} to {high:g}, expected 0 to 65,535")
        # Mode I also holds 8-bit values, which some formats store in 32 bits.
        scale = 1.0 if image.mode == "I" and high <= 255 else 255 / 65535
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))
