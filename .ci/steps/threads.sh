#!/usr/bin/env bash
# The thread pool under ThreadSanitizer
# needs: tools
# processors: 1
. "$(dirname "$0")/../environment.sh"

build tsan . pool_tests
still=() # ThreadSanitizer needs its addresses; some kernels spread a program's too widely
if setarch -R true 2>/dev/null; then still=(setarch -R); fi
must_find 'ThreadSanitizer: data race' "${still[@]}" "$here/tsan/tests/cpp/pool_tests" race
"${still[@]}" "$here/tsan/tests/cpp/pool_tests" | tee "$here/pool.count"
