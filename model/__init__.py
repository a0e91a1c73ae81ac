"""A minimal Qwen2.5-VL, written from scratch: `from_pretrained` loads it, `Processor` prepares what it reads."""

from hybridkv.model.checkpoint import from_pretrained
from hybridkv.model.config import CheckpointError, Config, VisionConfig
from hybridkv.model.decoder import Model
from hybridkv.model.processing import InputError, Processor, Prompt

__all__ = ["CheckpointError", "Config", "InputError", "Model", "Processor", "Prompt", "VisionConfig", "from_pretrained"]
