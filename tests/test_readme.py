"""The README's examples run as they stand there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
ELSEWHERE = "penzai"  # tests/models/test_penzai.py runs that example, and checks what it made


@pytest.mark.parametrize("code", [code for code in EXAMPLES if ELSEWHERE not in code])
def test_an_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_there_are_five_examples():
    assert len(EXAMPLES) == 5
    assert sum(ELSEWHERE in code for code in EXAMPLES) == 1
