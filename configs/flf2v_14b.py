"""Wan2.1 FLF2V 14B 720P: a first and a last picture to a clip of 5 seconds between them.

    wan-jax generate --config configs/flf2v_14b.py --image first.png --last-image last.png \\
        --prompt "the flower opens" --output clip.mp4

The clip takes the aspect of the first picture and the area of ``size``; a last picture of another size is cropped.

Expect: 81 frames at 16 a second. The transformer's weights take 32.8 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.1-flf2v-14b-720p"
    config.size = "1280x720"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 16.0
    config.guidance_scale = 5.0
    return config
