"""Wavelets, by PyWavelets, which is an extra."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from graft.core.errors import GraftError
from graft.numerics.transforms import wavelet_matrix


def pywavelets() -> ModuleType:
    """The package; raises :class:`GraftError` where it is missing."""
    try:
        import pywt
    except ImportError:
        raise GraftError("wavelets need the package PyWavelets; run: pip install 'graft[wavelets]'") from None
    module: ModuleType = pywt
    return module


def wavelet_transform(size: int, wavelet: str) -> Tensor:
    """The orthonormal one-level transform ``[size, size]`` of an even size in fp64, approximation rows first."""
    pywavelets()
    return wavelet_matrix(size, wavelet, 1)
