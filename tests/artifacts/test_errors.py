"""What is said of errors that are not ours."""

import pytest

from mbq.artifacts.errors import first_line, printable


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("disk full\nat /dev/sda", "disk full"),
        (
            "\n  loading failed:\n\tsize mismatch for weight\n\tand more",
            "loading failed: size mismatch for weight",
        ),
        ("loading failed:", "loading failed:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_of_a_foreign_error(message: str, said: str) -> None:
    assert first_line(ValueError(message)) == said


def test_nothing_that_a_terminal_obeys_is_shown() -> None:
    assert printable("caf\u00e9 \u2264 8\nx") == "caf\u00e9 \u2264 8\nx"
    assert printable("a\x1b]0;title\x07b\x9b1m\u202e") == "a\ufffd]0;title\ufffdb\ufffd1m\ufffd"
