"""The agents' own data pipeline (ADR-003): task-specific rows -> checked, split and labelled examples.

Cognate has another one; neither imports the other.
"""
