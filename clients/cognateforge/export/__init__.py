"""Exports of a fetched model or agent, for tools that know nothing of this project: an OCI image, or a folder.

    source = open_artifact(Path("intent-router"))
    write_oci(source, Path("intent-router.tar"), tar=True)
    write_folder(source, Path("for-transformers"))

Pure Python: no tensor library is needed. Every file is compared with its digest before anything is written, and what is
written is there whole, or not at all.
"""

from cognateforge.export.artifact import Artifact, Exported, open_artifact, require_free
from cognateforge.export.folder import write_folder
from cognateforge.export.oci import write_oci

__all__ = ["Artifact", "Exported", "open_artifact", "require_free", "write_folder", "write_oci"]
