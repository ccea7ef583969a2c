"""Image files as uint8 arrays: decoded and resized once, mapped into memory from then on."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from samlib.store.files import replacing, unreadable, write_json

if TYPE_CHECKING:
    import datasets


def square(image: Image.Image, side: int, border: bool = False) -> np.ndarray:
    """RGB pixels of a square image.

    Args:
        image: of any size and mode.
        side: of the square, in pixels. The shorter side is scaled to it, bicubically, and the middle is kept.
        border: an image that fits into the square is not enlarged but gets a black border.

    Returns:
        uint8 (3, side, side).

    Source: Radford et al. 2021 (CLIP), its preprocessing.
    Taught in: 03_models_and_tasks.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    if border and max(image.size) <= side:
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = canvas
    elif image.size != (side, side):
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def write(folder: Path, tables: Mapping[str, datasets.Dataset], size: int, border: bool, facts: dict[str, Any]) -> None:
    """Decode tables of images into a folder, all or nothing.

    Args:
        folder: to write: <split>.npy with the pixels, <split>.labels.npy, and facts.json.
        tables: by split, with columns `image` and `label`.
        size: largest side, in pixels; images that are all smaller are stored as large as the largest of them, since
            what enlarging would add is calculated faster than it is read. The first split decides.
        border: as for `square`; the side then is `size`.
        facts: JSON-able, stored with a `sha256` of pixels and labels for each split.

    Raises:
        ValueError: the disk has not enough room.
    """
    import datasets  # slow, and whoever only reads needs it not

    tables = {name: table.cast_column("image", datasets.Image(decode=False)) for name, table in tables.items()}
    with ThreadPoolExecutor() as pool:
        first, side = next(iter(tables.values())), size
        if not border:
            side = min(size, max(pool.map(lambda i: _shorter(first[i]["image"]), range(len(first)))))
        needed = sum(map(len, tables.values())) * 3 * side**2
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ValueError(f"{folder.parent} has {free / 1e9:.1f} GB left and the images need {needed / 1e9:.1f} GB")
        with replacing(folder) as scratch:
            scratch.mkdir()
            digests = {}
            for split, table in tables.items():
                title = f"reading {folder.name.split('-')[0]}, {split}"
                digests[split] = _write_split(scratch / f"{split}.npy", table, side, border, pool, title)
            write_json(scratch / "facts.json", facts | {"side": side, "sha256": digests})


def _write_split(
    path: Path, table: datasets.Dataset, side: int, border: bool, pool: ThreadPoolExecutor, title: str
) -> str:
    """Write pixels and labels of one split, and tell the SHA-256 of both. The map ends here: some systems rename no
    folder with a file that is mapped."""
    labels = np.asarray(table["label"], dtype=np.int64)
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, (len(table), 3, side, side))

    def put(i: int) -> None:
        image = table[i]["image"]
        try:
            pixels[i] = square(_open(image), side, border)
        except OSError as error:  # Pillow's errors are, too
            what = image["path"] or f"number {i} of {path.stem}"
            raise ValueError(f"image {what} cannot be read: {error}") from error

    for _ in tqdm(pool.map(put, range(len(table))), title, len(table), unit="image", delay=2):
        pass
    pixels.flush()
    np.save(path.with_suffix(".labels.npy"), labels)
    digest = hashlib.sha256(labels.tobytes())
    for at in range(0, len(table), 1024):
        digest.update(pixels[at : at + 1024].tobytes())
    return digest.hexdigest()


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """What `write` left of one split: images uint8 (N, 3, side, side), mapped into memory, and labels int64 (N,).

    Raises:
        ValueError: a file is damaged.
    """
    try:
        pixels = np.load(folder / f"{split}.npy", mmap_mode="c")  # a private map: the file cannot be changed
        return torch.from_numpy(pixels), torch.from_numpy(np.load(folder / f"{split}.labels.npy"))
    except (OSError, ValueError) as error:
        raise unreadable(folder) from error


def overlap(seen: Sequence[Tensor], held_out: Tensor, near: float = 0.99) -> tuple[int, int]:
    """How many held-out images have a twin among the seen ones.

    Args:
        seen: of each split that was used, such as training and validation, uint8 (N, 3, H, W).
        held_out: uint8 (M, 3, H, W).
        near: correlation of two thumbnails (grey, 16 x 16) from which they count as nearly equal, in (0, 1).

    Returns:
        Held-out images with an equal image among the seen ones, and those with a nearly equal one, which include them.

    Taught in: 03_models_and_tasks.
    """
    known = {hashlib.sha256(image.numpy().tobytes()).digest() for images in seen for image in images}
    exact = torch.tensor([hashlib.sha256(image.numpy().tobytes()).digest() in known for image in held_out])
    thumbnails = torch.cat([_thumbnails(images) for images in seen])
    best = torch.cat([(part @ thumbnails.T).amax(1) for part in _thumbnails(held_out).split(256)])
    return int(exact.sum()), int((exact | (best >= near)).sum())


def _thumbnails(images: Tensor) -> Tensor:
    """Grey images of 16 x 16 pixels, without mean and of unit length: (N, 256)."""
    parts = []
    for part in images.split(256):
        grey = torch.nn.functional.interpolate(part.float().mean(1, keepdim=True), (16, 16), mode="area").flatten(1)
        parts.append(torch.nn.functional.normalize(grey - grey.mean(1, keepdim=True), dim=1))
    return torch.cat(parts)


def _shorter(image: dict[str, Any]) -> int:
    """Its shorter side in pixels, 0 if it cannot be read, which is told later."""
    try:
        return min(_open(image).size)
    except OSError:
        return 0


def _open(image: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
