"""The device a run uses."""

from __future__ import annotations

from samlib.notebook.parameters import PARAMETERS


def _fast_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 matrices natively; elsewhere autocast would be slower than fp32."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def find_device(wanted: str) -> str:
    """The device that is wanted, or what "auto" stands for here.

    Raises:
        ValueError: no such device.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ValueError(f"device must be {PARAMETERS['device'][0]}, not {wanted!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {wanted!r} is not available here: use 'auto' or 'cpu'")
    return wanted
