"""Tasks with a teacher: every module here registers its own when it is imported.

fairseq imports them by itself for ``--user-dir``; this does it for whoever imports the package.
"""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
