"""What is said of errors that are not ours."""

import pytest

from mbq.artifacts.errors import first_line


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
