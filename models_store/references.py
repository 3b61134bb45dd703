"""Which files the rows point to: what verification checks, and what garbage collection must leave alone.

Each app that stores files registers a source in ``AppConfig.ready``: which names are its own, and which of them its rows
point to. A file that no source owns is reported and never deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from models_store.errors import StoreError
from models_store.files import LEARNER_MODELS, MAIN_MODELS
from models_store.models import CurriculumPreparation, MainModelVersion, PersonalizedModel, VersionStatus
from models_store.version_files import ACTIVE_POINTER, ENCODER_JSON, ENCODER_TENSORS, MANIFEST, VERSION_FILES, read_manifest


@dataclass(frozen=True)
class FileReference:
    """A file that a row points to.

    Attributes:
        sha256: empty where no row keeps it: then only its being there is checked.
        required: False for what may be there and is no garbage, such as the checkpoint of a training that goes on.
    """

    alias: str
    path: str
    sha256: str = ""
    required: bool = True


@dataclass(frozen=True)
class ReferenceSource:
    """One kind of files.

    Attributes:
        name: unique.
        alias: of the storage.
        owned: pattern that a whole name matches exactly when it is of this kind.
        references: the files that rows point to now.
    """

    name: str
    alias: str
    owned: re.Pattern[str]
    references: Callable[[], Iterable[FileReference]]


_sources: dict[str, ReferenceSource] = {}


def register_source(source: ReferenceSource) -> None:
    """Make a kind of files known; registering the same name again replaces it."""
    _sources[source.name] = source


def is_owned(alias: str, path: str) -> bool:
    """Whether a registered source knows this kind of file."""
    return any(source.alias == alias and source.owned.fullmatch(path) for source in _sources.values())


def all_references() -> Iterator[FileReference]:
    """Every file that a row points to."""
    for source in _sources.values():
        yield from source.references()


def checkpoint_path(fingerprint: str) -> str:
    """Where a main training keeps its state until its version is complete."""
    return f"checkpoints/{fingerprint[:16]}.checkpoint"


def register_own_sources() -> None:
    """The kinds of files of this app."""
    register_source(ReferenceSource("active pointer", MAIN_MODELS, re.compile(re.escape(ACTIVE_POINTER)), _pointer_reference))
    version_names = "|".join(re.escape(name) for name in VERSION_FILES)
    versions = re.compile(rf"aivo-main-v\d+(\.\d+)?/({version_names})")
    register_source(ReferenceSource("versions", MAIN_MODELS, versions, _version_references))
    prepared = re.compile(r"prepared/[0-9a-f]{8,64}/(encoder\.json|encoder\.safetensors)")
    register_source(ReferenceSource("preparations", MAIN_MODELS, prepared, _preparation_references))
    checkpoints = re.compile(r"checkpoints/[0-9a-f]{16}\.checkpoint")
    register_source(ReferenceSource("checkpoints", MAIN_MODELS, checkpoints, _checkpoint_references))
    tails = re.compile(r"id-[A-Za-z0-9_-]+/v\d{4,}-[0-9a-f]{8}\.safetensors")
    register_source(ReferenceSource("tails", LEARNER_MODELS, tails, _tail_references))


def _pointer_reference() -> Iterator[FileReference]:
    yield FileReference(MAIN_MODELS, ACTIVE_POINTER, required=False)


def _version_references() -> Iterator[FileReference]:
    rows = MainModelVersion.objects.exclude(model_path="").values_list("model_path", "manifest_sha256")
    for folder, manifest_sha256 in rows.iterator():
        yield FileReference(MAIN_MODELS, f"{folder}/{MANIFEST}", manifest_sha256)
        try:
            sums = {name: str(entry["sha256"]) for name, entry in _files_of(folder, manifest_sha256).items()}
        except StoreError:
            # The manifest is reported as missing or damaged itself; its files must not be taken for garbage.
            sums = dict.fromkeys(set(VERSION_FILES) - {MANIFEST}, "")
        for name, sha256 in sorted(sums.items()):
            yield FileReference(MAIN_MODELS, f"{folder}/{name}", sha256)


def _files_of(folder: str, manifest_sha256: str) -> dict[str, dict[str, str]]:
    files: dict[str, dict[str, str]] = read_manifest(model_path=folder, sha256=manifest_sha256)["files"]
    return files


def _preparation_references() -> Iterator[FileReference]:
    for folder, report in CurriculumPreparation.objects.values_list("path", "report").iterator():
        sums = report.get("files", {})
        for name in (ENCODER_JSON, ENCODER_TENSORS):
            yield FileReference(MAIN_MODELS, f"{folder}/{name}", sums.get(name, ""))


def _checkpoint_references() -> Iterator[FileReference]:
    rows = MainModelVersion.objects.filter(status=VersionStatus.TRAINING)
    for fingerprint in rows.values_list("training_fingerprint", flat=True):
        if fingerprint:
            yield FileReference(MAIN_MODELS, checkpoint_path(fingerprint), required=False)


def _tail_references() -> Iterator[FileReference]:
    rows = PersonalizedModel.objects.values_list("weights_path", "weights_sha256", "metadata")
    for path, sha256, metadata in rows.iterator():
        if path:
            yield FileReference(LEARNER_MODELS, path, sha256)
        for rebase in metadata.get("rebases", []):
            earlier = rebase.get("previous_weights_path")
            if earlier and earlier != path:
                yield FileReference(LEARNER_MODELS, earlier, rebase.get("previous_weights_sha256", ""))
