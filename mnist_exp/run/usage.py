"""The metrics of `tracking.system`: what the process of a run takes of the machine."""

import torch

from mnist_exp.system import usage


class UsageMeter:
    """A meter that is read after each epoch. Reading it changes nothing and waits for nothing."""

    def __init__(self, device: torch.device, is_on: bool) -> None:
        """Begin to count CPU time.

        Args:
            device: The device that the run is trained on.
            is_on: There are metrics to read; otherwise there are none.
        """
        self.device, self.is_on, self._before = device, is_on, usage.cpu_seconds()

    def read(self) -> dict[str, float]:
        """Return the metrics of this moment; CPU time is that since the meter was last read."""
        if not self.is_on:
            return {}
        now = usage.cpu_seconds()
        values = {
            "system/peak_memory_mb": usage.peak_memory_mb(),
            "system/cpu_seconds": now - self._before,
        }
        self._before = now
        return values | self._of_the_gpu()

    def _of_the_gpu(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        memory = torch.cuda.max_memory_allocated(self.device) / usage.MEGABYTE
        try:
            use = {"system/gpu_utilisation": float(torch.cuda.utilization(self.device))}
        except Exception:  # pynvml is missing, or whatever it raises, as for a part of a GPU (MIG)
            use = {}
        return {"system/gpu_memory_mb": memory, **use}
