"""The README says what the code does: its tables of keys and of supported models, and its example of a run."""

import re

import pytest
import yaml
from helpers.readme import README, TABLES, place_of

from jaxmoe.config import RunConfig

pytestmark = pytest.mark.once  # What the tables say of keys and of published models has no version in it.


@pytest.mark.parametrize("table", TABLES)
def test_table_is_that_of_the_code(table):
    text = README.read_text(encoding="utf-8")
    start, stop = place_of(table, text)
    assert text[start:stop] == TABLES[table](), "run: make readme"


def test_example_is_a_valid_run():
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert RunConfig.from_mapping(yaml.safe_load(example)).train.accumulation == 4
