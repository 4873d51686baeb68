"""Dash components as plain HTML, for files that need neither a server nor Dash's scripts."""

from html import escape
from typing import Any

_VOID = {"img", "br", "hr"}
_NAMES: dict[str, str] = {
    "className": "class",
    "tabIndex": "tabindex",
    "htmlFor": "for",
    "colSpan": "colspan",
}
_TIP = "Tooltip"
_LINK = "Link"


def render(part: Any) -> str:
    """Return the HTML of a Dash component, of a list, or of text; text is escaped."""
    if part is None or part is False:
        return ""
    if isinstance(part, list | tuple):
        return "".join(render(p) for p in part)
    if not hasattr(part, "to_plotly_json"):
        return escape(str(part))
    element = part.to_plotly_json()
    props = dict(element["props"])
    name = element["type"]
    children = props.pop("children", None)
    if name == _TIP:
        return _tipped(children, props.get("label", ""))
    if name == _LINK:
        return _element(
            "span", {"class": props.get("className")}, children
        )  # a link into the dashboard
    if element["namespace"] != "dash_html_components":
        raise TypeError(f"{name} is drawn by a script of Dash, which a file does not have")
    return _element(name.lower(), _attributes(props), children)


def _tipped(child: Any, text: Any) -> str:
    """Return an element with an explanation on hover and on focus, by CSS alone."""
    element = child.to_plotly_json()
    props = _attributes({k: v for k, v in element["props"].items() if k != "children"})
    props["class"] = f"{props.get('class') or ''} tipped".strip()
    return _element(
        element["type"].lower(), {"tabindex": 0} | props | {"data-tip": text}, child.children
    )


def _attributes(props: dict[str, Any]) -> dict[str, Any]:
    return {_NAMES.get(name) or name: value for name, value in props.items()}


def _element(name: str, props: dict[str, Any], children: Any) -> str:
    given = "".join(
        f' {k}="{escape(_value(v))}"' for k, v in props.items() if v is not None and v is not False
    )
    return f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{render(children)}</{name}>"


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ";".join(f"{_dashed(k)}:{_length(v)}" for k, v in value.items())
    return "" if value is True else str(value)


def _dashed(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name)


def _length(value: Any) -> str:
    return f"{value}px" if isinstance(value, int | float) else str(value)
