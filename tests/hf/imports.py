"""Run by a test with `python -m`, which puts the repository root, and its folder `kernels`, first on the path."""

import transformers

import softkv.hf

print("imported", transformers.LlamaForCausalLM.__name__, softkv.attach.__name__)
