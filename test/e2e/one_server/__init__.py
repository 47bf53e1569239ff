"""Long tests that share one server: its start takes longer than most of them.

A package, so that ``conftest.py`` has its fixtures end with the last of these tests.
"""
