"""wan2.6-nano from nothing, on talking puppets that are drawn and rendered on the device: the model that ships.

    wan-jax train --config configs/train_nano.py --out runs/nano
    wan-jax train --config configs/train_nano.py --out runs/nano --resume
    wan-jax train --config configs/train_nano.py --out runs/more --model wan2.6-nano

The second line goes on after a stop; the third begins with the weights of a model of this kind, and keeps its codecs.

Expect: five stages, each with its states and ``metrics.jsonl``, and ``runs/nano/export`` with the weights in bfloat16.
How long it takes and how good it gets is in docs/nano.md. Needs no network and no data. Where cores are to spare
`--only STAGE` trains one: codecs and image encoder first, then speech, then twin.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.kind = "nano"
    config.dtype = "float32"  # of the twin model's products; bfloat16 on accelerators
    config.watch = dict(log=25, save=200, sample=500)
    config.vae = dict(clips=512)
    config.audio_vae = dict(steps=7000, batch=16, optimizer="muon", learning_rate=3e-3, warmup=50, ema=0.99, b2=0.98)
    config.image_encoder = dict(  # on single pictures
        steps=4000, batch=64, optimizer="muon", learning_rate=3e-3, warmup=100, ema=0.998,
    )  # fmt: skip
    levels = dict(mean=0.4, std=0.9)
    config.speech = dict(  # the sound alone
        steps=6000, batch=16, optimizer="muon", learning_rate=2e-3, warmup=60, ema=0.998,
        pool=2048, refresh=1000, kinds=("one", "two", "one", "alone"), unseen=64, levels=levels,
        dropout=dict(text=0.08, voice=0.03, tokens=0.25, adapters=0.1, everything=0.03),
    )  # fmt: skip
    config.twin = dict(
        steps=12_000, batch=16, optimizer="muon", learning_rate=2e-3, warmup=60, ema=0.998,
        pool=1024,  # clips that are encoded at once and drawn from
        refresh=500,  # steps that a pool serves
        kinds=("one", "two", "one", "one", "two", "one", "alone", "one"),  # in turn of the calls
        unseen=64,
        first_frame=0.15,
        levels=levels,
        dropout=dict(text=0.08, image=0.03, voice=0.03, coupling=0.06, tokens=0.35, adapters=0.1, everything=0.03),
    )  # fmt: skip
    return config
