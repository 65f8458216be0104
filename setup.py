"""Packaging of wan_jax. Tool settings (ruff, pytest) live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10",
    "flax>=0.12.8",
    "optax",
    "orbax-checkpoint>=0.11",
    "numpy",
    "ml_dtypes",
    "librosa",
    "imageio",
    "imageio-ffmpeg",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "ftfy",
    "huggingface_hub>=2",
    "tqdm",
]
TEST = [
    "pytest", "pytest-xdist", "ruff", "ml_collections", "nbmake", "ipykernel", "c2pa-python", "cryptography", "grain",
]  # fmt: skip

setup(
    name="wan_jax",
    version="0.1.0",
    description="The Wan video models in JAX: text, image and reference to video, on TPU, GPU and CPU",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["wan_jax", "wan_jax.*"]),
    package_data={"wan_jax": ["assets/*", "assets/*/*"]},
    install_requires=CORE,
    extras_require={
        "train": ["grain", "tensorboard"],
        "video": ["av"],
        "faces": ["opencv-python-headless<5"],  # 5 comes without the cascades
        "c2pa": ["c2pa-python"],
        "ray": ["ray"],
        "tokamax": ["tokamax"],
        "tpu": ["jax[tpu]"],
        "cuda13": ["jax[cuda13]"],
        "gate": ["libtpu", "jax[cuda13]"],  # compilers alone: neither needs its device
        "test": TEST,
        # PyTorch is pinned: a plain `torch` pulls several GB of CUDA packages on Linux.
        "oracle": ["torch==2.13.0", "diffusers", "transformers"],
    },
    entry_points={"console_scripts": ["wan-jax = wan_jax.cli:main"]},
)
