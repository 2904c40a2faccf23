"""Files that fairseq-train wrote, whoever ran it: opened safely, understood once, built in one way.

Everything that a checkpoint is asked is a member of ``Checkpoint``.
"""

from ..files import digest
from .average import average
from .build import (
    DTYPES,
    build_model,
    import_user_dir,
    is_autoregressive,
    parse_overrides,
    translation_task,
)
from .checkpoint import (
    SECOND_COPIES,
    Checkpoint,
    CheckpointError,
    count_parameters,
    refuse_cut_short,
)
from .dictionaries import (
    MISSING,
    Dictionaries,
    VocabularyError,
    first,
    index_map,
    is_padding,
    lacking,
)
from .kinds import LANGUAGE_MODEL, SPEECH, TRANSCRIPT, TRANSLATION, Kind, kind_of
from .roles import Role
from .tags import FAMILIES, MULTILINGUAL, AskedTags, Tags, family_tags, nearest, parse_symbols
from .tasks import STOCK_OTHERS, reads_as_translation, translates_otherwise
from .torchfile import allow_fairseq_globals

__all__ = [
    "DTYPES",
    "FAMILIES",
    "LANGUAGE_MODEL",
    "MISSING",
    "MULTILINGUAL",
    "SECOND_COPIES",
    "SPEECH",
    "STOCK_OTHERS",
    "TRANSCRIPT",
    "TRANSLATION",
    "AskedTags",
    "Checkpoint",
    "CheckpointError",
    "Dictionaries",
    "Kind",
    "Role",
    "Tags",
    "VocabularyError",
    "allow_fairseq_globals",
    "average",
    "build_model",
    "count_parameters",
    "digest",
    "family_tags",
    "first",
    "import_user_dir",
    "index_map",
    "is_autoregressive",
    "is_padding",
    "kind_of",
    "lacking",
    "parse_overrides",
    "nearest",
    "parse_symbols",
    "reads_as_translation",
    "refuse_cut_short",
    "translates_otherwise",
    "translation_task",
]
