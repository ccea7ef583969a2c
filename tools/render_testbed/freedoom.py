"""Read Freedoom's WAD out of its Debian package: palette, wall textures, sprites and floors."""

import io
import lzma
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def wad_of(package: Path) -> bytes:
    """Return freedoom2.wad from a Debian package."""
    return _file_of(package, "/freedoom2.wad")


def copyright_of(package: Path) -> str:
    """Return the copyright notice of a Debian package."""
    return _file_of(package, "/copyright").decode().strip()


def _file_of(package: Path, ending: str) -> bytes:
    """Return a file of a Debian package, an `ar` archive that holds data.tar.xz."""
    data = package.read_bytes()
    position = 8  # after the archive's magic "!<arch>\n"
    while position < len(data):
        name = data[position : position + 16].decode().strip()
        size = int(data[position + 48 : position + 58])
        position += 60
        if name.startswith("data.tar.xz"):
            archive = lzma.decompress(data[position : position + size])
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                member = next(m for m in tar.getmembers() if m.name.endswith(ending))
                content = tar.extractfile(member)
                assert content is not None
                return content.read()
        position += size + size % 2
    raise ValueError(f"{package.name} holds no data.tar.xz; a Debian package of Freedoom is expected")


@dataclass(frozen=True)
class Wad:
    """The lumps of a WAD file in their order, with repeated names kept."""

    names: list[str]
    lumps: list[bytes]

    def lump(self, name: str) -> bytes:
        """Return the last lump of that name, as the game does."""
        return self.lumps[len(self.names) - 1 - self.names[::-1].index(name)]

    def between(self, start: str, end: str) -> dict[str, bytes]:
        """Return the lumps between two markers."""
        first, last = self.names.index(start), self.names.index(end)
        return dict(zip(self.names[first + 1 : last], self.lumps[first + 1 : last], strict=True))


def read_wad(data: bytes) -> Wad:
    """Split a WAD file into its lumps."""
    count, directory = struct.unpack_from("<ii", data, 4)
    names, lumps = [], []
    for entry in range(count):
        start, size, name = struct.unpack_from("<ii8s", data, directory + 16 * entry)
        names.append(name.split(b"\0")[0].decode().upper())
        lumps.append(data[start : start + size])
    return Wad(names, lumps)


def palette(wad: Wad) -> Pixels:
    """Return the first palette: (256, 3) RGB."""
    return np.frombuffer(wad.lump("PLAYPAL")[:768], np.uint8).reshape(256, 3)


def picture(data: bytes) -> tuple[Pixels, NDArray[np.bool_]]:
    """Decode a picture of vertical posts to colour indices (H, W) and the mask of its drawn pixels (H, W)."""
    width, height = struct.unpack_from("<HH", data, 0)
    indices = np.zeros((height, width), np.uint8)
    drawn = np.zeros((height, width), bool)
    for column, start in enumerate(struct.unpack_from(f"<{width}I", data, 8)):
        position = start
        while data[position] != 255:
            top, length = data[position], data[position + 1]
            post = np.frombuffer(data, np.uint8, length, position + 3)[: max(0, height - top)]
            indices[top : top + len(post), column] = post
            drawn[top : top + len(post), column] = True
            position += length + 4
    return indices, drawn


def textures(wad: Wad) -> dict[str, Pixels]:
    """Compose every fully drawn wall texture from its patches: name -> (H, W, 3) RGB."""
    colours = palette(wad)
    table = wad.lump("PNAMES")
    patch_names = [
        table[4 + 8 * i : 12 + 8 * i].split(b"\0")[0].decode().upper()
        for i in range(struct.unpack_from("<i", table)[0])
    ]
    lump = wad.lump("TEXTURE1")
    result = {}
    for start in struct.unpack_from(f"<{struct.unpack_from('<i', lump)[0]}i", lump, 4):
        name, width, height, patches = struct.unpack_from("<8s4xHH4xH", lump, start)
        canvas = np.zeros((height, width), np.uint8)
        covered = np.zeros((height, width), bool)
        for i in range(patches):
            x, y, number = struct.unpack_from("<hhH", lump, start + 22 + 10 * i)
            pixels, drawn = picture(wad.lump(patch_names[number]))
            top, left = max(0, y), max(0, x)
            bottom, right = min(height, y + pixels.shape[0]), min(width, x + pixels.shape[1])
            if bottom <= top or right <= left:
                continue
            part = drawn[top - y : bottom - y, left - x : right - x]
            canvas[top:bottom, left:right][part] = pixels[top - y : bottom - y, left - x : right - x][part]
            covered[top:bottom, left:right] |= part
        if covered.all():
            result[name.split(b"\0")[0].decode().upper()] = colours[canvas]
    return result


def floors(wad: Wad) -> dict[str, Pixels]:
    """Return the 64 x 64 floor and ceiling drawings: name -> (64, 64, 3) RGB."""
    colours = palette(wad)
    flats = wad.between("F_START", "F_END")
    return {
        name: colours[np.frombuffer(data, np.uint8).reshape(64, 64)]
        for name, data in flats.items()
        if len(data) == 4096
    }


def sprites(wad: Wad) -> dict[str, Pixels]:
    """Return the sprites: name -> (H, W, 4) RGBA."""
    colours = palette(wad)
    result = {}
    for name, data in wad.between("S_START", "S_END").items():
        if data:
            indices, drawn = picture(data)
            result[name] = np.dstack([colours[indices], np.where(drawn, 255, 0).astype(np.uint8)])
    return result
