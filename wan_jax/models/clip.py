"""The CLIP visual tower (ViT-H/14) whose patch features condition the Wan2.1 image-to-video models.

Axes: ``B`` batch, ``H W`` pixels, ``C`` colours, ``I`` image tokens (class token first), ``D`` width.
Source: ``wan/modules/clip.py`` VisionTransformer and CLIPModel.visual.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import CLIPConfig
from wan_jax.nn.attention import attention
from wan_jax.nn.layers import MLP, LayerNorm, Linear, gelu_erf, param, patchify
from wan_jax.nn.resize import bicubic_resize
from wan_jax.nn.stack import init_stack
from wan_jax.parallel import constrain

Array = jax.Array

# Colour statistics of CLIP's training images in [0, 1], RGB (openai/CLIP).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(image_BHWC: Array, image_size: int) -> Array:
    """Squash images of any size to the square that the tower reads, and normalise their colours.

    Args:
        image_BHWC: RGB in [-1, 1] at its original size; the aspect ratio is not kept and nothing is cropped.
        image_size: pixels, `CLIPConfig.image_size`.
    Returns:
        [B, image_size, image_size, 3] float32.
    """
    pixels = bicubic_resize(image_BHWC, (image_size, image_size))
    return (pixels * 0.5 + 0.5 - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)


class Attention(nnx.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, cfg: CLIPConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.to_qkv = Linear(cfg.dim, 3 * cfg.dim, dtype=dtype, rngs=rngs)
        self.proj = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.num_heads = cfg.num_heads

    def __call__(self, x_BID: Array) -> Array:
        qkv = self.to_qkv(x_BID).reshape(*x_BID.shape[:2], 3, self.num_heads, -1)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(out.reshape(x_BID.shape))


class Block(nnx.Module):
    """Pre-normed attention and MLP; norms and the residual stream are float32."""

    def __init__(self, cfg: CLIPConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.attn = Attention(cfg, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.mlp = MLP(cfg.dim, cfg.mlp_dim, cfg.dim, act=gelu_erf, dtype=dtype, rngs=rngs)

    def __call__(self, x_BID: Array) -> Array:
        x_BID = x_BID + self.attn(self.norm1(x_BID))
        x_BID = x_BID + self.mlp(self.norm2(x_BID))
        return constrain(x_BID, "B", None, None)


class CLIPVision(nnx.Module):
    """Penultimate hidden state of the tower. The module is a pytree: pass it to `jax.jit`.

    The last block, ``post_norm`` and ``head`` are held so that a loaded checkpoint exports complete, but
    take no part in the result. ``out_dim=0`` builds the tower without the head, as diffusers keeps it.
    """

    def __init__(self, cfg: CLIPConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        std = cfg.dim**-0.5
        self.cfg = cfg
        self.patch_embedding = Linear(cfg.patch_size**2 * 3, cfg.dim, bias=False, dtype=dtype, rngs=rngs)
        self.cls_embedding = param(rngs, (cfg.dim,), std=std)
        self.pos_embedding = param(rngs, (cfg.num_tokens, cfg.dim), std=std)
        self.pre_norm = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.transformer = init_stack(lambda rngs: Block(cfg, dtype=dtype, rngs=rngs), cfg.num_layers, rngs)
        self.post_norm = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        if cfg.out_dim:
            self.head = param(rngs, (cfg.dim, cfg.out_dim), dtype, std=std)

    def __call__(self, pixels_BHWC: Array) -> Array:
        """Encode preprocessed images.

        Args:
            pixels_BHWC: [B, image_size, image_size, 3], see `preprocess`.
        Returns:
            [B, I, D] float32, all tokens after all blocks but the last.
        """
        cfg = self.cfg
        patches, _ = patchify(pixels_BHWC[:, None], (1, cfg.patch_size, cfg.patch_size))
        x = self.patch_embedding(patches).astype(jnp.float32)
        cls = jnp.broadcast_to(self.cls_embedding[...], (x.shape[0], 1, cfg.dim))
        x = jnp.concatenate([cls, x], axis=1) + self.pos_embedding[...]
        x = constrain(self.pre_norm(x), "B", None, None)

        def block(i: Array, x: Array) -> Array:
            return jax.tree.map(lambda leaf: leaf[i], self.transformer)(x)

        # By number, not by scanning a slice of the stack: a slice would copy the weights of all these blocks.
        return jax.lax.fori_loop(0, cfg.num_layers - 1, block, x)
