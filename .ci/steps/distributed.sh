#!/usr/bin/env bash
# Training on two and three ranks, with mpi4py and MPICH from PyPI; federated fine-tuning with Flower
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages
# Without these the tests would be skipped.
"$work/environments/user/bin/python" -c 'from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])'
[ -x "$work/environments/user/bin/mpiexec" ] || fail 'there is no mpiexec'
run_tests user tests/distributed | tee "$here/pytest.count"
with_test_packages flower test,federated
install "$work/environments/flower" 'flwr[dp]'
run_tests flower tests/examples/test_federated.py | tee "$here/federated.count"
