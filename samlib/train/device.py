"""The device a run uses."""

from __future__ import annotations

import re

DEVICES = "'auto', 'cpu', 'cuda' or 'cuda:N'"  # what may be asked for


def check_device(wanted: str) -> None:
    """Whether it is the name of a device; that needs no torch.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise ValueError(f"device must be {DEVICES}, not {wanted!r}")


def find_device(wanted: str) -> str:
    """The device that is wanted, or what "auto" stands for here.

    Raises:
        ValueError: no such device.
    """
    check_device(wanted)
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted!r} is not available here: use 'auto' or 'cpu'")
    return wanted


def _fast_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices natively; elsewhere autocast would be slower than fp32."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
