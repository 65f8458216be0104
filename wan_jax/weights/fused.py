"""Weight normalisation, undone on reading: a checkpoint seen with the plain weights that its pairs stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from wan_jax.errors import CheckpointError
from wan_jax.weights.engine import host_array

# Names of magnitude and direction behind the module's: `torch.nn.utils.weight_norm` of old, and its parametrization.
_SPELLINGS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@dataclass(frozen=True)
class FusedTensor:
    """``g v / |v|``, the norm over all axes but the first; read when asked for."""

    magnitude: Any
    direction: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.direction.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    def numpy(self) -> np.ndarray:
        g, v = (host_array(tensor).astype(np.float32) for tensor in (self.magnitude, self.direction))
        return g * (v / np.linalg.norm(v.reshape(len(v), -1), axis=1).reshape(g.shape))

    def release(self) -> None:
        for tensor in (self.magnitude, self.direction):
            if hasattr(tensor, "release"):
                tensor.release()


class FusedWeights(Mapping[str, Any]):
    """A checkpoint, closed with this view of it, where every pair is one plain ``X.weight``.

    A pair that lacks its partner, or whose plain weight is there too, stays as it is: the engine reports it.

    Raises:
        CheckpointError: a magnitude without the one value for each slice of its direction.
    """

    def __init__(self, source: Mapping[str, Any]):
        self._source = source
        self._tensors = dict(source)
        for g_leaf, v_leaf in _SPELLINGS:
            for g_name in [name for name in source if name.endswith(f".{g_leaf}")]:
                module = g_name.removesuffix(g_leaf)
                v_name, name = module + v_leaf, f"{module}weight"
                if v_name not in source or name in self._tensors:
                    continue
                g, v = self._tensors.pop(g_name), self._tensors.pop(v_name)
                expected = (*v.shape[:1], *(1 for _ in v.shape[1:]))
                if tuple(g.shape) != expected:
                    raise CheckpointError(f"{g_name}: shape {tuple(g.shape)}, {v_name} needs {expected}")
                self._tensors[name] = FusedTensor(g, v)

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> FusedWeights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.close()
