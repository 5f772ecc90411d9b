"""Writes deploy/monitoring's rules as objects of the Prometheus Operator: `python deploy/kubernetes/rules.py`."""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

RULES = Path(__file__).parents[1] / "monitoring" / "prometheus" / "rules"
WRITTEN = Path(__file__).parent / "platform" / "components" / "monitoring" / "rules.yaml"
_HEAD = """\
# Written by deploy/kubernetes/rules.py from deploy/monitoring/prometheus/rules: edit those, then run it.
"""


def rules() -> str:
    """Return the file: one PrometheusRule for each file of rules."""
    objects = [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {
                "name": f"cognateforge-{file.stem}",
                "namespace": "cognateforge",
                "labels": {"app.kubernetes.io/part-of": "cognateforge"},
            },
            "spec": yaml.safe_load(file.read_text()),
        }
        for file in sorted(RULES.glob("*.yml"))
    ]
    return _HEAD + str(yaml.safe_dump_all(objects, sort_keys=False, width=120))


if __name__ == "__main__":
    WRITTEN.write_text(rules())
