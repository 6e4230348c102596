"""Numbers of the device that the host reads later, without waiting for what is queued after them."""

from __future__ import annotations

import torch


class Readback:
    """A number on its way from the device to the host.

    `float()` waits until it is there. A tensor's own would wait for all that has been queued on the device
    by then, such as the next step.
    """

    def __init__(self, value: torch.Tensor | float) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if isinstance(value, torch.Tensor) and value.is_cuda:
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value = host.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)
