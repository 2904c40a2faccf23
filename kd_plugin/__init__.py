"""kd_plugin: knowledge distillation, as a fairseq ``--user-dir``.

Importing it registers the tasks ``kd_translation``, ``kd_translation_multi_simple_epoch``,
``kd_language_modeling`` and ``kd_speech_to_text`` and the criterion
``kd_label_smoothed_cross_entropy``, and lets torch open
fairseq's checkpoints safely.
"""

import logging

# On import, fairseq turns the root logger to DEBUG; then one task asks for tensorboardX in every
# process anew.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)

try:
    import fairseq  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kd_plugin is a plugin for fairseq, and `import fairseq` failed here ({error}). Install "
        "it beside the plugin: pip install 'kd_plugin[fairseq]' chooses fairseq 0.12.2 for "
        "Python 3.8 to 3.10 and ve-fairseq 0.12.3 (the same package, newer) for 3.11 and 3.12."
    ) from error

from .checkpoints import allow_fairseq_globals  # noqa: E402

allow_fairseq_globals()

from . import criterion, tasks  # noqa: E402, F401

__version__ = "0.1.0"
