"""Cognate's own data pipeline (ADR-003): sources -> rows -> documents -> tokens -> packed batches.

The agent service has another one; neither imports the other. Only `packing`, `stream` and `build` need torch.
"""
