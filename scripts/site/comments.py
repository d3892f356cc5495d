"""Comments of Markdown: marks of generated figures and tables, of no meaning on the site."""

from __future__ import annotations

import re

# Code is matched first, so that comments in it stay.
_CODE_OR_COMMENT = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[ \t]*$|(?P<tick>`+)[^\n]+?(?P=tick))|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)


def without_comments(text: str) -> str:
    """The text without its comments; one at the start of a line would end the paragraph."""
    return _CODE_OR_COMMENT.sub(lambda found: found["code"] or "", text)
