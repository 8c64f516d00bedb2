"""Result lines become tables (Markdown, CSV, LaTeX) and figures."""
