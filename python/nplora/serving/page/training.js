// Fine-tuning jobs: a list of all jobs, one job with its losses, and a form that starts a new job.

import { get, post } from "./api.js";
import { draw } from "./chart.js";
import { element } from "./markdown.js";

const PAUSE = 2000; // milliseconds between two requests for the jobs
const ENDED = ["succeeded", "failed", "cancelled"];
const $ = (id) => document.getElementById(id);

let jobs = [];
let shown = null; // the id of the job that is shown
let log = new Map(); // the events of this job by id
let timer = 0;
let turn = 0; // the number of calls of `look`; if an older call ends after a newer one, it changes nothing
let isOpen = false;
let isStale = false; // whether the error that is shown came from `look`
let ready = () => {}; // called when a job has succeeded

// Whether the server has jobs at all.
export async function find() {
  try {
    jobs = (await get("/v1/fine_tuning/jobs?limit=50")).data;
    return true;
  } catch {
    return false;
  }
}

export function begin(onReady, chatWith) {
  ready = onReady;
  $("new-job").addEventListener("submit", start);
  $("cancel").addEventListener("click", async () => {
    report(null);
    await post(`/v1/fine_tuning/jobs/${encodeURIComponent(shown)}/cancel`).catch(report);
    look();
  });
  $("try").addEventListener("click", () => chatWith(current().fine_tuned_model));
  addEventListener("resize", () => shown && showLoss());
}

export function open() {
  isOpen = true;
  look();
}

export function close() {
  isOpen = false;
  turn++;
  clearTimeout(timer);
}

const current = () => jobs.find((job) => job.id === shown);

// Requests the jobs from the server. While this part of the page is open, repeats this after each pause.
async function look() {
  clearTimeout(timer);
  if (!isOpen) return;
  const mine = ++turn;
  try {
    const found = (await get("/v1/fine_tuning/jobs?limit=50")).data;
    if (mine !== turn) return;
    const before = new Map(jobs.map((job) => [job.id, job.status]));
    jobs = found;
    if (jobs.some((job) => job.status === "succeeded" && before.has(job.id) && before.get(job.id) !== "succeeded")) ready();
    if (!current()) select(jobs[0]?.id ?? null);
    list();
    if (shown) await follow();
    if (mine === turn && isStale) report(null);
  } catch (error) {
    if (mine !== turn) return;
    report(error);
    isStale = true;
  }
  if (mine === turn) timer = setTimeout(look, PAUSE);
}

// ---- the list ----

function list() {
  $("jobs-card").hidden = !jobs.length;
  $("jobs").replaceChildren(
    ...jobs.map((job) => {
      const button = element("button", { type: "button" }, element("span", { className: "title", textContent: title(job) }), state(job));
      button.setAttribute("aria-current", String(job.id === shown));
      button.addEventListener("click", () => {
        report(null);
        select(job.id);
        list();
        follow().catch(report);
      });
      return element("li", {}, button);
    }),
  );
}

const title = (job) => job.fine_tuned_model || job.user_provided_suffix || job.id;
const state = (job) => element("span", { className: `state ${job.status}`, textContent: job.status.replace("_", " ") });

function select(id) {
  if (id === shown) return;
  [shown, log] = [id, new Map()];
  $("job").hidden = !id;
  $("chart").replaceChildren();
  $("events").replaceChildren();
}

// ---- one job ----

async function follow() {
  const id = shown;
  let after = "";
  for (;;) {
    const page = await get(`/v1/fine_tuning/jobs/${encodeURIComponent(id)}/events?limit=100${after && `&after=${encodeURIComponent(after)}`}`);
    if (id !== shown) return;
    const isKnown = page.data.some((event) => log.has(event.id));
    for (const event of page.data) log.set(event.id, event);
    after = page.data.at(-1)?.id ?? "";
    if (isKnown || !page.has_more || !after) break; // the newest events come first, so the rest is known
  }
  const job = current();
  $("job-name").textContent = title(job);
  $("job-state").replaceChildren(state(job), words(job));
  $("cancel").hidden = ENDED.includes(job.status);
  $("try").hidden = job.status !== "succeeded" || !job.fine_tuned_model;
  showLoss();
  const messages = [...log.values()].filter((event) => event.type !== "metrics").sort(byTime);
  $("events").replaceChildren(
    ...messages.slice(-30).map((event) => {
      const time = new Date(event.created_at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
      return element("li", { className: event.level }, element("time", { textContent: time }), element("span", { textContent: event.message }));
    }),
  );
}

const byTime = (a, b) => a.created_at - b.created_at || (a.id < b.id ? -1 : 1);

function words(job) {
  const parts = [];
  const { step, total_steps: total } = newest();
  if (step !== undefined) parts.push(total ? `step ${step} of ${total}` : `step ${step}`);
  if (job.trained_tokens) parts.push(`${job.trained_tokens.toLocaleString()} tokens`);
  if (job.error?.message) parts.push(job.error.message);
  return parts.length ? ` ${parts.join(" · ")}` : "";
}

const metrics = () => [...log.values()].map((event) => event.data ?? {}).filter((data) => Number.isFinite(data.step));
const newest = () => metrics().reduce((best, data) => (data.step >= (best.step ?? -1) ? data : best), {});

function showLoss() {
  const found = metrics().sort((a, b) => a.step - b.step);
  const points = (...names) =>
    found.map((data) => [data.step, names.map((name) => data[name]).find(Number.isFinite)]).filter(([, loss]) => loss !== undefined);
  const { step = 0, total_steps: total } = newest();
  draw($("chart"), points("train_loss"), points("full_valid_loss", "valid_loss"), total);
  const part = current()?.status === "succeeded" ? 1 : total ? step / total : 0;
  $("progress").hidden = !part;
  $("progress").firstElementChild.style.width = `${100 * part}%`;
  $("progress").setAttribute("aria-valuenow", Math.round(100 * part));
}

// ---- a new job ----

async function start(event) {
  event.preventDefault();
  const button = event.submitter ?? $("new-job").querySelector("button");
  button.disabled = true;
  report(null);
  try {
    const { data: models } = await get("/v1/models");
    const upload = async (field) => {
      const form = new FormData();
      form.append("purpose", "fine-tune");
      form.append("file", field.files[0]);
      return (await post("/v1/files", form)).id;
    };
    const epochs = $("epochs").value;
    const job = await post("/v1/fine_tuning/jobs", {
      model: (models.find((model) => !model.parent) ?? models[0]).id,
      training_file: await upload($("data")),
      ...($("held-out").files.length ? { validation_file: await upload($("held-out")) } : {}),
      ...($("suffix").value ? { suffix: $("suffix").value } : {}),
      ...(epochs ? { method: { type: "supervised", supervised: { hyperparameters: { n_epochs: Number(epochs) } } } } : {}),
    });
    $("new-job").reset();
    jobs = [job, ...jobs];
    select(job.id);
    await look();
  } catch (error) {
    report(error);
  } finally {
    button.disabled = false;
  }
}

// Shows an error. If `error` is null, hides the last error.
function report(error) {
  isStale = false;
  $("job-error").textContent = error?.message ?? "";
  $("job-error").hidden = !error;
}
