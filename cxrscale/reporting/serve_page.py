"""The page of the service: its parts are in the program, and it loads nothing from anywhere else."""

from __future__ import annotations

from cxrscale.reporting import html

FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#14181c"/>'
    '<path d="M7 3v6c0 3-4 4-4 1s1-6 4-7zm2 0v6c0 3 4 4 4 1s-1-6-4-7z" fill="#d5dade"/></svg>'
)
SCRIPTS = ("app", "common", "findings", "list", "render", "viewer", "worker", "zip")
"""Modules of the page; worker runs beside it."""


def page_files() -> dict[str, tuple[str, bytes]]:
    """Path -> (media type, content)."""
    parts = {
        "/": ("text/html", "page.html.jinja"),
        "/app.css": ("text/css", "page.css.jinja"),
    } | {f"/page/{name}.js": ("text/javascript", f"{name}.js.jinja") for name in SCRIPTS}
    files = {path: (kind, html.render(f"serve_page/{template}").encode()) for path, (kind, template) in parts.items()}
    return files | {"/favicon.svg": ("image/svg+xml", FAVICON.encode())}
