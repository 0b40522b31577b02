#!/usr/bin/env bash
# The engine, the server and its jobs, with OpenAI's client, hostile clients and random requests
# needs: wheel
. "$(dirname "$0")/../environment.sh"

with_test_packages serve test,serve
install "$work/environments/serve" 'openai>=2' litellm playwright
system_packages chromium-headless-shell:chromium-headless-shell
# Without one of these packages, tests would be skipped. It is enough to find them: imports take seconds.
"$work/environments/serve/bin/python" -c 'from importlib.util import find_spec
for name in ("litellm", "llguidance", "openai", "playwright", "starlette", "uvicorn"): assert find_spec(name), name'
run_tests serve --skipped="$here/skipped" tests/serving | tee "$here/pytest.count"
