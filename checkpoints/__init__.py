"""Crash-safe, verified storage: every file that the project writes goes through here.

A checkpoint is a folder of safetensors and JSON files with a manifest written last, which holds a digest of
every file and tensor; files that come one by one are listed in their folder's ``digests.json``. Nothing here
runs code from a file, and nothing needs more than torch.
"""

from fulgurite.checkpoints.atomic import (
    publish_folder,
    remove,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)
from fulgurite.checkpoints.audit import FileState, audit, digested_folders
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
    LockedError,
    MismatchError,
    MissingError,
    RefusedError,
    WriteError,
)
from fulgurite.checkpoints.listing import LISTING_NAME
from fulgurite.checkpoints.lock import writing
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from fulgurite.checkpoints.retention import retain
from fulgurite.checkpoints.runs import list_checkpoints, naming_another, new_run, newest_checkpoint, newest_good
from fulgurite.checkpoints.store import Report, load_document, load_tensors, save_checkpoint_folder, verify
from fulgurite.checkpoints.treejson import join, split
from fulgurite.checkpoints.unpickle import load_pickle

__all__ = [
    "LISTING_NAME",
    "MANIFEST_NAME",
    "CheckpointError",
    "DamagedError",
    "FileState",
    "LockedError",
    "Manifest",
    "MismatchError",
    "MissingError",
    "RefusedError",
    "Report",
    "WriteError",
    "audit",
    "digest_of_bytes",
    "digest_of_file",
    "digest_of_json",
    "digest_of_state",
    "digest_of_tensor",
    "digested_folders",
    "join",
    "list_checkpoints",
    "load_document",
    "load_pickle",
    "load_tensors",
    "naming_another",
    "new_run",
    "newest_checkpoint",
    "newest_good",
    "publish_folder",
    "read_manifest",
    "remove",
    "remove_leftovers",
    "retain",
    "save_checkpoint_folder",
    "split",
    "verify",
    "write_bytes",
    "write_json",
    "write_text",
    "writing",
]
