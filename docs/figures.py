"""A hook of mkdocs: figures of `benchmarks/results/`, shown in pages by paths that work on GitHub, join the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = "benchmarks/results"


def on_files(files: Any, config: Any) -> Any:
    """Adds every figure to the site, under `results/`."""
    for figure in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points a page's figures at `results/`."""
    return markdown.replace(f"](../{RESULTS}/", "](results/").replace(f"](../../{RESULTS}/", "](../results/")
