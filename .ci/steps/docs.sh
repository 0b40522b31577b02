#!/usr/bin/env bash
# The documentation: blocks run, pages build without warnings, links hold, nothing is loaded from elsewhere
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
run_tests user --skipped="$here/skipped" tests/docs | tee "$here/pytest.count"
with_packages sphinx docs
"$work/environments/sphinx/bin/sphinx-build" -W --keep-going -q -b html docs "$here/html"
"$work/environments/sphinx/bin/python" scripts/check_site.py "$here/html"
python scripts/sentences.py --average
