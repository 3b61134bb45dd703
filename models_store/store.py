"""The store: everything that is read from and written to the two model storages, in one place to import from.

``files`` knows names and bytes, ``version_files`` a main version's folder, ``tail_files`` flat tails,
``delta_files`` deltas by the thousand.
"""

from models_store.delta_files import DeltaFile, DeltaReader, VerifiedDelta, read_part
from models_store.errors import StoreError
from models_store.files import (
    ALIASES,
    LEARNER_MODELS,
    MAIN_MODELS,
    StoredFile,
    checksum,
    delete_file,
    list_files,
    read_file,
    read_unverified,
    replace_file,
    write_file,
    write_files,
)
from models_store.tail_files import (
    TailToWrite,
    learner_folder,
    read_aggregate,
    read_delta,
    read_tail,
    read_tail_file,
    write_aggregate,
    write_delta,
    write_tail,
    write_tails,
)
from models_store.version_files import (
    LoadedVersion,
    VersionFiles,
    clear_loaded_versions,
    load_version,
    read_active_pointer,
    read_manifest,
    write_active_pointer,
    write_version_files,
)

__all__ = [
    "ALIASES",
    "LEARNER_MODELS",
    "MAIN_MODELS",
    "DeltaFile",
    "DeltaReader",
    "LoadedVersion",
    "StoreError",
    "StoredFile",
    "TailToWrite",
    "VerifiedDelta",
    "VersionFiles",
    "checksum",
    "clear_loaded_versions",
    "delete_file",
    "learner_folder",
    "list_files",
    "load_version",
    "read_active_pointer",
    "read_aggregate",
    "read_delta",
    "read_file",
    "read_manifest",
    "read_part",
    "read_tail",
    "read_tail_file",
    "read_unverified",
    "replace_file",
    "write_active_pointer",
    "write_aggregate",
    "write_delta",
    "write_file",
    "write_files",
    "write_tail",
    "write_tails",
    "write_version_files",
]
