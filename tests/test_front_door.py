"""The top-level names: complete, lazy, and light."""

import subprocess
import sys

import pyro_flows_ext as pf


def test_every_name_is_there():
    assert set(pf.__all__) <= set(dir(pf))
    for name in pf.__all__:
        assert getattr(pf, name) is not None


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, pyro_flows_ext; "
        "print([m for m in ('torch', 'pyro', 'arviz', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_training_imports_no_plots_or_tables():
    code = (
        "import sys, pyro, pyro.distributions as dist, pyro_flows_ext as pf\n"
        "def model(): pyro.sample('z', dist.Normal(0., 1.))\n"
        "pf.fit(model, pf.AutoPlanar(model), num_steps=2, progress=False)\n"
        "print([m for m in ('arviz', 'matplotlib', 'pandas', 'rich') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
