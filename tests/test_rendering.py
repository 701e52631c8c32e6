"""Chat templates: what transformers makes of them, and what a hostile one may not do."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from scorer.errors import TemplateFailed
from scorer.rendering import Renderer

MESSAGES = [{"role": "user", "content": " <é>\n"}, {"role": "assistant", "content": "b"}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ dict(a=ns.n) }}",
    "{{ messages | tojson(indent=2, sort_keys=true) }}{{ add_generation_prompt }}",
]
HOSTILE = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
    (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "processor|memory",
    ),
    ("{{ 'a' * 10 ** 9 }}", "memory"),
    ("{{ '{:>1000000000}'.format('a') }}", "memory"),
    ("{{ 'a' | center(10 ** 9) }}", "memory"),
    ("{% for a in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "characters"),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "deeply"),
    ("{{ ().__class__.__bases__ }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "loader"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ raise_exception('roles') }}", "roles"),
    ("{% if", "line 1"),
]


@pytest.fixture(scope="module")
def renderer():
    made = Renderer(workers=1, max_seconds=0.5)
    yield made
    made.close()


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_gives_what_transformers_gives(renderer, template):
    theirs, _ = render_jinja_template(conversations=[MESSAGES], chat_template=template)
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    assert renderer.render(template, variables) == theirs[0]


@pytest.mark.parametrize(("template", "says"), HOSTILE)
def test_a_hostile_template_is_stopped_and_the_next_one_is_rendered(renderer, template, says):
    with pytest.raises(TemplateFailed, match=says):
        renderer.render(template, {"messages": MESSAGES})
    assert renderer.render("{{ x }}", {"x": "\ud800é"}) == "\ud800é"
