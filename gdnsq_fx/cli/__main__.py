"""``python -m gdnsq_fx.cli``."""

from gdnsq_fx.cli import main

raise SystemExit(main())
