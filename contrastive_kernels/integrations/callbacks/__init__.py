"""Callbacks of trainers that patch losses, log what they say of themselves, and report at the end.

`callbacks.huggingface.FusedLosses` is for transformers' Trainer and those derived from it,
`callbacks.lightning.FusedLosses` for Lightning's. Neither package is imported before its module is.
"""
