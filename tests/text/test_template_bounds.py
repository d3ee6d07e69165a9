"""Bounds on chat templates, rendered in a process of their own: without its bound a template would not end."""

import json
import subprocess
import sys

import pytest

CASES = [
    (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1,000,000 passes",
    ),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested too deeply or calls itself forever"),
    ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "is nested too deeply or calls itself forever"),
    ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    ("{% for i in range(99999) %}{{ 'a' * 1000000 }}{% endfor %}", "its output is longer than 4,000,000"),
    (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "longer than 4,000,000",
    ),
    (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "longer than 4,000,000",
    ),
    ("{% set x %}{% for i in range(9) %}{{ 'a' * 1000000 }}{% endfor %}{% endset %}", "longer than 4,000,000"),
    ("{% set x = 'a' * 10**9 %}", "longer than 4,000,000"),
    ("{% set x = [0] * 10**9 %}", "longer than 4,000,000"),
    ("{% set x = 7 ** (10**9) %}", "a number of more than 4096 bits"),
    ("{{ '%1000000000d' % 1 }}", "a format with a width beyond 1,000,000"),
    ("{{ '%*d' % (1000000000, 1) }}", "a format with a width beyond 1,000,000"),
    ("{{ '%1000000000d'|format(1) }}", "a format with a width beyond 1,000,000"),
    ("{{ '{:1000000000}'.format(1) }}", "a format with a width beyond 1,000,000"),
    ("{{ 'a'.ljust(10**9) }}", "an argument beyond 1,000,000"),
    ("{{ 'a'|center(10**9) }}", "an argument beyond 1,000,000"),
    ("{{ [1]|tojson(indent=10**9) }}", "an argument beyond 1,000,000"),
    ("{% set x = ('a' * 100000).join('b' * 100000) %}", "longer than 4,000,000"),
    ("{% set x = ''.join(['a' * 1000000] * 5000) %}", "longer than 4,000,000"),
    ("{% set x = (['a' * 1000000] * 5000)|join %}", "longer than 4,000,000"),
    ("{% set x = (['a' * 1000000] * 5000)|map('upper')|join('b') %}", "longer than 4,000,000"),
    ("{% set x = ('a' * 60000).replace('a', 'b' * 60000) %}", "longer than 4,000,000"),
    ("{% set x = ('a' * 60000)|replace('a', 'b' * 60000) %}", "longer than 4,000,000"),
    ("{% set x = ('\\n' * 5000)|indent(900000) %}", "longer than 4,000,000"),
    ("{% set x = ('\\t' * 5000).expandtabs(900000) %}", "longer than 4,000,000"),
    ("{% set x = ('{0}' * 5000).format('a' * 900000) %}", "longer than 4,000,000"),
    ("{% set x = ('%(a)s' * 5000) % dict(a='a' * 900000) %}", "longer than 4,000,000"),
    ("{{ ', '.join(['a', 'b']) ~ 'x'.replace('x', 'y') ~ ('%s' % 'z') ~ ('{}'.format(1)) }}", "text: 7 characters"),
    ("{{ (['a', 1]|join('-')) ~ ('ab'|replace('b', 'cc')) ~ (range(2)|map('string')|join) }}", "text: 8 characters"),
    ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
    ("{{ 1 / 0 }}", "division by zero"),
]

RENDER = """
import json, resource, signal, sys
from specsamp_jax.text.chat import render_chat

def interrupt(*_):
    raise KeyboardInterrupt

resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
signal.signal(signal.SIGALRM, interrupt)
for template in json.load(sys.stdin):
    signal.alarm(10)
    try:
        answer = f"text: {len(render_chat(template, [dict(role='user', content='')]))} characters"
    except KeyboardInterrupt:
        answer = "no end within 10 s"
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    signal.alarm(0)
    print(json.dumps(answer[:1000]), flush=True)
"""


@pytest.fixture(scope="module")
def answers():
    """The answer to each template, in order; those of a process that was stopped end at the template that held it."""
    templates = json.dumps([template for template, _ in CASES])
    try:
        run = subprocess.run(
            [sys.executable, "-c", RENDER], input=templates, capture_output=True, text=True, check=False, timeout=90
        )
        return [json.loads(line) for line in run.stdout.splitlines()], run.stderr[-500:]
    except subprocess.TimeoutExpired as stopped:
        output = (stopped.stdout or b"").decode()
        return [json.loads(line) for line in output.splitlines()], "stopped after 90 s"


@pytest.mark.parametrize("index", range(len(CASES)), ids=[sentence for _, sentence in CASES])
def test_a_template_cannot_loop_for_long_or_fill_the_memory(answers, index):
    lines, end = answers
    assert index < len(lines), f"no answer: {end}"
    expected = CASES[index][1]
    assert expected in lines[index]
    assert lines[index].startswith("ValueError: The chat template ") or lines[index] == expected
