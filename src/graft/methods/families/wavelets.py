"""Wavelet transforms of the sides of a weight."""

from __future__ import annotations

from torch import Tensor

from graft.core.errors import GraftError
from graft.numerics.transforms import wavelet_matrix


def wavelet_transform(size: int, wavelet: str, level: int = 1) -> Tensor:
    """The orthonormal transform ``[size, size]`` in fp64, approximation rows first; raises :class:`GraftError` without PyWavelets or for sizes
    that cannot be halved ``level`` times."""
    try:
        return wavelet_matrix(size, wavelet, level)
    except ImportError:
        raise GraftError("wavelets need the package PyWavelets; run: pip install 'graft[wavelets]'") from None
    except ValueError as error:
        raise GraftError(f"the wavelet {wavelet!r} at level {level} does not fit: {error}") from None
