"""Packaging. The code lies at the top level (`softkv/`, `kernels/`, `benchmarks/`) and is packaged through the link
`src/softkv`. `kernels/` and `benchmarks/` are imported as `softkv.kernels` and `softkv.benchmarks`: a top-level package
called `kernels` would shadow the Hugging Face package of that name, which transformers imports. An editable install
puts `src` on the path, so that the folder of a clone, if it is called `softkv`, is never taken for the package.
"""

from pathlib import Path

from setuptools import find_packages, setup

TESTS = ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "scikit-learn"]
STYLE = ["ruff", "mypy", "pre-commit"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
QUANTISED = ["bitsandbytes; platform_system == 'Linux' and platform_machine == 'x86_64'"]
NOTEBOOK = ["nbclient", "ipykernel"]
PLOTS = ["matplotlib>=3.9"]
BENCHMARKS = ["peft", "psutil", *PLOTS]

setup(
    name="softkv",
    version="0.1.0",
    description="Attention that reads soft-prompt prefixes as an operand of its own, and four methods to train them",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"softkv": ["py.typed"], "softkv.benchmarks": ["movie_snippets_data/*", "learning_data/*"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.20",
        "accelerate>=1.10",
        "safetensors>=0.5",
        "typer>=0.15",
        "rich>=13",
    ],
    extras_require={
        "data": ["datasets"],
        "dev": [*TESTS, *STYLE, *BENCHMARKS, *DOCS, "gguf", "datasets", "tensorboard", "trl", *NOTEBOOK, *QUANTISED],
        "bench": BENCHMARKS,
        "demo": ["gguf", *BENCHMARKS],
        "docs": DOCS,
        "eval": ["lm-eval>=0.4.9"],
        "notebook": NOTEBOOK,
        "plots": PLOTS,
        "peers": ["fla-core"],
    },
    entry_points={"console_scripts": ["softkv = softkv.cli:app"]},
)
