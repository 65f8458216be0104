"""Wan2.2 TI2V 5B: text, with or without a first picture, to a clip of 5 seconds at 1280x704.

    wan-jax generate --config configs/ti2v_5b.py --prompt "a cat surfing a wave at sunset" --output clip.mp4
    wan-jax generate --config configs/ti2v_5b.py --image photo.jpg --prompt "she turns and smiles" --output clip.mp4

With a picture the clip takes its aspect, the area of ``size``, and the picture itself as its first frame.

Expect: 121 frames at 24 a second. The transformer's weights take 10.0 GB in bfloat16, the text encoder's 11.4 GB; with
--offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "wan2.2-ti2v-5b"
    config.size = "1280x704"
    config.num_frames = 121
    config.fps = 24.0
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = 5.0
    return config
