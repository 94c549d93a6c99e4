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


@pytest.mark.parametrize("name", readme_tables.TABLES)
def test_the_table_is_what_its_script_writes(name: str) -> None:
    (text,) = (text for text in TEXTS if name in readme_tables.names(text))
    _, _, rest = text.partition(f"<!-- {name}: by benchmarks.readme_tables -->\n")
    shown, _, _ = rest.partition(f"\n<!-- /{name} -->")
    assert shown == readme_tables.TABLES[name]()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("no table here", "no marks"),
        ("<!-- costs: by benchmarks.readme_tables -->\n<!-- /costs -->", "no table costs"),
        ("<!-- models: by benchmarks.readme_tables -->\n", "models lacks the line <!-- /models"),
    ],
)
def test_other_marks_are_refused_before_anything_is_written(
    text: str,
    wrong: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole.md", tmp_path / "broken.md"
    before = "<!-- versus_epyc: by benchmarks.readme_tables -->\nold\n<!-- /versus_epyc -->\n"
    whole.write_text(before, encoding="utf-8")
    broken.write_text(text, encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["readme_tables", str(whole), str(broken)])
    with pytest.raises(SystemExit):
        readme_tables.main()
    assert wrong in capsys.readouterr().err
    assert whole.read_text(encoding="utf-8") == before
