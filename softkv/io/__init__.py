"""Adapters on disk, in softkv's format and in those of other libraries."""
