"""Handwritten kernels beside their plain PyTorch definitions, and the choice between the two.

    y = propagate(graph, x)                   # CUDA: the Triton kernel; anywhere else: the reference
    with kernels.use("reference"):            # always plain PyTorch
    with kernels.use("triton"):               # the kernel, or a ValueError that says why it cannot run here

Importing this package does not import Triton: `jit` keeps a kernel as a Python function until its first launch.
With TRITON_INTERPRET=1 set before Triton is first imported, use("triton") runs CPU tensors in its interpreter.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:                # bound by `jit` at the first launch, in every module that holds a kernel
    import triton.language as tl

_choice = "auto"                 # one per process: training loops are single-threaded
OLDEST = 7, 5                    # compute capability that Triton compiles for
GRID = 65_535                    # programs along the second axis of a grid: a limit of every NVIDIA GPU


class use:
    """Choose the path of every kernel: "auto", "reference" or "triton". A statement, or a `with` block that undoes it."""

    def __init__(self, name):
        global _choice
        if name not in ("auto", "reference", "triton"):
            raise ValueError(f'kernels.use("{name}"): choose "auto", "reference" or "triton"')
        self.before, _choice = _choice, name

    def __enter__(self):
        return self

    def __exit__(self, *error):
        global _choice
        _choice = self.before


def backend(x, unless=""):
    """"triton" or "reference" for tensor x.

    unless   why this operation's kernel cannot take x (an empty string if it can), checked last
    raises   ValueError with the reason under use("triton"); "auto" takes the reference, and on a GPU warns once a reason
    """
    if _choice == "reference":
        return "reference"
    reason = _why_not(x) or unless
    if not reason and x.is_cpu and _choice == "auto":
        return "reference"       # the interpreter exists for tests: ten thousand times slower than the reference
    if reason and _choice == "triton":
        raise ValueError(f'use("triton"): {reason}; use("auto") takes the PyTorch reference instead')
    if reason and x.is_cuda:
        _say(reason)
    return "reference" if reason else "triton"


def interpreting():
    """True if kernels run in Triton's interpreter. Triton reads the variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def matrix_units(x):
    """Why x's device cannot run a kernel built on tl.dot, or "": for `unless`.

    Triton 3.3 removed the tensor-core path of compute capability 7.5: such kernels still compile, into scalar
    code with kilobytes of spilled stack. PyTorch's own product is far better there.
    """
    if not x.is_cuda:
        return ""
    if torch.version.hip:
        return "products are not offered on AMD GPUs"
    major, minor = torch.cuda.get_device_capability(x.device)
    return "" if major >= 8 else f"products need compute capability 8.0, this GPU has {major}.{minor}"


def sums(x):
    """The type in which sums of x are kept: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def padded(n, least=16):
    """The next power of two: tiles have no other size."""
    return max(least, 1 << (n - 1).bit_length())


def whole(*tensors):
    """True if all tensors hold whole numbers. A bool is a mask, and as an index it would silently mean 0 and 1."""
    return not any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool for x in tensors)


def fits(name, x, form, **others):
    """Raise a ValueError unless x is floating point with axes `form` ("B, C, H, W") and every other tensor fits it.

    others   label=(tensor, the shape it must have); dtype and device are x's
    """
    if x.ndim != form.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"{name}: the first tensor must be floating point ({form}), got {x.dtype} {tuple(x.shape)}")
    for label, (tensor, shape) in others.items():
        if tensor.shape != torch.Size(shape):
            raise ValueError(f"{name}: {label} is {tuple(tensor.shape)}, but the first tensor ({form}) = {tuple(x.shape)} asks "
                             f"for {tuple(shape)}")
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise ValueError(f"{name}: {label} is {tensor.dtype} on {tensor.device}, the first tensor {x.dtype} on {x.device}")


def on(x):
    """Context in which Triton launches on x's device: it uses the current one, whatever its arguments say."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _why_not(x):
    if not _installed():
        return "Triton is not installed (pip install triton, on Linux)"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"kernels take floating-point tensors, this one is {x.dtype}"
    if x.is_cuda:
        if interpreting():
            return "TRITON_INTERPRET=1 is set and the tensor is on a GPU"
        if torch.version.hip:
            return "kernels compile for AMD GPUs but nobody has tested them there" if _choice == "auto" else ""
        major, minor = torch.cuda.get_device_capability(x.device)
        return "" if (major, minor) >= OLDEST else f"Triton needs compute capability 7.5, this GPU has {major}.{minor}"
    if x.is_cpu:
        return "" if interpreting() else "a CPU tensor needs TRITON_INTERPRET=1 before Triton is first imported"
    return f"there is no kernel for device {x.device}"


@functools.cache
def _say(reason):
    warnings.warn(f"a kernel cannot run here: {reason}. The PyTorch reference runs in its place", stacklevel=5)


@functools.cache
def _installed():
    return importlib.util.find_spec("triton") is not None


class jit:
    """`@triton.jit` that imports Triton only when the kernel is first launched:  kernel[grid](*arguments)

    The first launch binds `tl` and replaces the jit functions among the kernel's globals by the real ones, so that
    kernels call each other as usual. Annotate constants `tl.constexpr` under `from __future__ import annotations`.
    `real()` is Triton's own function (check.py compiles it).
    """

    def __init__(self, function):
        self.function, self.made = function, None
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def real(self):
        if self.made is None:
            import triton
            import triton.language
            self.made = triton.jit(self.function)
            self.made.real = self.real
            scope = self.function.__globals__
            scope["tl"] = triton.language
            for name, value in list(scope.items()):
                if isinstance(value, jit):                 # device functions, also those of other modules
                    scope[name] = value.real()
        return self.made

    def __getitem__(self, grid):
        return self.real()[grid]

    def __call__(self, *arguments):
        raise TypeError(f"{self.__name__} is a kernel: launch it with {self.__name__}[grid](...)")


@jit
def dot(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a @ b, summed in float32 (float64 for float64).   UPCAST = interpreting(): it multiplies the raw bits of bf16"""
    if UPCAST:
        if a.dtype == tl.float64:
            return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee", out_dtype=tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


__all__ = ["GRID", "backend", "dot", "fits", "interpreting", "jit", "matrix_units", "on", "padded", "sums", "use", "whole"]
