"""Adapters on disk, in softkv's format and in others'."""
