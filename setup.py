"""Installation: ``pip install .``; extras: ``gpu``, ``figures``, ``dev``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "relreid_plugin" / "__init__.py").read_text(encoding="utf-8")).group(
    1
)

FIGURES = ["scikit-learn>=1.3", "grad-cam>=1.5"]

setup(
    name="relreid-plugin",
    version=version,
    description="Relation models, attention and losses for person and object re-identification, beside torchreid",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["relreid_plugin", "relreid_plugin.*"]),
    package_data={"relreid_plugin": ["py.typed"]},
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "torchreid==0.2.5",
        # what torchreid needs and does not declare
        "opencv-python-headless>=4.8",
        "gdown>=5.0",
        "tensorboard>=2.14",
        "six>=1.16",
        "h5py>=3.9",
        "imageio>=2.31",
        # the plug-in's own
        "faiss-cpu>=1.8",
        "timm>=1.0.26",
        "safetensors>=0.4.3",
        "yacs>=0.1.8",
        "PyYAML>=6.0",
        "numpy>=1.24",
        "scipy>=1.10",
        "Pillow>=9.5",
        "tifffile>=2023.2",
        "regex>=2023.5",
        "matplotlib>=3.7",
        "tqdm>=4.65",
        "filelock>=3.16",
    ],
    extras_require={
        "gpu": ["faiss-gpu-cu12>=1.8"],
        "figures": FIGURES,
        "dev": [*FIGURES, "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.6", "mypy>=1.11"],
        "docs": ["sphinx>=8.1", "myst-parser>=4.0", "furo>=2024.8.6", "sphinx-design>=0.6", "sphinx-copybutton>=0.5.2"],
        "mutants": ["mutmut>=3.3"],
    },
    entry_points={
        "console_scripts": [
            "relreid-train = relreid_plugin.cli.train:main",
            "relreid-ladder = relreid_plugin.magformer.ladder:main",
        ]
    },
)
