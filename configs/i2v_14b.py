"""Wan2.1 I2V 14B 480P: a picture to a clip of 5 seconds.

    wan-jax generate --config configs/i2v_14b.py --image photo.jpg --prompt "she turns and smiles" --output clip.mp4

The clip takes the aspect of the picture and the area of ``size``. For 720p add ``--model wan2.1-i2v-14b-720p --size
1280x720 --shift 5``: the official shift is 3 up to the area of 832x480, and 5 above it.

Expect: 81 frames at 16 a second. The transformer's weights take 32.8 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.1-i2v-14b-480p"
    config.size = "832x480"
    config.num_frames = 81
    config.fps = 16.0
    config.num_steps = 40
    config.solver = "unipc"
    config.shift = 3.0
    config.guidance_scale = 5.0
    return config
