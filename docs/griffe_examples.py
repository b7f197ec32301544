"""Shows docstrings as mkdocs reads them: ``Example:`` as code, and no roles of Sphinx."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Changes the docstrings while the documentation is built."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of one module, class or function."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r":(?:class|func|meth|mod):`~?", "`", text)
