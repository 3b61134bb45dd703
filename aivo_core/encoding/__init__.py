"""Interactions to features and labels."""

from aivo_core.encoding.columns import COLUMN_GROUPS, OVERFLOW_SLOT, SCALED_COLUMNS, SLOTS, group_of
from aivo_core.encoding.encoder import Encoder, Prediction
from aivo_core.encoding.errors import EncodingError
from aivo_core.encoding.events import Event
from aivo_core.encoding.fit import FittedEncoder, fit_encoder
from aivo_core.encoding.labels import PATHS, path_name
from aivo_core.encoding.state import EncoderState

__all__ = [
    "COLUMN_GROUPS",
    "OVERFLOW_SLOT",
    "PATHS",
    "SCALED_COLUMNS",
    "SLOTS",
    "Encoder",
    "EncoderState",
    "EncodingError",
    "Event",
    "FittedEncoder",
    "Prediction",
    "fit_encoder",
    "group_of",
    "path_name",
]
