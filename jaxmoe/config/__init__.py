"""A run's configuration: one YAML file, validated before anything is loaded."""

from jaxmoe.config.data import DataConfig, MixedSourceConfig, TrainOnConfig, TrainTokenizer
from jaxmoe.config.run import RunConfig, load_config, recorded_config
from jaxmoe.config.sections import (
    AdapterConfig,
    BalanceConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "BalanceConfig",
    "DataConfig",
    "MeshConfig",
    "MixedSourceConfig",
    "ModelConfig",
    "OptimizerConfig",
    "QuantizationConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainOnConfig",
    "TrainTokenizer",
    "load_config",
    "recorded_config",
]
