"""transformers' models, tiny and random, with every method: `python -m benchmarks.models`."""
