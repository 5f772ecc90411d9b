"""The page that shows both services (docs/dashboard.md), from a process that speaks the generated clients alone.

Needs the extra `dashboard`; `forge dashboard` starts it.
"""
