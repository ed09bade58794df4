"""Copies of data from the CPU to a device, and waiting for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the same object if it is there already.

    A copy to a GPU comes from pinned memory, so the program does not wait for it. torch keeps the pinned memory until
    the copy has ended.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has computed everything; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
