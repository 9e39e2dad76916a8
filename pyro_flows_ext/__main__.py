"""`python -m pyro_flows_ext`: the command line."""

from .cli import main

raise SystemExit(main())
