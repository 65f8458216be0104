"""wan2.6-nano from nothing, on talking puppets that are drawn and rendered on the device.

    wan-jax train --config configs/train_nano.py --out runs/nano
    wan-jax train --config configs/train_nano.py --out runs/nano --resume --minutes 9.5

The second line is for machines that are lent for minutes: repeat it until ``runs/nano/export`` is there.

Expect: four stages, each with its states and ``metrics.jsonl``, and ``runs/nano/export`` with the weights in bfloat16.
The sizes are meant for twenty minutes of one large GPU; none was timed on one. Needs no network and no data.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.kind = "nano"
    config.dtype = "bfloat16"  # of the twin model's products; the codecs are float32
    config.watch = dict(log=50, save=1000, sample=500)
    config.vae = dict(steps=6000, batch=8, learning_rate=2e-3, warmup=200, ema=0.999, b2=0.99, steps_per_call=10)
    config.audio_vae = dict(steps=3000, batch=64, learning_rate=3e-3, warmup=100, ema=0.998, steps_per_call=10)
    config.vocoder = dict(steps=3000, batch=16, learning_rate=1e-3, warmup=100, ema=0.998, b2=0.99, steps_per_call=10)
    config.twin = dict(
        steps=10_000, batch=256, learning_rate=1e-3, warmup=300, b2=0.99, ema=0.9995, steps_per_call=5,
        pool=16_384,  # clips that are encoded at once and drawn from
        refresh=5_000,  # steps that a pool serves
        kinds=("one", "one", "two", "one", "alone"),  # in turn of the calls
        unseen=64,
        first_frame=0.15,
        levels=dict(mean=0.4, std=0.9),
        dropout=dict(text=0.08, image=0.03, voice=0.03, coupling=0.06, tokens=0.1, adapters=0.1, everything=0.03),
    )  # fmt: skip
    return config
