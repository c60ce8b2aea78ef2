"""Names of files as text of one line, whatever bytes they have."""

import re

_ESCAPE = re.compile(r"\\(\\|[abfnrtv]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(0[0-9a-f]|10)[0-9a-f]{4})")


def escaped(name: str) -> str:
    """A name with backslashes, line breaks, tabs, and bytes that are no UTF-8 as Python's escapes, as in `a\\nb`."""
    if name.isprintable() and "\\" not in name:
        return name
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)


def unescaped(text: str) -> str:
    """The name that `escaped` was given; what is no escape stays."""
    return _ESCAPE.sub(lambda escape: escape[0].encode().decode("unicode_escape"), text)
