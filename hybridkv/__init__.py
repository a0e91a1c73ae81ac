"""HybridKV (arXiv 2604.05887) in PyTorch: a key-value cache whose heads are pruned or retrieved, whichever suits them.

What decides is in `planning`: prefill, classify, budget, prune, plan, policies. What holds and reads is in `cache`:
capacity, pack, sketch, retrieve, attention, hybrid. `engine` and `decode` put them to work.
"""

from hybridkv.cache.capacity import Capacity
from hybridkv.cache.dense import DenseCache
from hybridkv.cache.hybrid import CacheBytes, HybridCache
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Result, Stats
from hybridkv.planning.budget import BudgetError
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Plan, budgeted_plan, full_plan, hybrid_plan
from hybridkv.planning.prefill import LayerProfile, Prefill
from hybridkv.profiles import builtin_profile
from hybridkv.reading import Question, Reading
from hybridkv.sampling import Sampling
from hybridkv.version import __version__

__all__ = [
    "BudgetError",
    "CacheBytes",
    "Capacity",
    "DenseCache",
    "Engine",
    "HeadProfile",
    "HybridCache",
    "HybridConfig",
    "LayerProfile",
    "Plan",
    "Prefill",
    "Question",
    "Reading",
    "Result",
    "Sampling",
    "Stats",
    "__version__",
    "budgeted_plan",
    "builtin_profile",
    "full_plan",
    "hybrid_plan",
]
