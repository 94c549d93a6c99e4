"""The tables of the README and of the benchmarks' are those of the results beside them."""

import pathlib

import pytest

from benchmarks import readme_tables

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
TEXTS = [path.read_text(encoding="utf-8") for path in DOCUMENTS]


def test_each_table_stands_in_one_place() -> None:
    names = [name for text in TEXTS for name in readme_tables.names(text)]
    assert sorted(names) == sorted(readme_tables.TABLES)
    marks = sum(text.count("by benchmarks.readme_tables -->") for text in TEXTS)
    assert marks == len(names), "one has no end"


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_the_table_is_what_its_script_writes(name: str) -> None:
    (text,) = (text for text in TEXTS if name in readme_tables.names(text))
    _, _, rest = text.partition(f"<!-- {name}: by benchmarks.readme_tables -->\n")
    shown, _, _ = rest.partition(f"\n<!-- /{name} -->")
    assert shown == readme_tables.TABLES[name]()
