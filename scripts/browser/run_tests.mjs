// Runs pytest, or same_losses.py, in Pyodide: in node, or in a browser (in_chromium.mjs). test.sh prepares
// the files.
const PROGRAMS = {
  tests: "int(__import__('pytest').main(['-p', 'no:cacheprovider', '--color=no', *arguments]))",
  losses: `
import runpy
sys.argv = ["same_losses.py", "/tmp/pyodide.npz", "/checkout/native.npz"]
runpy.run_path("scripts/same_losses.py", run_name="__main__")
0`,
};

// Pyodide would print a line for each flush, and pytest flushes after each dot.
function byLine(print) {
  const bytes = [];
  const raw = (byte) =>
    byte === 10 ? print(new TextDecoder().decode(new Uint8Array(bytes.splice(0)))) : bytes.push(byte);
  return { raw };
}

export async function run(loadPyodide, indexURL, read, print, program, pytestArguments) {
  const python = await loadPyodide({ indexURL });
  python.setStdout(byLine(print));
  python.setStderr(byLine(print));
  for (const archive of ["numpy.whl", "nplora.whl", "packages.zip"])
    python.unpackArchive(await read(archive), "zip", { extractDir: "/packages" });
  python.unpackArchive(await read("tests.zip"), "zip", { extractDir: "/checkout" });
  if (program === "losses") python.FS.writeFile("/checkout/native.npz", await read("native.npz"));
  python.globals.set("arguments", python.toPy(pytestArguments));
  python.runPython("import os, sys; sys.path.insert(0, '/packages'); os.chdir('/checkout')");
  return python.runPython(PROGRAMS[program]);
}

// node run_tests.mjs DIRECTORY tests|losses [ARGUMENT OF PYTEST...]
if (typeof process === "object" && process.argv[1]?.endsWith("run_tests.mjs")) {
  const { readFile } = await import("node:fs/promises");
  const [directory, program, ...pytestArguments] = process.argv.slice(2);
  const { loadPyodide } = await import(`${directory}/pyodide.mjs`);
  const read = async (name) => new Uint8Array(await readFile(`${directory}/${name}`));
  try {
    process.exitCode = await run(loadPyodide, directory, read, console.log, program, pytestArguments);
  } catch (error) {
    console.error(error.message); // node would also print the line of JavaScript, which is all of Pyodide
    process.exitCode = 1;
  }
}
