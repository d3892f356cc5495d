"""Links from names in code type to the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_SKIPPED = re.compile(
    r"<(?P<tag>pre|a|h[1-6]|autoref|style|script)\b.*?</(?P=tag)>|<code>(?P<code>[^<]+)</code>",
    re.DOTALL,
)
_NAME = re.compile(r"(?P<name>[A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)
_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


class Names:
    """The names that the reference documents.

    Args:
        pages: The Markdown texts of the reference.
    """

    def __init__(self, pages: Iterable[str]) -> None:
        self.identifiers: dict[str, str] = {}
        for identifier in (name for page in pages for name in _DIRECTIVE.findall(page)):
            name = identifier.rpartition(".")[2]
            # Of two with one name, the shorter path is the one that most people mean.
            known = self.identifiers.get(name)
            if known is None or identifier.count(".") < known.count("."):
                self.identifiers[name] = identifier

    def linked(self, page: str, url_of: Callable[[str], str | None]) -> str:
        """The HTML of a page in which names of the package in code type are links.

        Args:
            page: The HTML.
            url_of: Finds the address of a dotted name, None where there is none.
        """

        def link(found: re.Match[str]) -> str:
            name = _NAME.fullmatch(found["code"] or "")
            url = self._url(name["name"], url_of) if name else None
            return f'<a class="api-name" href="{url}">{found[0]}</a>' if url else found[0]

        return _SKIPPED.sub(link, page)

    def _url(self, name: str, url_of: Callable[[str], str | None]) -> str | None:
        if name.startswith("torch_secondorder."):
            return url_of(name)
        first, _, rest = name.partition(".")
        identifier = self.identifiers.get(first)
        if identifier is None:
            return None
        return (url_of(f"{identifier}.{rest}") if rest else None) or url_of(identifier)
