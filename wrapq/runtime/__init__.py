"""What runs after `convert`: modules that hold integers, scales and zero points instead of float weights."""

from wrapq.runtime.choose import KernelChoice, KernelReport, choose_kernels, resident_bytes
from wrapq.runtime.kernel import KERNELS, Kernel

__all__ = ["KERNELS", "Kernel", "KernelChoice", "KernelReport", "choose_kernels", "resident_bytes"]
