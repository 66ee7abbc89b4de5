"""The clocks and the power of the GPU, read by NVML beside a running trial."""

import contextlib
import statistics
import threading

import torch

PERIOD_S = 0.01


def _handle():
    """NVML's module and its handle of the current device, None where the bindings are missing or don't know it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception:  # the bindings have errors of their own; a row without clocks says null
        return None


class Clocks:
    """`with clocks:` around work samples every 10 ms; may be entered again and again."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, int, float]] = []
        self._found: tuple | None = None
        self._asked = False

    def __enter__(self) -> "Clocks":
        if not self._asked:
            self._found, self._asked = _handle(), True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        if self._found is None:
            return
        nvml, handle = self._found
        # A card that doesn't tell one of them has no samples
        with contextlib.suppress(nvml.NVMLError):
            while not self._stop.wait(PERIOD_S):
                sm, memory = (nvml.nvmlDeviceGetClockInfo(handle, clock) for clock in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM))
                self.samples.append((sm, memory, nvml.nvmlDeviceGetPowerUsage(handle) / 1e3))

    def row(self) -> dict[str, int | None]:
        """Medians in MHz and W; null where nothing was read."""
        names = ("sm_mhz", "mem_mhz", "watts")
        if not self.samples:
            return dict.fromkeys(names)
        return {name: round(statistics.median(values)) for name, values in zip(names, zip(*self.samples, strict=True), strict=True)}
