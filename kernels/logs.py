"""Log lines that would otherwise come with every trace."""

import functools
import logging


@functools.cache
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log `message`, the first time in a process that `logger` is given it at this level."""
    logger.log(level, message)
