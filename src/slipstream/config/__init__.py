"""What was asked (`EngineConfig`) and what the checkpoint says (`ModelConfig`). Both frozen; no torch."""

from slipstream.config.engine import EngineConfig
from slipstream.config.model import LayerConfig, ModelConfig, RopeConfig

__all__ = ["EngineConfig", "LayerConfig", "ModelConfig", "RopeConfig"]
