"""Environments by registered name. Free of torch; a server asks it through `agent_server.rl.lookup`.

    CartPole-v1             Gymnasium's own registry
    my_games:Maze-v0        the same, after a module that registers it; only modules that the settings list
    sisl/pursuit_v5         PettingZoo's own registry of parallel environments
    mpe2/simple_spread_v3   a module `simple_spread_v3` with a `parallel_env`, in a package that the settings list

A name imports nothing that an operator has not installed and, beyond the two registries, listed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterable
from importlib import util
from typing import Any

from cognateforge.exceptions import FieldViolation, InvalidFieldError

# PettingZoo's particle environments are a package of their own now, and keep their old namespace.
_RENAMED = {"mpe": "mpe2"}
_MOST_MATCHES = 3
# PettingZoo's registry spells simple_spread_v3 as simple_spread-v3, and takes both.
_VERSION = re.compile(r"_v(\d+)$")
# By which keyword environments take how many agents act, the first that they have.
_COUNT_KEYWORDS = ("N", "num_agents", "n_agents", "n_pursuers", "n_walkers", "n_pistons")


def require_environment(task: str, name: str, *, modules: Collection[str], field: str) -> None:
    """Refuse a name that this server has no environment for.

    task: reinforcement or multi_agent. modules: what the operator allows beside the registries.
    Errors: InvalidFieldError, which names `field`.
    """
    (require_single if task == "reinforcement" else require_parallel)(name, modules=modules, field=field)


def require_single(name: str, *, modules: Collection[str], field: str) -> None:
    """Refuse what is no name of a Gymnasium environment. Errors: InvalidFieldError."""
    import gymnasium

    module, _, registered = name.rpartition(":")
    if module:
        _import_listed(module, modules, name, field)
    registry = gymnasium.registry
    if registered not in registry:
        raise _unknown(name, registered, registry, "Gymnasium", field)


def require_parallel(name: str, *, modules: Collection[str], field: str) -> None:
    """Refuse what is no name of a parallel environment of PettingZoo's form. Errors: InvalidFieldError."""
    known = _parallel_names(modules)
    if _module_name(name, modules) is None and _VERSION.sub(r"-v\1", name) not in _registered_parallel():
        package = _RENAMED.get(name.partition("/")[0], name.partition("/")[0])
        if "/" in name and package not in modules and _installed(package):
            raise _refused(
                field, f"{name!r} is in the package {package}, which the settings' environments.modules do not list"
            )
        raise _unknown(name, name, known, "PettingZoo", field)


def make_single(name: str, *, modules: Collection[str], field: str = "environment") -> Any:
    """Return a Gymnasium environment. Errors: InvalidFieldError."""
    import gymnasium

    require_single(name, modules=modules, field=field)
    try:
        return gymnasium.make(name)
    except gymnasium.error.Error as error:
        raise _refused(field, f"{name!r} cannot be made here: {error}") from error


def make_parallel(name: str, agents: int, *, modules: Collection[str], field: str = "environment") -> Any:
    """Return a parallel environment of so many agents. Errors: InvalidFieldError."""
    require_parallel(name, modules=modules, field=field)
    module = _module_name(name, modules)
    try:
        environment = _made_parallel(name, module, {})
        if len(environment.possible_agents) == agents:
            return environment
        keyword = _count_keyword(environment)
        if keyword:
            environment.close()
            environment = _made_parallel(name, module, {keyword: agents})
    except ImportError as error:
        raise _refused(field, f"{name!r} cannot be made here: {error}") from error
    acting = len(environment.possible_agents)
    if acting != agents:
        environment.close()
        raise _refused(field.replace("environment", "agents"), f"must be {acting} for {name}, not {agents}")
    return environment


def _made_parallel(name: str, module: str | None, options: dict[str, int]) -> Any:
    if module is not None:
        return importlib.import_module(module).parallel_env(**options)
    from pettingzoo.env_registry import exceptions, registration

    try:
        return registration.make("parallel", name, **options)
    except exceptions.PettingZooRegistryError as error:
        raise ImportError(str(error)) from error


def _count_keyword(environment: Any) -> str:
    parameters = inspect.signature(type(environment.unwrapped).__init__).parameters
    return next((keyword for keyword in _COUNT_KEYWORDS if keyword in parameters), "")


def _registered_parallel() -> Collection[str]:
    from pettingzoo.env_registry import registration

    names: Collection[str] = registration.parallel_registry
    return names


def _module_name(name: str, modules: Collection[str]) -> str | None:
    """Return the module of a name like "package/module" in a listed package, or None."""
    package, _, module = name.partition("/")
    package = _RENAMED.get(package, package)
    if package not in modules or not module.isidentifier() or module.startswith("_") or not _installed(package):
        return None
    full = f"{package}.{module}"
    return full if util.find_spec(full) is not None else None


def _parallel_names(modules: Iterable[str]) -> list[str]:
    return [*_registered_parallel(), *(f"{package}/{name}" for package in modules for name in _versioned(package))]


def _versioned(package: str) -> list[str]:
    """Return a package's modules whose name has a version, as environments' have."""
    spec = util.find_spec(package) if _installed(package) else None
    if spec is None or spec.submodule_search_locations is None:
        return []
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return [module.name for module in found if not module.ispkg and "_v" in module.name]


def _installed(package: str) -> bool:
    try:
        return all(map(str.isidentifier, package.split("."))) and util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _import_listed(module: str, modules: Collection[str], name: str, field: str) -> None:
    if module not in modules:
        raise _refused(field, f"{name!r} would import {module}, which the settings' environments.modules do not list")
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise _refused(field, f"{name!r} needs the module {module}: {error}") from error


def _unknown(name: str, looked_for: str, known: Iterable[str], registry: str, field: str) -> InvalidFieldError:
    close = difflib.get_close_matches(looked_for, list(known), n=_MOST_MATCHES, cutoff=0.5)
    remedy = f"; close to it: {', '.join(close)}" if close else ""
    return _refused(field, f"{registry} has no environment {name!r} on this server{remedy}")


def _refused(field: str, description: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"{field}: {description}", violations=[FieldViolation(field=field, description=description)]
    )
