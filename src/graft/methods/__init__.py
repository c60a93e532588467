"""What the papers add: one folder an axis, one file a method. Importing this package fills the catalogue."""

import importlib
import pkgutil

for _axis in ("deltas", "init", "allocation", "optimisers"):  # deltas first: the others compose them
    _package = importlib.import_module(f"{__name__}.{_axis}")
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)
