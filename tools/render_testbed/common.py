"""Helpers that the rendering scripts share: packed PNGs, parquet splits, duplicates, synthetic captures."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as pillow
from PIL import ImageFilter

SIZE = 32  # every image of the testbed is SIZE x SIZE pixels

Pixels = NDArray[np.uint8]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _encode_grey(array: Pixels, levels: int) -> bytes:
    depth = next(bits for bits in (1, 2, 4, 8) if levels <= 2**bits)
    steps = np.round(array / 255 * (levels - 1)).astype(np.uint8)
    values = np.round(steps / (levels - 1) * (2**depth - 1)).astype(np.uint8)
    height, width = values.shape
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(height, width * depth)
    rows = np.packbits(bits, axis=1)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter type 0 before each row
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def encode_png(array: Pixels, colours: int | None = None, levels: int | None = None) -> bytes:
    """Encode one image as a small PNG: greyscale with few levels, or a palette with few colours.

    Args:
        array: (H, W) greyscale or (H, W, 3) RGB, uint8.
        colours: size of the adaptive palette of an RGB image, 2 to 256; None keeps every colour.
        levels: number of grey levels of a greyscale image, 2 to 256; None keeps all 256.
    """
    if array.ndim == 2:
        return _encode_grey(array, levels or 256)
    image = pillow.fromarray(array, "RGB")
    if colours is not None:
        image = image.quantize(colours, method=pillow.Quantize.MEDIANCUT, dither=pillow.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def decode_png(data: bytes) -> Pixels:
    """Decode a PNG to (H, W, 3) RGB, uint8."""
    return np.asarray(pillow.open(io.BytesIO(data)).convert("RGB"))


def write_split(folder: Path, split: str, rows: Sequence[Mapping[str, Any]], classes: Sequence[str] | None) -> Path:
    """Write rows as `<split>-00000-of-00001.parquet`, in the layout of the datasets library.

    Args:
        folder: the task's folder, created if missing.
        split: "train", "validation" or "test".
        rows: mappings with `image` (PNG bytes), `group` (str) and `label` (int), or without classes
            `caption` (str).
        classes: names of the labels; None writes a `caption` column in place of `label`.
    """
    features = Features(
        {
            "image": Image(),
            **({"label": ClassLabel(names=list(classes))} if classes else {"caption": Value("string")}),
            "group": Value("string"),
        }
    )
    records = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    Dataset.from_list(records, features=features).to_parquet(str(path))
    return path


def thumbnails(images: Sequence[Pixels]) -> NDArray[np.float32]:
    """Greyscale 16 x 16 thumbnails of images, one flat row each: (N, 256), in [0, 255]."""
    small = [pillow.fromarray(image).convert("L").resize((16, 16), pillow.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() for image in small])


def near_duplicates(
    first: NDArray[np.float32], second: NDArray[np.float32], threshold: float = 3.0
) -> NDArray[np.bool_]:
    """Mark the rows of `first` whose mean absolute difference to some row of `second` is below the threshold.

    Args:
        first: (N, 256) thumbnails.
        second: (M, 256) thumbnails.
        threshold: in grey values, [0, 255].
    """
    return np.array([bool((np.abs(second - row).mean(axis=1) < threshold).any()) for row in first], dtype=bool)


def _homography(corners: NDArray[np.float64], size: int) -> list[float]:
    """Coefficients for Pillow that send the output's `corners` to the corners of a size x size square."""
    square = [(0, 0), (size, 0), (size, size), (0, size)]
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, square, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(value) for value in np.linalg.solve(np.array(rows, float), np.array(values, float))]


def photograph(image: pillow.Image, rng: np.random.Generator, strength: float = 1.0) -> Pixels:
    """Synthetic capture: random perspective, background colour, light gradient and blur, without noise.

    Args:
        image: any mode and size; transparent parts show the background.
        rng: source of every random choice.
        strength: scales the distortion, the light and the blur; 1 is the testbed's.

    Returns:
        (32, 32, 3) RGB, uint8.
    """
    side = 4 * SIZE
    background = tuple(int(value) for value in rng.integers(20, 236, 3))
    drawing = image.convert("RGBA")
    scale = side / max(drawing.size)
    drawing = drawing.resize((max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))))
    canvas = pillow.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))

    angle = np.deg2rad(rng.uniform(-20, 20) * strength)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    half = side / 2 * rng.uniform(0.65, 1.0)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float) * half
    corners += rng.uniform(-0.3, 0.3, (4, 2)) * half * strength
    corners = corners @ turn.T + side / 2 + rng.uniform(-0.1, 0.1, 2) * side * strength
    warped = canvas.convert("RGB").transform(
        (side, side),
        pillow.Transform.PERSPECTIVE,
        _homography(corners, side),
        pillow.Resampling.BICUBIC,
        fillcolor=background,
    )
    warped = warped.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, 4.0) * strength))
    small = np.asarray(warped.resize((SIZE, SIZE), pillow.Resampling.BOX), np.float32)

    direction = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    slope = rng.uniform(0.0, 0.35) * strength * (np.cos(direction) * x + np.sin(direction) * y)
    light = rng.uniform(1 - 0.35 * strength, 1 + 0.1 * strength) * (1 + slope)
    cast = 1 + rng.uniform(-0.12, 0.12, 3) * strength
    lit = small * light[..., None] * cast
    return np.asarray(np.clip(np.round(lit), 0, 255), np.uint8)
