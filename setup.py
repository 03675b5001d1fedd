"""Installation: ``pip install .``; the extras are listed below, under ``extras_require``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "relreid_plugin" / "__init__.py").read_text(encoding="utf-8")).group(
    1
)


def long_description() -> str:
    """The README without its pictures, which lie beside it in a clone and which a package index cannot show."""
    text = (here / "README.md").read_text(encoding="utf-8")
    return re.sub(r"^!\[[^\]]*\]\((?!https?://)[^)]*\)\n+", "", text, flags=re.M)


# the host and what it needs and does not declare; opencv-python, without "headless", serves as well: install it before
# or after, and take the other away, as the two overwrite each other
HOST = [
    "torchreid==0.2.5",
    "opencv-python-headless>=4.8",
    "gdown>=5.0",
    "tensorboard>=2.14",
    "six>=1.16",
    "h5py>=3.9",
    "imageio>=2.31",
]
FAISS = ["faiss-cpu>=1.8"]
PARQUET = ["pyarrow>=15.0"]
FIGURES = ["scikit-learn>=1.3", "grad-cam>=1.5", "ImageHash>=4.3"]
REPORT = ["Jinja2>=3.1", "scikit-learn>=1.3"]
TUNE = ["optuna>=4.0"]
LOGGERS = ["tensorboard>=2.14", "mlflow>=2.9", "wandb>=0.17"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18", "prometheus-client>=0.20", "limits>=4.2"]
MILVUS = ["pymilvus>=3.0", "milvus-lite>=3.2"]
BENCHMARKS = ["hnswlib>=0.8", "usearch>=2.16"]
EXPORT = ["onnx>=1.16", "onnxscript>=0.2", "onnxruntime>=1.18", "openvino>=2024.6"]
DOCS = ["sphinx>=8.1", "myst-parser>=4.0", "furo>=2024.8.6", "sphinx-design>=0.6", "sphinx-copybutton>=0.5.2"]
TOOLS = [
    "pytest>=8.0",
    "hypothesis>=6.100",
    "pytest-xdist>=3.7",
    "ruff>=0.6",
    "mypy>=1.11",
    "build>=1.2",
    "twine>=6.0",
    "import-linter>=2.1",
    "selenium>=4.20",  # drives the Chromium that is installed, if any
    "setuptools>=70.1",
]

setup(
    name="relreid-plugin",
    version=version,
    description="Relation models, attention and losses for person and object re-identification, beside torchreid",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["relreid_plugin", "relreid_plugin.*"]), "relreid_plugin.configs"],
    package_dir={"relreid_plugin.configs": "configs"},
    package_data={
        "relreid_plugin": ["py.typed", "report/templates/*", "serve/page.html"],
        "relreid_plugin.configs": ["*.yml"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "timm>=1.0.26",
        "safetensors>=0.4.3",
        "yacs>=0.1.8",
        "PyYAML>=6.0",
        "numpy>=1.24",
        "scipy>=1.10",
        "Pillow>=10.1",
        "tifffile>=2023.2",
        "regex>=2023.5",
        "matplotlib>=3.7",
        "tqdm>=4.65",
        "filelock>=3.16",
        "shtab>=1.10",
    ],
    extras_require={
        "train": HOST,
        "faiss-cpu": FAISS,
        "faiss-gpu": ["faiss-gpu-cu12>=1.8"],  # instead of faiss-cpu, never beside it
        "figures": FIGURES,
        "parquet": PARQUET,
        "report": REPORT,
        "loggers": LOGGERS,
        "tune": TUNE,
        "serve": SERVE,
        "export": EXPORT,
        "milvus": MILVUS,
        "benchmarks": BENCHMARKS,
        "docs": DOCS,
        "all": [*HOST, *FAISS, *FIGURES, *PARQUET, *REPORT, *TUNE, *SERVE, *EXPORT],
        "dev": [*HOST, *FAISS, *FIGURES, *PARQUET, *REPORT, *TUNE, *SERVE, *EXPORT, *MILVUS, *DOCS, *TOOLS],
        "mutants": ["mutmut>=3.3"],
    },
    entry_points={
        "console_scripts": [
            "relreid = relreid_plugin.cli.main:main",
            "relreid-train = relreid_plugin.cli.main:train_alias",
            "relreid-ladder = relreid_plugin.cli.main:ladder_alias",
        ]
    },
)
