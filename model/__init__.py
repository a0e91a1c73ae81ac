"""A minimal Qwen2.5-VL, written from scratch: `from_pretrained` loads it, `Processor` prepares what it reads."""

from model.checkpoint import from_pretrained
from model.config import CheckpointError, Config, VisionConfig
from model.decoder import Model
from model.processing import InputError, Processor, Prompt

__all__ = ["CheckpointError", "Config", "InputError", "Model", "Processor", "Prompt", "VisionConfig", "from_pretrained"]
