"""Metrics of tasks as pure functions, free of torch: each names its formula and its source.

`answers` texts, `spans` slots, `calls` tool calls, `actions` behaviour, `continual` what is forgotten.
"""
