"""Wan2.2 I2V A14B: a picture to a clip of 5 seconds, with two experts.

    wan-jax generate --config configs/i2v_a14b.py --image photo.jpg --prompt "she turns and smiles" --output clip.mp4

The clip takes the aspect of the picture and the area of ``size``. The first 15 of the 40 steps run on the expert for
high noise, the rest on the one for low noise. ``guidance_scale`` is (low noise, high noise).

Expect: 81 frames at 16 a second. The weights of each expert take 28.6 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of the three is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.2-i2v-a14b"
    config.size = "1280x720"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 40
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = (3.5, 3.5)
    return config
