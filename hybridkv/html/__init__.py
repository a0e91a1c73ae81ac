"""A page of HTML that shows what a cache kept of a prompt, and what each step retrieved.

`page` makes it from one `Run` for each policy: `run.py` gathers what a run recorded, `prompt.py` what was read,
`template.html`, `page.css` and `page.js` show it. One file, which asks for nothing from anywhere.
"""

from hybridkv.html.page import page
from hybridkv.html.run import Run

__all__ = ["Run", "page"]
