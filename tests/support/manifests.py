"""Kubernetes manifests: built by kustomize, and held to the schemas of their kinds, strictly.

Kubernetes' own kinds go by the schemas of `kubernetes-validate`, those of operators by third_party/schemas. A field
that a schema does not have is a problem, as is a kind that none is for: a server drops the one, and refuses the other.
Rules written in CEL (`x-kubernetes-validations`) and those of admission webhooks are not looked at.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from kubernetes_validate import utils

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
SCHEMAS = ROOT / "third_party" / "schemas"
KUBERNETES = "1.37"
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which builds overlays, is missing")

# Read once, and not for every object: the definitions of Kubernetes are 1.8 MB.
_schema_contents = functools.cache(utils.schema_contents)


def overlays(root: Path = DEPLOY) -> list[Path]:
    """Return every folder that kustomize can build by itself: components are built as parts of others."""
    files = sorted(root.rglob("kustomization.yaml"))
    return [file.parent for file in files if yaml.safe_load(file.read_text()).get("kind") != "Component"]


@functools.cache
def build(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the objects of an overlay, built once a session. Errors: AssertionError, with kustomize's words."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return tuple(one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one is not None)


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an object, each with its path; nothing, if an API server would take it as it is."""
    api_version, kind = str(manifest.get("apiVersion", "")), str(manifest.get("kind", ""))
    custom = _validator(api_version, kind)
    if custom is None:
        return list(_of_kubernetes(manifest))
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest.get("metadata")}
    found = [_told(error) for error in custom.iter_errors(manifest)]
    found += _of_kubernetes(metadata)
    if kind == "Rollout" and "template" in manifest.get("spec", {}):
        # Its own schema of pods is an older one, and leaves their quantities open.
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": manifest["spec"]["template"]}
        found += [f"spec.{one}" for one in _of_kubernetes({**pods, "metadata": {"name": "pods"}})]
    return found


def _of_kubernetes(manifest: Mapping[str, Any]) -> Iterator[str]:
    try:
        with mock.patch.object(utils, "schema_contents", _schema_contents):
            kubernetes_validate.validate(dict(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _told(error)
    except kubernetes_validate.SchemaNotFoundError:
        yield f"no schema is known for {manifest.get('apiVersion')} {manifest.get('kind')}"
    except (KeyError, AttributeError):
        yield "apiVersion and kind have to be given"


def _told(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(str(part) for part in error.absolute_path) or '(top)'}: {error.message}"


@functools.cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator | None:
    group, _, version = api_version.partition("/")
    file = SCHEMAS / group / f"{kind.lower()}_{version}.json"
    if not version or not file.is_file():
        return None
    return jsonschema.Draft202012Validator(strict(json.loads(file.read_text())))


def strict(schema: Any) -> Any:
    """Return a structural schema as JSON Schema has it, in which no object takes a field that it does not name."""
    closed = dict(schema)
    for part in ("properties", "$defs"):
        if part in closed:
            closed[part] = {name: strict(one) for name, one in closed[part].items()}
    for part in ("items", "additionalProperties"):
        if isinstance(closed.get(part), dict):
            closed[part] = strict(closed[part])
    if closed.get("x-kubernetes-int-or-string"):
        closed.setdefault("type", ["integer", "string"])
    if closed.get("nullable") and "type" in closed:
        closed["type"] = [closed["type"], "null"]
    if closed.get("type") == "object" and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
