"""A hook of MkDocs: the cells of `notebook.ipynb` stand on the page `notebook.md`."""

import json
import pathlib
from typing import Any

NOTEBOOK = pathlib.Path(__file__).resolve().parent / "notebook.ipynb"


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """The page with the cells below its text."""
    if page.file.src_uri != "notebook.md":
        return markdown
    parts = [markdown]
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # The page has a heading already.
            parts.append(text.partition("\n")[2] if text.startswith("# ") else text)
        elif text.startswith("!"):
            parts.append(f"```sh\n{text.removeprefix('!')}\n```")
        else:
            parts.append(f"```python\n{text}\n```")
    return "\n\n".join(parts)
