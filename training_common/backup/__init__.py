"""Backups of a service: database and bytes of its artifacts, into a folder or an object store, and back from there."""
