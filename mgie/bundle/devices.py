"""Device and dtype by name."""

import torch

from mgie.config import check_choice
from mgie.errors import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str = "auto") -> torch.device:
    """The device named, or with `auto` the first of CUDA, MPS, CPU that is there.

    Raises:
        ConfigError: It is no device, or not on this machine.
    """
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    unknown = ConfigError(f"device is {device!r}; it must be auto, cpu, mps, cuda or cuda:N", param="device")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if resolved.type not in ("cpu", "mps", "cuda"):
        raise unknown
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {device!r}; this machine has {torch.cuda.device_count()} CUDA devices", param="device"
        )
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device is {device!r}; this machine has no MPS device", param="device")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype named, or with `auto` bfloat16 on CUDA (float16 before compute capability 8.0), else float32.

    torch itself calls bfloat16 supported where it is emulated, without convolutions.

    Raises:
        ConfigError: It is not one of auto, float32, float16, bfloat16.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    check_choice("dtype", dtype, ("auto", *DTYPES))
    return DTYPES[dtype]
