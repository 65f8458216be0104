"""A model on a folder of clips: low-rank factors beside the matrices of its blocks.

    wan-jax train --config configs/finetune_lora.py --model wan2.1-t2v-1.3b --data FOLDER --out runs/mine
    wan-jax generate --model wan2.1-t2v-1.3b --lora runs/mine/lora.safetensors --prompt "..." --output clip.mp4

FOLDER holds NAME.mp4 and NAME.txt, the caption, for every clip; for models with sound NAME.wav where the clip has none.
Expect: the clips encoded once into ``runs/mine/clips``, then states, ``metrics.jsonl`` and ``lora.safetensors``, which
diffusers reads too. With trains = "adapters" or "all" the whole model is written to ``runs/mine/export`` instead; "all"
needs --mesh fsdp=N. --resume continues a run that was stopped.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.kind = "finetune"
    config.dtype = "bfloat16"  # of the frozen matrices and all products; what trains is float32
    config.trains = "lora"  # or "adapters", of models with references, or "all"
    config.rank = 16
    config.targets = ()  # such as "self_attn.q", "ffn.fc1"; none: every matrix of the blocks
    config.size = None  # (width, height); None: the model's own
    config.num_frames = None
    config.recipe = dict(
        steps=1000, batch=4, accumulate=4, learning_rate=2e-4, warmup=50, weight_decay=0.0, ema=0.99, remat=True
    )
    config.watch = dict(log=10, save=100, sample=250)
    config.samples = ()  # clips to look at on the way, such as dict(prompt="a cat on a sofa", seed=1)
    config.levels = dict(mean=0.0, std=1.0, shift=3.0)
    config.dropout = dict(text=0.1)
    return config
