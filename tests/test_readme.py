"""The README's tables are those of the results that lie beside it."""

import pathlib

import pytest

from benchmarks import readme_tables

README = pathlib.Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_the_table_is_what_its_script_writes(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    _, _, rest = text.partition(f"<!-- {name}: by benchmarks.readme_tables -->\n")
    shown, end, _ = rest.partition(f"\n<!-- /{name} -->")
    assert end
    assert shown == readme_tables.TABLES[name]()
