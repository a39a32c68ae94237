"""A line is logged once, and not twice or never."""

import logging

from jaxmoe.kernels.logs import log_once


def test_a_line_is_logged_once_for_each_logger_and_level(caplog):
    caplog.set_level(logging.INFO)
    one, other = logging.getLogger("one"), logging.getLogger("other")
    log_once.cache_clear()
    for _ in range(2):
        log_once(one, logging.INFO, "a")
        log_once(one, logging.WARNING, "a")
        log_once(one, logging.INFO, "b")
        log_once(other, logging.INFO, "a")
    assert caplog.record_tuples == [
        ("one", logging.INFO, "a"),
        ("one", logging.WARNING, "a"),
        ("one", logging.INFO, "b"),
        ("other", logging.INFO, "a"),
    ]
