"""Files that fairseq-train wrote, whoever ran it: opened safely, understood once, built in one way.

Everything that a checkpoint is asked is a member of ``Checkpoint``.
"""

from ..files import digest
from .average import average, is_computed
from .build import (
    DTYPES,
    TRANSFORMER,
    build_model,
    import_user_dir,
    is_autoregressive,
    new_model,
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
    name_of,
    some,
)
from .kinds import (
    FEATURES,
    LANGUAGE_MODEL,
    MULTILINGUAL_TRANSLATION,
    SPEECH,
    TAUGHT,
    TRANSCRIPT,
    TRANSLATION,
    Kind,
    kind_of,
)
from .roles import Role
from .tags import (
    EACH_DIRECTION,
    FAMILIES,
    MULTILINGUAL,
    SIMPLE_EPOCH,
    AskedTags,
    Tags,
    added_symbols,
    family_tags,
    nearest,
    parse_symbols,
    tags_of,
)
from .tasks import STOCK_OTHERS, reads_as_translation, translates_otherwise, untaught
from .torchfile import allow_fairseq_globals

__all__ = [
    "DTYPES",
    "EACH_DIRECTION",
    "FAMILIES",
    "FEATURES",
    "LANGUAGE_MODEL",
    "MISSING",
    "MULTILINGUAL",
    "MULTILINGUAL_TRANSLATION",
    "SECOND_COPIES",
    "SIMPLE_EPOCH",
    "SPEECH",
    "STOCK_OTHERS",
    "TAUGHT",
    "TRANSCRIPT",
    "TRANSFORMER",
    "TRANSLATION",
    "AskedTags",
    "Checkpoint",
    "CheckpointError",
    "Dictionaries",
    "Kind",
    "Role",
    "Tags",
    "VocabularyError",
    "added_symbols",
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
    "is_computed",
    "is_padding",
    "kind_of",
    "lacking",
    "name_of",
    "nearest",
    "new_model",
    "parse_overrides",
    "parse_symbols",
    "reads_as_translation",
    "refuse_cut_short",
    "some",
    "tags_of",
    "translates_otherwise",
    "translation_task",
    "untaught",
]
