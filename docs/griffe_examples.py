"""Shows the ``Example:`` of a docstring as code: Google's name of the section is ``Examples:``."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section while the documentation is built."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in the docstring of one module, class or function."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
