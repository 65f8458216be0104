"""DreamID-Omni: a photo and a voice, or two of each, to 5 seconds of video in which they appear and speak.

    wan-jax generate --config configs/dreamid_omni.py --reference photo.jpg --voice voice.wav --i-have-consent \\
        --prompt 'Character1 says "We did it!" in a sunny kitchen' --output clip.mp4

Expect: 121 frames at 24 a second, 16 kHz; four passes a step, which --guidance sequential runs in turn, in less memory.
The transformer's weights take 23.3 GB in bfloat16, the text encoder's 11.4 GB; with --offload one of them is held at a
time. The settings are the official defaults.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "dreamid-omni"
    config.size = "1280x704"
    config.num_frames = 121
    config.num_steps = 50
    config.solver = "unipc"
    config.shift = 5.0
    config.guidance_scale = 3.0
    config.audio_guidance_scale = 4.0
    config.image_guidance = 1.5
    config.voice_guidance = 2.0
    return config
