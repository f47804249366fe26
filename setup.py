"""Packaging. `kernels/` lies at the top level and is imported as `softkv.kernels`: a top-level package called
`kernels` would shadow the Hugging Face package of that name, which transformers imports. `benchmarks/` is installed as
`softkv.benchmarks`, with the film reviews that it reads."""

from pathlib import Path

from setuptools import find_packages, setup

DEVELOPMENT = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy", "pre-commit"]
MAPPED = {
    "softkv.kernels": "kernels",
    "softkv.benchmarks": "benchmarks",
    "softkv.benchmarks.movie_snippets_data": "data/movie_snippets",
}
BENCHMARKS = ["peft", "matplotlib", "psutil"]

setup(
    name="softkv",
    version="0.1.0",
    description="Attention that reads soft-prompt prefixes as an operand of its own, and four methods to train them",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*MAPPED, *find_packages(include=["softkv", "softkv.*"])],
    package_dir=MAPPED,
    package_data={"softkv": ["py.typed"], "softkv.benchmarks.movie_snippets_data": ["*.jsonl", "*.md"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.20",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "typer>=0.15",
        "rich>=13",
        "matplotlib>=3.9",
    ],
    extras_require={
        "data": ["datasets"],
        "dev": [*DEVELOPMENT, *BENCHMARKS, "gguf", "datasets", "tensorboard"],
        "bench": BENCHMARKS,
        "demo": ["gguf", *BENCHMARKS],
        "flash": ["flash-attn>=2.7"],
        "peers": ["fla-core"],
    },
    entry_points={"console_scripts": ["softkv = softkv.cli:app"]},
)
