"""Wan2.1 T2V 14B as a text-to-image model: one picture of 1280x720.

    wan-jax generate --config configs/t2i_14b.py --prompt "a still life with quinces" --output picture.png

The official code also makes pictures of 1024x1024: add ``--size 1024x1024``.

Expect: a PNG with its settings inside. The transformer's weights take 28.6 GB in bfloat16, the text encoder's 11.4 GB;
with --offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.1-t2v-14b"
    config.size = "1280x720"
    config.num_frames = 1
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = 5.0
    config.output = "picture.png"
    return config
