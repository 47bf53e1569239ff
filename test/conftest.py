"""Makes ``support`` importable: pytest puts the folder of this file on the path.

``from support.server import start_server`` and ``from support.models import make_model``.
"""
