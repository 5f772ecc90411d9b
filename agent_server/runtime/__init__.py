"""Modules that a published agent's package ships, so that it runs where nothing of this project is installed.

`run` is the entry, every other module loads the agents of one architecture. They import torch, safetensors, tokenizers
and each other, and nothing of this project: a package holds them byte for byte, in its folder `runtime`.
"""
