"""wan2.6-nano from nothing on one large GPU: `train_nano.py` with more of everything.

    wan-jax train --config configs/train_nano_gpu.py --out runs/nano --minutes 9.5
    wan-jax train --config configs/train_nano_gpu.py --out runs/nano --minutes 9.5 --resume

The second line is for machines that are lent for minutes: repeat it until ``runs/nano/export`` is there.

Expect: as from `train_nano.py`. The numbers are meant for twenty minutes and have never been run on a GPU.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(Path(__file__).with_name("train_nano.py"))["get_config"]()
    config.dtype = "bfloat16"
    config.watch.update(log=50, save=1000)
    config.vae.clips = 2048
    config.decoder = dict(  # of the VAE, beyond what a linear code can do
        steps=6000, batch=32, optimizer="muon", learning_rate=1e-3, warmup=100, ema=0.999, steps_per_call=10,
        pool=4096, refresh=2000,
    )  # fmt: skip
    config.audio_vae.update(steps=6000, batch=64, ema=0.998, steps_per_call=10)
    config.vocoder = dict(
        steps=3000, batch=16, optimizer="muon", learning_rate=2e-3, warmup=50, ema=0.998, steps_per_call=10,
        window=16_384,
    )  # fmt: skip
    config.image_encoder.update(batch=256, ema=0.999, steps_per_call=10)
    config.speech.update(
        steps=5000, batch=256, learning_rate=1e-3, warmup=200, ema=0.9995, steps_per_call=5, pool=16_384, refresh=2500
    )
    config.twin.update(
        steps=10_000, batch=256, learning_rate=1e-3, warmup=300, ema=0.9995, steps_per_call=5, pool=16_384, refresh=5000
    )
    return config
