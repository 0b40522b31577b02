#!/usr/bin/env bash
# The engine, the server and its jobs, with OpenAI's client, hostile clients and random requests
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages serve test,serve
install "$work/environments/serve" 'openai>=2'
# Without these the tests would be skipped.
"$work/environments/serve/bin/python" -c 'import llguidance, openai, starlette, uvicorn'
run_tests serve --skipped="$here/skipped" tests/serving | tee "$here/pytest.count"
