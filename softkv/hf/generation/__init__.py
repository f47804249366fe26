"""Support for `generate`: cache state, packed prefill, prompts and logits processors."""
