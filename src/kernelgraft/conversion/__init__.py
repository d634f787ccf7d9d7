"""Weights renamed, merged, transposed and stacked: conversion rules run on lazy tensors, and what comes of them.

`LazyTensor` is what rules run on, `read_rules` reads them from a layout class, and a `Program` is their outcome.
"""

from kernelgraft.conversion.lazy import EagerSteps, LazyTensor, Source, TensorSource, eager_steps
from kernelgraft.conversion.part import Part
from kernelgraft.conversion.program import Program
from kernelgraft.conversion.rules import Converted, Rules, read_rules
from kernelgraft.conversion.views import Piece, View

__all__ = [
    "Converted",
    "EagerSteps",
    "LazyTensor",
    "Part",
    "Piece",
    "Program",
    "Rules",
    "Source",
    "TensorSource",
    "View",
    "eager_steps",
    "read_rules",
]
