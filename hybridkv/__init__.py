"""HybridKV (arXiv 2604.05887) in PyTorch: a key-value cache whose heads are pruned or retrieved, whichever suits them.

The method, in the order in which data flows: `profile`, `classify`, `budget`, `prune`, `retrieve`, `plan`,
`policies`, `pages`, `pack`, `attention`, `cache`, `decode`.
"""

from hybridkv.cache.capacity import Capacity
from hybridkv.cache.dense import DenseCache
from hybridkv.cache.hybrid import CacheBytes, HybridCache
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Result, Stats
from hybridkv.planning.budget import BudgetError
from hybridkv.planning.plan import Plan, full_plan, hybrid_plan
from hybridkv.planning.prefill import Prefill
from hybridkv.sampling import Sampling

__all__ = [
    "BudgetError",
    "CacheBytes",
    "Capacity",
    "DenseCache",
    "Engine",
    "HybridCache",
    "HybridConfig",
    "Plan",
    "Prefill",
    "Result",
    "Sampling",
    "Stats",
    "full_plan",
    "hybrid_plan",
]
