"""Wan2.1 T2V 1.3B: text to a clip of 5 seconds at 832x480.

    wan-jax generate --config configs/t2v_1_3b.py --prompt "a cat surfing a wave at sunset" --output clip.mp4

Any setting can be replaced on the command line, for example ``--size 480x832`` or ``--seed 1 2 3``.

Expect: 81 frames at 16 a second. The transformer's weights take 2.8 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of them is held at a time. Shift and guidance are those that the official README advises for this model;
its command line defaults to 5 and 5, as does ``wan-jax generate`` without this recipe.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.1-t2v-1.3b"
    config.size = "832x480"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 8.0  # advised: 8 to 12
    config.guidance_scale = 6.0
    return config
