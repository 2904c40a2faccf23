"""Models that need no plugin, for other software or stock fairseq, verified to be the same.

``make`` does all of it; a further format is a file like ``fairseq.py`` and a line in
``pipeline.FORMATS``.
"""

from .ctranslate2 import QUANTIZATIONS, export_ctranslate2, read_record
from .fairseq import model_arguments, stock_state, write
from .formats import ExportError, Format, flag_name
from .pipeline import FORMATS, Asked, languages_of, make

__all__ = [
    "FORMATS",
    "QUANTIZATIONS",
    "Asked",
    "ExportError",
    "Format",
    "export_ctranslate2",
    "flag_name",
    "languages_of",
    "make",
    "model_arguments",
    "read_record",
    "stock_state",
    "write",
]
