"""HTML from values: everything that is not HTML already is escaped, and there is no other way to make any."""

from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        name: Its name.
        children: What is in it: `Html` as it is, any other value as escaped text.
        attributes: Its attributes; `class_` stands for `class` and `stroke_width` for `stroke-width`. Those that are
            `None` or `False` are left out, one that is `True` has no value.
    """
    spelt = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    inside = joined(*children)
    return Html(f"<{name}{spelt}>" if name in _EMPTY else f"<{name}{spelt}>{inside}</{name}>")


def joined(*parts: object) -> Html:
    """Parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts))


_EMPTY = {"meta", "br", "hr"}


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
