#!/usr/bin/env bash
# Python tests against the installed wheel, without torch and without those that are steps of their own
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
"$work/environments/user/bin/python" -c "import nplora, sys; print(nplora.__file__); sys.exit(sys.prefix not in nplora.__file__)"
# With =, for pytest takes a word that it does not know yet for a test's path.
run_tests user --skipped="$here/skipped" --ignore tests/docs --ignore tests/examples --ignore tests/distributed --ignore tests/serving | tee "$here/pytest.count"
