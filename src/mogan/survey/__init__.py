"""Human two-way comparison of folders of clips: ``build`` a folder, ``serve`` it to raters, ``analyze`` their votes.

Nothing here imports a model or ``torch``; ``serve`` needs the extra ``survey`` (starlette, uvicorn).
"""
