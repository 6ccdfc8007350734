"""Numbers and tables as text."""

from mnist_exp.formatting import Table


def test_a_table_in_markdown() -> None:
    text = Table(["a|b", "c"], [["x", "<class 'int'>"], ["1\n2", r"\|"]]).markdown()
    assert text.splitlines() == [
        r"| a\|b | c |",
        "| --- | --- |",
        r"| x | \<class 'int'> |",
        r"| 1 2 | \\\| |",
    ]
