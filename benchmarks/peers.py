"""The same networks in PyTorch, from diffusers and transformers: what a ratio is a ratio to.

On a GPU each is compiled (`torch.compile`); where that fails, and on a CPU, it runs eagerly. Attention is PyTorch's
own (`scaled_dot_product_attention`), and so is the precision of float32: its convolutions on a GPU may round to TF32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import measure
import numpy as np

from wan_jax.config import ModelSpec
from wan_jax.conversion import part_config
from wan_jax.model import DTYPES, build
from wan_jax.weights import layouts
from wan_jax.weights.engine import fill

CLASSES = {"dit": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}
SHARED = 1e9  # parameters up to which both sides get equal weights, in float32


class Peer:
    """One network of a model, with random weights, on the device that PyTorch finds."""

    def __init__(self, spec: ModelSpec, part: str, dtype: str):
        try:
            import diffusers
            import torch
            import transformers
        except ImportError as error:
            sys.exit(f'--peer diffusers: {error}; pip install "wan_jax[oracle]"')
        diffusers.utils.logging.set_verbosity_error()
        if part == "dit" and spec.sound:  # two streams
            sys.exit(f"--peer diffusers: it has no {spec.name}")
        self.torch, self.spec, self.part, self.dtype = torch, spec, part, dtype
        on_gpu = torch.cuda.is_available() and not measure.on_cpu()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        if not on_gpu:
            torch.set_num_threads(1)
        torch.manual_seed(0)
        config = part_config(spec, "diffusers", part)
        config.pop("_class_name", None)
        with self.device:
            if part == "text_encoder":
                self.module = transformers.UMT5EncoderModel(transformers.UMT5Config(**config))
            else:
                self.module = getattr(diffusers, CLASSES[part])(**config)
        self.module = self.module.to(getattr(torch, dtype)).eval()

    @property
    def shares_weights(self) -> bool:
        return self.dtype == "float32" and sum(x.numel() for x in self.module.parameters()) <= SHARED

    def network(self) -> Any:
        """Ours, with the same weights."""
        weights = {name: value.cpu().numpy() for name, value in self.module.state_dict().items()}
        cfg = layouts.network_config(self.spec, self.part)
        rows, ignore = layouts.table(self.part, cfg), layouts.ignored(self.part, cfg, "diffusers")
        shape = build(self.part, self.spec, DTYPES[self.dtype])
        return fill(shape, rows, weights, network=self.part, layout="diffusers", ignore=ignore)

    def tensor(self, x: Any, dtype: str | None = None) -> Any:
        """An array on the device of the peer."""
        return self.torch.tensor(np.asarray(x), device=self.device, dtype=getattr(self.torch, dtype or self.dtype))

    def compiled(self) -> Any:
        """The module compiled, on a GPU; it is compiled when first called."""
        return self.torch.compile(self.module) if self.device.type == "cuda" else self.module

    def case(self, call: Callable[[Any], Any], flop: float) -> measure.Case:
        """``call(module)`` as a case that returns its result as numpy."""

        def run(module: Any) -> np.ndarray:
            with self.torch.inference_mode():
                return call(module).float().cpu().numpy()

        module, how = self.compiled(), "eager"
        if module is not self.module:
            try:
                run(module)
                how = "torch.compile"
            except Exception as error:  # whatever its compiler lacks here
                print(f"torch.compile does not work here ({str(error).splitlines()[0]}): eager", file=sys.stderr)
                module = self.module
        return measure.Case(f"diffusers, {how}", functools.partial(run, module), flop, self.dtype)
