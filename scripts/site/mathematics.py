"""Formulas of the pages as MathML, which browsers draw without a script."""

from __future__ import annotations

import html
import re

from math_core import LatexError, LatexToMathML

# What the Arithmatex extension leaves of `$...$` and `$$...$$`.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<latex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


class FormulaError(ValueError):
    """A formula that cannot be typeset."""


def to_mathml(page: str) -> str:
    """The HTML of a page with its formulas as MathML.

    Raises:
        FormulaError: If a formula has a command that is unknown, or an error.
    """
    converter = LatexToMathML(fancy_error=False)

    def convert(found: re.Match[str]) -> str:
        latex = html.unescape(found["latex"]).strip()
        block = found["open"] == "["
        try:
            formula = converter.convert_with_local_state(latex, displaystyle=block)
        except LatexError as error:
            raise FormulaError(f"${latex}$: {error}") from error
        return f'<div class="formula">{formula}</div>' if block else formula

    return _FORMULA.sub(convert, page)
