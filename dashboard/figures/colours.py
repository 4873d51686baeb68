"""Perceptually uniform colour maps, readable with colour blindness.

Equal steps of value are equal steps of lightness. A map interpolates a few anchor colours in the
OKLab colour space, with linear lightness.
"""

from collections.abc import Sequence

import numpy as np

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)

Scale = list[tuple[float, str]]


def oklab(colour: str) -> np.ndarray:
    """Return (lightness, a, b) in OKLab of `#rrggbb`.

    sRGB is decoded to linear light, mixed to cone responses, whose cube roots give OKLab
    (Ottosson 2020).
    """
    s = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    return _TO_LAB @ np.cbrt(_TO_LMS @ linear)


def to_hex(lab: np.ndarray) -> str:
    """Return the nearest `#rrggbb` of an OKLab colour."""
    linear = np.clip(np.linalg.inv(_TO_LMS) @ (np.linalg.inv(_TO_LAB) @ lab) ** 3, 0, 1)
    s = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(v * 255):02x}" for v in s)


def sequential(anchors: Sequence[str], stops: int = 17) -> Scale:
    """Return a colour map through the anchors with linear lightness."""
    labs = np.array([oklab(a) for a in anchors])
    light = np.linspace(labs[0, 0], labs[-1, 0], stops)
    rising = labs[:, 0] if labs[0, 0] < labs[-1, 0] else labs[::-1, 0]
    order = slice(None) if labs[0, 0] < labs[-1, 0] else slice(None, None, -1)
    a, b = (np.interp(light, rising, labs[order, i]) for i in (1, 2))
    return [
        (i / (stops - 1), to_hex(np.array(c))) for i, c in enumerate(zip(light, a, b, strict=True))
    ]


def diverging(low: Sequence[str], high: Sequence[str], stops: int = 17) -> Scale:
    """Return two colour maps joined at a common middle, the first anchor of both."""
    left = [(0.5 - p / 2, c) for p, c in reversed(sequential(low, stops))]
    right = [(0.5 + p / 2, c) for p, c in sequential(high, stops)]
    return left + right[1:]


def hues(count: int, dark: bool) -> list[str]:
    """Return `count` colours of equal lightness, as different as possible; they repeat after 12."""
    light, chroma, most = (0.76, 0.125, 12) if dark else (0.58, 0.135, 12)
    angles = 2 * np.pi * (np.arange(min(count, most)) / min(count, most) + 0.08)
    ring = [to_hex(np.array([light, chroma * np.cos(a), chroma * np.sin(a)])) for a in angles]
    return [ring[i % len(ring)] for i in range(count)]
