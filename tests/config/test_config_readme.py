"""configs/README.md documents every key: its tables are made from the models of psyche.config and their docstrings.

After a change of a key, ``python -m tests.config.test_config_readme`` writes them anew.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from psyche.config import CodecSpec, Node, Run, load_config
from psyche.config.data_config import Filter, MixturePart
from psyche.telemetry.formatting import size
from psyche.tools.costs import SUSTAINED, costs_of

README = Path(__file__).parents[2] / "configs" / "README.md"
CODECS = ("fp32", "int8", "int4", "int2", "topk2e-512", "topk2e-256", "topk2e")
LINES = {"10 Mbit/s": 10e6 / 8, "100 Mbit/s": 100e6 / 8, "1 Gbit/s": 1e9 / 8}
"""Bytes a second in each direction."""


def models(kind: Any, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """``kind`` and every model below it, with the path of its key; variants of a union have one path."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield path, kind
        for name, field in kind.model_fields.items():
            yield from models(field.annotation, f"{path}.{name}")
            for extra in field.metadata:
                yield from models(extra, f"{path}.{name}")
    else:
        for argument in get_args(kind):
            yield from models(argument, path)


def sections() -> dict[type[BaseModel], str]:
    """Every model once, with the path at which it is documented."""
    found: dict[type[BaseModel], str] = {}
    for path, kind in [*models(Run, "run"), *models(Node, "node")]:
        found.setdefault(kind, path)
    return found


def documentation(kind: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field, on one line, in Markdown."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = markdown(str(text.value.value))
    return found


def markdown(text: str) -> str:
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def type_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema or "discriminator" in schema:
        return "section"
    if variants := [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]:
        return " or ".join(dict.fromkeys(type_text(one, definitions) for one in variants))
    if choices := schema.get("enum") or ([schema["const"]] if "const" in schema else None):
        return ", ".join(f"`{one}`" for one in choices)
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} numbers"
        items = schema["items"]
        return "list of " + (
            "strings" if items.get("type") == "string" else "sections" if "$ref" in items else "values"
        )
    name = {"integer": "integer", "number": "number", "string": "string", "boolean": "boolean", "object": "mapping"}[
        schema["type"]
    ]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if schema.get(key, 2**63) < 2**63]
    return " ".join([name, ", ".join(bounds)]).strip()


def default_text(kind: type[BaseModel], name: str) -> str:
    field = kind.model_fields[name]
    value = field.default
    if value is PydanticUndefined:
        return "required" if field.is_required() else ("by codec" if name == "error_feedback" else "{}")
    if value is None:
        return "–"
    if isinstance(value, BaseModel):
        return "see below"
    text = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    dumped = yaml.safe_dump(text, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{dumped}`"


def tables() -> str:
    parts = []
    for kind, path in sections().items():
        schema = kind.model_json_schema()
        known = documentation(kind)
        variant = kind.model_fields["kind"].annotation if "kind" in kind.model_fields else None
        heading = f"`{path}`"
        if variant is not None and len(get_args(variant)) == 1:
            heading += f" with `kind: {get_args(variant)[0]}`"
        summary = markdown(inspect.getdoc(kind) or "")
        rows = [
            f"| `{name}` | {type_text(schema['properties'][name], schema.get('$defs', {}))} "
            f"| {default_text(kind, name)} | {known.get(name, f'See `{path}.{name}`.')} |"
            for name in kind.model_fields
        ]
        table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"### {heading}", "", summary, "", *table, ""]))
    return "\n".join(parts)


def codec_table() -> str:
    """Costs of one round of 150m.yaml by codec, and utilisation by line and H."""
    run = load_config(README.parent / "150m.yaml").run
    heading = [f"{line}, H {steps}" for steps in (500, 50) for line in LINES]
    rows = []
    for name in CODECS:
        costs = costs_of(run.model_copy(update={"codec": CodecSpec(name=name)}))
        short = replace(costs, round_flops=costs.round_flops / 10)
        cells = [f"{100 * one.utilisation(rate, SUSTAINED):.0f} %" for one in (costs, short) for rate in LINES.values()]
        rows.append([f"`{name}`", f"{costs.payload_ratio:.1f}×", size(costs.exchange.up), *cells])
    lines = [["codec", "smaller than fp32", "sent per round", *heading], ["---"] * (3 + len(heading)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


GENERATED = {"keys": tables, "codecs": codec_table}
"""What makes the text between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""


def between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name}: begin -->\n).*?(?=<!-- {name}: end -->)", re.DOTALL)


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_tables_are_up_to_date(name: str) -> None:
    found = between(name).search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found[0] == GENERATED[name](), "run python -m tests.config.test_config_readme"


@pytest.mark.parametrize("kind", sections(), ids=lambda kind: kind.__name__)
def test_every_key_has_a_docstring(kind: type[BaseModel]) -> None:
    sectioned = {name for name, field in kind.model_fields.items() if any(models(field.annotation, ""))}
    undocumented = kind.model_fields.keys() - documentation(kind).keys() - sectioned
    assert not undocumented
    assert inspect.getdoc(kind)


def test_the_readme_lists_every_file() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"\(([\w.]+\.yaml)\)", text)) == {path.name for path in README.parent.glob("*.yaml")}


def test_models_in_lists_are_found() -> None:
    assert {Filter, MixturePart} <= sections().keys()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for part, make in GENERATED.items():
        text = between(part).sub(make().replace("\\", r"\\"), text)
    README.write_text(text, encoding="utf-8")
