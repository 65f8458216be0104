"""Ovi: text, or a first picture, to 5 seconds of video with sound.

    wan-jax generate --config configs/ovi_5s.py --prompt 'She says "Good morning." Audio: calm voice, birds'
    wan-jax generate --config configs/ovi_5s.py --image photo.jpg --prompt 'He says "Welcome."'

For 10 seconds use the model ovi-10s.

Expect: 121 frames at 24 a second, 16 kHz. The transformer's weights take 23.3 GB in bfloat16, the text encoder's
11.4 GB; with --offload one of them is held at a time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "ovi-5s"
    config.size = "1280x704"
    config.num_frames = 121
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = 4.0
    config.audio_guidance_scale = 3.0
    return config
