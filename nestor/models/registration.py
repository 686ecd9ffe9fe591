"""Makes Hugging Face's Auto classes know Nestor, without importing them before someone else does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Auto class module -> our module, which registers with it when it is imported.
REGISTRANTS = {
    "transformers.models.auto.configuration_auto": "nestor.models.configuration",
    "transformers.models.auto.modeling_auto": "nestor.models.decoder",
}


def register_with_hugging_face() -> None:
    """Register with each Auto class now if it is loaded, else as soon as it is.

    Importing transformers' model classes takes seconds, which a program that only asks for `nestor --help`
    should not wait for.
    """
    pending = {}
    for auto, ours in REGISTRANTS.items():
        if auto in sys.modules:
            import_module(ours)
        else:
            pending[auto] = ours
    if pending:
        sys.meta_path.insert(0, _AfterImport(pending))


class _AfterImport(MetaPathFinder):
    """Finds no module itself; once another finder's module is executed, imports the one that waits for it."""

    def __init__(self, pending: dict[str, str]) -> None:
        self.pending = pending

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        waiting = self.pending.pop(fullname, None)
        if waiting is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Wrapped(spec.loader, waiting)
        return spec


class _Wrapped(Loader):
    def __init__(self, loader: Loader, waiting: str) -> None:
        self.loader = loader
        self.waiting = waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What follows sees the module as if it had never been wrapped.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        import_module(self.waiting)
