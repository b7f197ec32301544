"""The sections of ``gpu_report.py`` and what puts them together.

``sections.py`` lists them and ``goals.py`` what they must reach. A section is a module with a
function ``run(settings, record)``. ``processes.py`` runs it in a process of its own; what it adds
to its ``record.py`` is kept whatever becomes of it; ``report.py`` writes all down.
"""
