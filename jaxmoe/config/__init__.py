"""A run's configuration: one YAML file, validated before anything is loaded."""

from jaxmoe.config.run import RunConfig, load_config, recorded_config
from jaxmoe.config.sections import (
    AdapterConfig,
    BalanceConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    SampleConfig,
    TrainConfig,
    TrainTokenizer,
)

__all__ = [
    "AdapterConfig",
    "BalanceConfig",
    "DataConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "QuantizationConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainTokenizer",
    "load_config",
    "recorded_config",
]
