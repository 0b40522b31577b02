// Trains in a thread of its own, so that the page stays alive. The page sends {start: {...}}; this worker
// answers with {status}, {step}, {result} and {error} messages. All files come from the page's own directory.
import { loadPyodide } from "./pyodide.mjs";

async function bytesOf(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

async function startPython() {
  const python = await loadPyodide({ indexURL: "./" });
  for (const wheel of ["numpy.whl", "nplora.whl"])
    python.unpackArchive(await bytesOf(wheel), "zip", { extractDir: "/page" });
  for (const file of ["tokenizers.py", "train.py"]) python.FS.writeFile(`/page/${file}`, await bytesOf(file));
  python.runPython("import sys; sys.path.insert(0, '/page')");
  return python;
}

const python = startPython();

async function train({ model, text, prompt, steps, rank, rate }) {
  postMessage({ status: "starting Python" });
  const py = await python;
  postMessage({ status: "loading the model" });
  py.FS.writeFile("/model.gguf", new Uint8Array(await model.arrayBuffer()), { canOwn: true });
  const session = py.pyimport("train").Session("/model.gguf", text, "/run");
  const result = {};
  const measure = (when) => {
    postMessage({ status: `measuring the loss ${when} training` });
    result[`loss_${when}`] = session.loss();
    postMessage({ status: `answering ${when} training` });
    result[`answer_${when}`] = session.answer(prompt);
    postMessage({ measured: { ...result } });
  };
  measure("before");
  postMessage({ status: "training" });
  session.train(steps, rank, rate, (step, of, loss, seconds) => postMessage({ step: { step, of, loss, seconds } }));
  measure("after");
  const zipped = session.zipped_adapter();
  result.adapter = zipped.toJs();
  zipped.destroy();
  result.heap = py._module.HEAP8.length;
  session.destroy();
  postMessage({ result });
}

onmessage = ({ data }) =>
  train(data.start).catch((error) => {
    const lines = String(error.message ?? error).trim().split("\n");
    console.error(error);
    postMessage({ error: lines[lines.length - 1] });
  });
