"""Packaging: the library, the SeqIO tasks (as `upcycle_jax.tasks`) and the gin files (as data in
`upcycle_jax/gin_configs`).
"""

import os
import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent
os.chdir(ROOT)

VERSION = re.search(
    r'^__version__ = "([^"]+)"',
    (ROOT / "upcycle_jax" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

# Ranges are pinned on both sides: these libraries change behaviour between minor releases.
# TensorFlow is not named: SeqIO asks for tensorflow-text, which asks for the one TensorFlow that it
# was built against; naming tensorflow-cpu as well would install both.
REQUIREMENTS = [
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",
    "etils[epath]>=1.9,<2",
    "flax>=0.12.6,<0.13",
    "fonttools>=4.40,<5",
    "gin-config>=0.5,<0.6",
    "grain>=0.2.13,<0.3",
    "humanize>=4.9,<5",
    "jax>=0.10,<0.12",
    "markdown>=3.5,<4",
    "matplotlib>=3.9,<4",
    "ml_dtypes>=0.5,<0.7",
    "msgpack>=1.0,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=10,<14",
    "psutil>=5.9,<8",
    "safetensors>=0.5,<0.9",
    "sentencepiece>=0.2,<0.3",
    "scipy>=1.11,<2",
    "seqio>=0.0.20,<0.1",
    "tensorboard>=2.19,<3",
    "tensorstore>=0.1.84,<0.2",
    "tokenizers>=0.20,<0.24",
]

EXTRAS = {
    # torch is pinned exactly: package indexes that hold a CPU build serve it for this version,
    # which is far smaller. It and transformers are only the oracle of the Hugging Face tests.
    "test": [
        "gguf>=0.17,<0.20",
        "hypothesis>=6.100,<7",
        "mypy>=1.15,<3",
        "pytest>=9,<10",
        "pytest-timeout>=2.3,<3",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.12,<0.18",
        "torch==2.13.0",
        "transformers>=5,<6",
    ],
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    # Compiles for TPUs on any Linux machine (upcycle_jax.precompile). Half a gigabyte, and jax then
    # looks for TPUs: best in an environment of its own. jax names the libtpu whose programs it can
    # read: with a newer one, some cannot be shown.
    "precompile": ["jax[tpu]>=0.10,<0.12"],
    "gpu": ["jax[cuda12]>=0.10,<0.12"],
    # The paper's tasks (C4, SuperGLUE). t5 asks for seqio-nightly, which holds the same `seqio`
    # package as the release: keep the release.
    "t5": ["t5==0.9.4"],
    # Not on PyPI, so named by their public repositories; nothing here imports them (docs/t5x.md).
    # An upload to PyPI has to leave this out.
    "t5x": [
        "t5x @ git+https://github.com/google-research/t5x.git",
        "flaxformer @ git+https://github.com/google/flaxformer.git",
    ],
    # Reads the weights of GGUF files (checkpoints/gguf).
    "gguf": ["gguf>=0.17,<0.20"],
    "parquet": ["pyarrow>=17,<30"],
    "wandb": ["wandb>=0.18,<1"],
}


def packages() -> tuple[list[str], dict[str, str]]:
    """Package names and the folders of those that do not lie under `upcycle_jax/`."""
    names = setuptools.find_packages(include=["upcycle_jax", "upcycle_jax.*"])
    folders = {"upcycle_jax": "upcycle_jax"}
    for folder, name in (
        ("tasks", "upcycle_jax.tasks"),
        ("gin_configs", "upcycle_jax.gin_configs"),
    ):
        folders[name] = folder
        names.append(name)
        if folder == "tasks":
            names += [f"{name}.{sub}" for sub in setuptools.find_packages(folder)]
    return names, folders


NAMES, FOLDERS = packages()

setuptools.setup(
    name="upcycle_jax",
    version=VERSION,
    description=(
        "Sparse upcycling of dense checkpoints into Mixture-of-Experts models, in the shape of T5X."
    ),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=NAMES,
    package_dir=FOLDERS,
    package_data={
        "upcycle_jax": ["py.typed"],
        "upcycle_jax.gin_configs": ["**/*.gin"],
        "upcycle_jax.papers": ["data/*.csv"],
    },
    include_package_data=False,
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["upcycle-jax = upcycle_jax.cli:main"]},
)
