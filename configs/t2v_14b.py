"""Wan2.1 T2V 14B: text to a clip of 5 seconds at 1280x720.

    wan-jax generate --config configs/t2v_14b.py --prompt "a cat surfing a wave at sunset" --output clip.mp4

For 480p add ``--size 832x480``. On eight devices add ``--mesh fsdp=8``: they share the weights and the tokens.

Expect: 81 frames at 16 a second. The transformer's weights take 28.6 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.1-t2v-14b"
    config.size = "1280x720"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = 5.0
    return config
