"""What a command that fails says."""

from click.testing import Result


def fails(result: Result, code: int, *words: str) -> None:
    """Hold that it is one line with these words, and an exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("mbq-cluster: ")
    for word in words:
        assert word in lines[0]
