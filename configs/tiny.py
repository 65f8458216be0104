"""A tiny random model: shows that everything runs, on a CPU, and draws noise.

    wan-jax convert random tiny_model --tiny t2v
    wan-jax generate --config configs/tiny.py --output clip.mp4

Expect: 5 frames of coloured noise, 32x32 pixels, and a warning that no model was trained on this size.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.model = "tiny_model"  # a folder
    config.prompt = "a cat surfing a wave at sunset"
    config.size = "32x32"
    config.num_frames = 5
    config.num_steps = 2
    config.seed = 0
    config.dtype = "float32"
    return config
