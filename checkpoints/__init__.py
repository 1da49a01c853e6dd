"""Crash-safe, verified storage: every file that the project writes goes through here.

A checkpoint is a folder of safetensors and JSON files with a manifest written last, which holds a digest of
every file and tensor. Nothing here runs code from a file, and nothing needs more than torch.
"""

from fulgurite.checkpoints.atomic import (
    publish_folder,
    remove,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)
from fulgurite.checkpoints.digest import (
    digest_of_bytes,
    digest_of_file,
    digest_of_json,
    digest_of_state,
    digest_of_tensor,
)
from fulgurite.checkpoints.errors import (
    CheckpointError,
    DamagedError,
    MismatchError,
    MissingError,
    RefusedError,
    WriteError,
)
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from fulgurite.checkpoints.runs import list_checkpoints, new_run, newest_checkpoint
from fulgurite.checkpoints.store import Report, load_document, load_tensors, save_checkpoint_folder, verify
from fulgurite.checkpoints.treejson import join, split
from fulgurite.checkpoints.unpickle import load_pickle

__all__ = [
    "MANIFEST_NAME",
    "CheckpointError",
    "DamagedError",
    "Manifest",
    "MismatchError",
    "MissingError",
    "RefusedError",
    "Report",
    "WriteError",
    "digest_of_bytes",
    "digest_of_file",
    "digest_of_json",
    "digest_of_state",
    "digest_of_tensor",
    "join",
    "list_checkpoints",
    "load_document",
    "load_pickle",
    "load_tensors",
    "new_run",
    "newest_checkpoint",
    "publish_folder",
    "read_manifest",
    "remove",
    "remove_leftovers",
    "save_checkpoint_folder",
    "split",
    "verify",
    "write_bytes",
    "write_json",
    "write_text",
]
