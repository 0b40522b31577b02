// Runs the tests, or the page of examples/browser, in headless Chromium.
//
//   node in_chromium.mjs CACHE tests ARGUMENT OF PYTEST...
//   node in_chromium.mjs CACHE page MODEL.gguf TEXT PROMPT STEPS
//
// `page` does what a user does, saves screenshots and adapter.zip in CACHE/shots, and prints what the page
// shows. All traffic of the browser goes through a proxy, this program. It serves the page and refuses
// everything else. The program fails if the page asked for anything else, or for anything at all after it had
// loaded.
import { createReadStream } from "node:fs";
import { mkdir, rm, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, resolve } from "node:path";

const [cache, program, ...rest] = process.argv.slice(2);
const directory = join(resolve(cache), "page");
const shots = join(resolve(cache), "shots");
const { launch } = createRequire(join(resolve(cache), "x"))("puppeteer-core");

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm" };
const CHROMIUMS_OWN = /^(https?:\/\/)?[\w.-]+\.google(apis)?\.com[:/]/; // updates and accounts
const requests = [];
const note = (url) => CHROMIUMS_OWN.test(url) || requests.push(url);
const server = createServer(async (request, response) => {
  note(request.url);
  if (!request.url.startsWith(home) && !request.url.startsWith("/")) return response.writeHead(403).end();
  const path = join(directory, new URL(request.url, "http://x").pathname);
  const found = await stat(path).catch(() => null);
  if (!found?.isFile()) return response.writeHead(404).end();
  response.writeHead(200, { "Content-Type": TYPES[extname(path)] ?? "application/octet-stream" });
  createReadStream(path).pipe(response);
});
server.on("connect", (request, socket) => {
  note(request.url);
  socket.destroy();
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const home = `http://127.0.0.1:${server.address().port}/`;

const browser = await launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    `--proxy-server=127.0.0.1:${server.address().port}`,
    "--proxy-bypass-list=<-loopback>",
  ],
  protocolTimeout: 3_600_000,
});

async function tests() {
  const page = await browser.newPage();
  page.on("console", (message) => console.log(message.text()));
  await page.goto(`${home}run_tests.mjs`); // any file of this server
  return page.evaluate(async (pytestArguments) => {
    const { run } = await import("./run_tests.mjs");
    const { loadPyodide } = await import("./pyodide.mjs");
    const read = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
    return run(loadPyodide, "./", read, (line) => console.log(line), "tests", pytestArguments);
  }, rest);
}

async function useThePage([model, text, prompt, steps]) {
  await rm(shots, { recursive: true, force: true });
  await mkdir(shots, { recursive: true });
  const page = await browser.newPage();
  await page.setViewport({ width: 900, height: 1250 });
  page.on("pageerror", (error) => console.error(error));
  page.on("console", (message) => console.error(message.text()));
  const session = await browser.target().createCDPSession();
  await session.send("Browser.setDownloadBehavior", { behavior: "allow", downloadPath: shots });
  await page.goto(home + "index.html");
  await (await page.$("#model")).uploadFile(model);
  await page.$eval("#text", (field, value) => (field.value = value), text);
  await page.$eval("#prompt", (field, value) => (field.value = value), prompt);
  await page.$eval("#steps", (field, value) => (field.value = value), steps);
  await page.screenshot({ path: join(shots, "1-form.png") });
  await page.click("#start");
  const isAt = (pattern) =>
    page.waitForFunction(
      (p) => document.querySelector("#download, #status.error") || new RegExp(p).test(document.querySelector("#status").textContent),
      { timeout: 0, polling: 100 },
      pattern,
    );
  await isAt("measuring|training|^step");
  const loaded = requests.length;
  await isAt(`^step ${Math.ceil(Number(steps) / 2)} `);
  await page.screenshot({ path: join(shots, "2-training.png") });
  await isAt("^done");
  await page.screenshot({ path: join(shots, "3-done.png"), fullPage: true });
  const seen = await page.evaluate(() =>
    Object.fromEntries(
      ["status", "loss_before", "loss_after", "answer_before", "answer_after", "result"].map((id) => [
        id,
        document.getElementById(id).textContent,
      ]),
    ),
  );
  if (await page.$("#download")) {
    await page.click("#download");
    while (!(await stat(join(shots, "adapter.zip")).catch(() => null))) await new Promise((r) => setTimeout(r, 100));
  }
  const elsewhere = requests.filter((url) => !url.startsWith(home));
  seen.requests = { loading: loaded, training: requests.length - loaded, elsewhere };
  console.log(JSON.stringify(seen, null, 1));
  return seen.status.startsWith("done") && requests.length === loaded && !elsewhere.length ? 0 : 1;
}

process.exitCode = await (program === "tests" ? tests() : useThePage(rest));
await browser.close();
server.close();
