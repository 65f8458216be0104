"""Wan2.2 T2V A14B: text to a clip of 5 seconds at 1280x720, with two experts.

    wan-jax generate --config configs/t2v_a14b.py --prompt "a cat surfing a wave at sunset" --output clip.mp4

The first 26 of the 40 steps run on the expert for high noise, the rest on the one for low noise. ``guidance_scale`` is
(low noise, high noise), as in the official configuration; on the command line ``--guidance-scale 3 4``.

Expect: 81 frames at 16 a second. The weights of each expert take 28.6 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of the three is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.2-t2v-a14b"
    config.size = "1280x720"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 40
    config.solver = "unipc"
    config.shift = 12.0
    config.guidance_scale = (3.0, 4.0)
    return config
