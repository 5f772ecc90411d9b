"""What lies in a fetched artifact's folder beside its own files, and what one of those is called."""

from __future__ import annotations

# The manifest as published: its digest is the version's identity.
MANIFEST_NAME = "manifest.json"
# The signature over manifest and files. It is no file of the artifact: a file cannot be signed by what it holds.
SIGNATURE_NAME = "model.sig"
# The in-toto statement, one of the artifact's files: of what, by what and how it was made.
STATEMENT_NAME = "provenance.json"
# in-toto's own URI for its statements, and ours for what they tell. docs/provenance.md has the fields.
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cognateforge:provenance:v1"
