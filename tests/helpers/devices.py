"""Several devices on one CPU, for this process or for those that tests start."""


def xla_flags(count: int) -> str:
    """XLA_FLAGS for so many devices.

    The training step has its scheduler set (`jaxmoe.training.step`), which jax 0.10 forgets of what it takes from its
    cache of compiled functions.
    """
    return f"--xla_force_host_platform_device_count={count} --xla_cpu_enable_concurrency_optimized_scheduler=false"
