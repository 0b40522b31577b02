#!/usr/bin/env bash
# All Python tests against the installed wheel, without torch
# needs: wheel
# processors: 2
. "$(dirname "$0")/../environment.sh"

with_test_packages
"$work/user/bin/python" -c "import nplora, sys; print(nplora.__file__); sys.exit(sys.prefix not in nplora.__file__)"
# With =, for pytest takes a word that it does not know yet for a test's path.
PATH=$work/user/bin:$PATH pytest -n 2 --dist loadfile --skipped="$here/skipped" | tee "$here/pytest.count"
