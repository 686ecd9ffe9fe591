"""Makes Hugging Face's Auto classes know Nestor, without importing them before someone else does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register_config(module: ModuleType) -> None:
    from nestor.models.configuration import NestorConfig

    module.AutoConfig.register(NestorConfig.model_type, NestorConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from nestor.models.configuration import NestorConfig
    from nestor.models.decoder import NestorForCausalLM

    module.AutoModelForCausalLM.register(NestorConfig, NestorForCausalLM, exist_ok=True)


ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


def register_with_hugging_face() -> None:
    """Register with each Auto class now if it is loaded, else as soon as it is.

    Importing transformers' model classes takes seconds, which a program that only asks for `nestor --help` should
    not wait for.
    """
    pending = {}
    for name, action in ACTIONS.items():
        module = sys.modules.get(name)
        if module is None:
            pending[name] = action
        else:
            action(module)
    if pending:
        sys.meta_path.insert(0, _AfterImport(pending))


class _AfterImport(MetaPathFinder):
    """Finds no module itself; calls an action once after another finder's module has been executed."""

    def __init__(self, pending: dict[str, Callable[[ModuleType], None]]) -> None:
        self.pending = pending

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        action = self.pending.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Wrapped(spec.loader, action)
        return spec


class _Wrapped(Loader):
    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What follows sees the module as if it had never been wrapped.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action(module)
