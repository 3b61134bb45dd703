"""Where a main training keeps its state between epochs: a file of the main model storage."""

from __future__ import annotations

from dataclasses import dataclass

from models_store.errors import StoreError
from models_store.files import MAIN_MODELS, delete_file, read_unverified, replace_file


@dataclass(frozen=True)
class StoredCheckpoint:
    """A ``training_checkpoint.Checkpoint`` at a name of the main model storage; it carries its own sums."""

    path: str

    def load(self) -> bytes | None:
        try:
            return read_unverified(alias=MAIN_MODELS, path=self.path)
        except StoreError as error:
            if error.code == "missing_file":
                return None
            raise

    def save(self, data: bytes) -> None:
        replace_file(alias=MAIN_MODELS, path=self.path, data=data)

    def clear(self) -> None:
        delete_file(alias=MAIN_MODELS, path=self.path)
