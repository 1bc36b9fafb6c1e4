"""RealCustom++: the subject of an image becomes one real word of a prompt.

Light names (`Request`, `Subject`, configurations) are imported here; everything that needs torch is loaded on first
use, so that a client or a web page can build a request without loading a model library.
"""

from importlib import import_module

from .config import MethodConfig, RealCustomConfig, SamplingDefaults
from .request import Request, Subject

_LAZY = {
    "AlternatingDPMSolverScheduler": "scheduler",
    "Generation": "generation",
    "RealCustomAdapter": "adapter",
    "RealCustomOutput": "pipeline",
    "RealCustomPipeline": "pipeline",
    "apply_memory_tier": "memory",
}

__all__ = ["MethodConfig", "RealCustomConfig", "Request", "SamplingDefaults", "Subject", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
