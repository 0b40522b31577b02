#!/usr/bin/env bash
# The scripts and notebooks of examples/
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
run_tests user --skipped="$here/skipped" tests/examples | tee "$here/pytest.count"
