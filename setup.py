"""Package definition. Dependencies are few, and each states its reason."""

from pathlib import Path

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    "torch>=2.11",  # tensors, autograd, the reference implementation
    "triton>=3.6; platform_system == 'Linux'",  # the kernels (also interpreted and cross-compiled without a GPU)
    "deepspeed>=0.19.8,<0.20",  # ZeRO, the launcher and the training engine
    "tokenizers>=0.21",  # byte-level BPE in Rust, the format of MiniMind's tokenizer.json
    "numpy>=1.26",  # the memory-mapped token cache
    "safetensors>=0.4",  # weights on disk
    "jinja2>=3.1",  # chat templates, rendered as Transformers does (sandboxed)
    "tqdm>=4.66",  # the progress bar
    "tensorboard>=2.16",  # curves on disk that any viewer opens
    "matplotlib>=3.8",  # the loss curve as PNG at the end of a run
    "psutil>=5.9",  # memory of the process, for the log
]

SERVE = [
    "fastapi>=0.115",  # routes of `minimind-fast serve`
    "uvicorn>=0.30",  # runs them
]

GGUF = [
    "gguf>=0.17",  # the container format of llama.cpp and Ollama, for `minimind-fast export --format gguf`
]

DATA = [
    "pyarrow>=17",  # reads .parquet, the format of the Hub's datasets
    "zstandard>=0.22",  # reads .jsonl.zst, the format of many published corpora
]

EXTRAS = {
    # flash-attn builds against the CUDA toolkit; without it PyTorch's own varlen flash attention is used.
    "flash": ["flash-attn>=2.7"],
    "serve": SERVE,
    "gguf": GGUF,
    "data": DATA,  # containers of data beyond JSONL, gzip, bzip2 and xz
    "wandb": ["wandb"],
    "swanlab": ["swanlab"],
    "test": [
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",  # many tests wait for processes; two workers halve the suite's time
        "hypothesis>=6.100",
        "transformers>=5,<6",  # tests only: exports and tokenizers are checked against it
        "peft>=0.17",  # tests only: loads our adapters
        *SERVE,
        *GGUF,
        "xllamacpp>=2026.10",  # tests only: llama.cpp itself opens our GGUF files
        *DATA,  # every container is read in the tests
        "openai>=1.60",  # tests only: OpenAI's client talks to our server
        "httpx>=0.27",  # tests and the serving benchmark: requests that OpenAI's client cannot send
        "ruff>=0.9",
        "pyright>=1.1.390",
    ],
}

setup(
    name="minimind_fast",
    version="0.1.0",
    description="Train a tiny language model from nothing, at the speed of the machine",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ and train/ are included through two links: minimind_fast/kernels and minimind_fast/stages.
    packages=find_packages(include=["minimind_fast", "minimind_fast.*"]),
    package_data={"minimind_fast.serve": ["web/*"], "minimind_fast.data.samples": ["*.jsonl", "tokenizer/*"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["minimind-fast=minimind_fast.cli:main"]},
)
