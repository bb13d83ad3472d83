"""Peak numbers of accelerators, from their vendor's data sheets, and the time of an operation on one."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from learnkv.errors import UserError
from learnkv.training.memory.operations import Operation

LAUNCH = 5e-6
"""Seconds that PyTorch needs at least to start an operation."""


@dataclass(frozen=True)
class Accelerator:
    """Peak numbers of an accelerator and the share of them that is reached.

    Args:
        name: its name.
        tflops: 10^12 operations per second in products of 16-bit matrices, without sparsity.
        tflops32: the same of float32 matrices, without TF32.
        bandwidth: GB per second from and to its memory.
        memory: GB of memory.
        utilisation: share of both `tflops` that is reached.
        bandwidth_utilisation: share of `bandwidth` that is reached.
    """

    name: str
    tflops: float
    tflops32: float
    bandwidth: float
    memory: float
    utilisation: float = 0.4
    bandwidth_utilisation: float = 0.7

    def seconds(self, operations: Iterable[Operation]) -> float:
        """Time of operations that run one after another, each as long as the slower of arithmetic and memory."""
        rates = {False: self.tflops * 1e12 * self.utilisation, True: self.tflops32 * 1e12 * self.utilisation}
        speed = self.bandwidth * 1e9 * self.bandwidth_utilisation
        return sum(max(each.flops / rates[each.float32], each.moved / speed, LAUNCH) for each in operations)


ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("h200", 989, 67, 4800, 141),
        Accelerator("h100", 989, 67, 3350, 80),
        Accelerator("a100", 312, 19.5, 2039, 80),
        Accelerator("l40s", 362, 91.6, 864, 48),
        Accelerator("rtx4090", 165, 82.6, 1008, 24),
        Accelerator("l4", 121, 30.3, 300, 24),
    )
}
"""SXM modules of the data centre cards with 80 GB and more."""


@dataclass(frozen=True)
class AcceleratorSettings:
    """The accelerator that times are predicted for.

    Args:
        accelerator: h200, h100, a100, l40s, rtx4090 or l4; any other name with its numbers below. Without one the
            memory alone is predicted.
        tflops: 10^12 operations per second in products of 16-bit matrices; that of the data sheet if not given.
        tflops32: the same in float32.
        bandwidth: GB per second from and to its memory.
        gpu_memory: GB of memory of one GPU.
        utilisation: shares of the peak operations and of the bandwidth that are reached.
    """

    accelerator: str | None = None
    tflops: float | None = None
    tflops32: float | None = None
    bandwidth: float | None = None
    gpu_memory: float | None = None
    utilisation: tuple[float, float] = (0.4, 0.7)

    def __post_init__(self) -> None:
        numbers = {key: getattr(self, key) for key in ("tflops", "tflops32", "bandwidth", "gpu_memory")}
        for key, value in numbers.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{key}={value:g}: expected more than 0")
            if value is not None and self.accelerator is None:
                raise UserError(f"{key}={value:g}: expected accelerator=NAME beside it")
        if not all(0 < share <= 1 for share in self.utilisation):
            shares = ",".join(f"{share:g}" for share in self.utilisation)
            raise UserError(f"utilisation={shares}: expected two shares, above 0 and at most 1")
        missing = [key for key, value in numbers.items() if value is None]
        if self.accelerator is not None and self.accelerator not in ACCELERATORS and missing:
            raise UserError(
                f"accelerator={self.accelerator}: expected one of {', '.join(ACCELERATORS)}, or the numbers of another "
                f"one; {', '.join(f'{key}=' for key in missing)} missing"
            )

    @property
    def chosen(self) -> Accelerator | None:
        """The accelerator with the numbers that were given; None where none was named."""
        if self.accelerator is None:
            return None
        known = ACCELERATORS.get(self.accelerator, Accelerator(self.accelerator, 0, 0, 0, 0))
        return replace(
            known,
            tflops=self.tflops or known.tflops,
            tflops32=self.tflops32 or known.tflops32,
            bandwidth=self.bandwidth or known.bandwidth,
            memory=self.gpu_memory or known.memory,
            utilisation=self.utilisation[0],
            bandwidth_utilisation=self.utilisation[1],
        )
