#!/usr/bin/env bash
# Kills, full disks, closed terminals, foreign files, forks and hostile files: a table of how nplora held
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
PATH=$work/environments/user/bin:$PATH PYTHONPATH=tests ATTACK_WORKERS=$jobs python -m attack | tee "$here/attack.count"
