"""Compares the files of a wheel with those of the source tree: python .ci/packed.py WHEEL."""

import subprocess
import sys
import zipfile

ours = subprocess.check_output(["git", "ls-files", "patchcl_qupath", "groovy"], text=True).split()
wanted = {name.replace("groovy/", "patchcl_qupath/groovy/", 1) for name in ours}
packed = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
if missing := sorted(wanted - packed):
    sys.exit(f"not in the wheel: {', '.join(missing)}: see package-data in pyproject.toml")
if strange := sorted(packed - wanted):
    sys.exit(f"in the wheel, but not in the repository: {', '.join(strange)}")
