"""Helpers that several files share are imported by their names."""

import importlib.util
import sys
from pathlib import Path

for name in ("masked_net", "mask_ranks"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
