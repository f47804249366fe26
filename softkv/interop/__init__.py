"""Adapters of other libraries, as softkv's own and back."""
