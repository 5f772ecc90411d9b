"""Agent architectures: what an agent is built like, found by entry point.

`factory` lists and loads them without torch; `model` says what a built agent can do; `cognate` is the one that ships.
"""
