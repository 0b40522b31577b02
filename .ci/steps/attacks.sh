#!/usr/bin/env bash
# Kills, full disks, closed terminals, foreign files, forks and hostile files: a table of how nplora held
# needs: wheel
# processors: 2
. "$(dirname "$0")/../environment.sh"

with_test_packages
PATH=$work/user/bin:$PATH PYTHONPATH=tests python -m attack | tee "$here/attack.count"
