"""RealCustom++: subject-driven image customization with real words.

Request and configuration types are imported here. Everything that needs torch is loaded on first use, so that a client
or a web page can build a request without importing a model library.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .config import MethodConfig, RealCustomConfig, SamplingDefaults
from .request import Request, ResolvedRequest, Subject

if TYPE_CHECKING:
    from .adapter import RealCustomAdapter
    from .generation import Generation
    from .memory import apply_memory_tier
    from .pipeline import RealCustomOutput, RealCustomPipeline
    from .scheduler import AlternatingDPMSolverScheduler

__all__ = [
    "AlternatingDPMSolverScheduler",
    "Generation",
    "MethodConfig",
    "RealCustomAdapter",
    "RealCustomConfig",
    "RealCustomOutput",
    "RealCustomPipeline",
    "Request",
    "ResolvedRequest",
    "SamplingDefaults",
    "Subject",
    "apply_memory_tier",
]

_LAZY = {
    "AlternatingDPMSolverScheduler": "scheduler",
    "Generation": "generation",
    "RealCustomAdapter": "adapter",
    "RealCustomOutput": "pipeline",
    "RealCustomPipeline": "pipeline",
    "apply_memory_tier": "memory",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
