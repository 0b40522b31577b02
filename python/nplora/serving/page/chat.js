// The chat: one column, or two columns in which two models answer the same messages.

import { ApiError, events } from "./api.js";
import { element, markdown } from "./markdown.js";
import { setting } from "./settings.js";

const NAME = "nplora.chat";
const IDEAS = ["Introduce yourself in two sentences.", "Explain LoRA to a ten-year-old.", "Write a haiku about small models."];
const $ = (id) => document.getElementById(id);

let models = []; // in the server's order; the first is the base model
let columns = [[], []]; // the messages of each column
let running = []; // the abort controllers of the answers that are being written

export function begin() {
  const kept = restored();
  columns = kept.columns ?? columns;
  $("compare").checked = kept.compare ?? false;
  $("model").dataset.wanted = kept.model ?? "";
  $("other").dataset.wanted = kept.other ?? "";
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    running.length ? stop() : send($("message").value);
  });
  $("message").addEventListener("keydown", (event) => {
    const isTouch = matchMedia("(pointer: coarse)").matches;
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
    event.preventDefault();
    if (!running.length) send($("message").value);
  });
  $("message").addEventListener("input", grow);
  $("new-chat").addEventListener("click", clear);
  $("compare").addEventListener("change", () => {
    stop();
    // Both columns continue the same chat.
    if ($("compare").checked) columns[1] = columns[0].map(({ writing, ...message }) => ({ ...message }));
    arrange();
  });
  for (const id of ["model", "other"]) $(id).addEventListener("change", keep);
  addEventListener("keydown", (event) => event.key === "Escape" && stop());
  arrange();
}

// ---- models ----

export function offer(found) {
  models = found;
  for (const id of ["model", "other"]) {
    const select = $(id);
    const wanted = select.value || select.dataset.wanted;
    select.replaceChildren(...options());
    const adapters = models.filter((model) => model.parent);
    const usual = id === "other" ? models[0] : (adapters[0] ?? models[0]);
    const known = models.some((model) => model.id === wanted);
    select.value = known ? wanted : (usual?.id ?? "");
  }
  $("compare").closest("label").hidden = models.length < 2;
  if (models.length < 2) $("compare").checked = false;
  arrange();
}

function options() {
  const option = (model) => new Option(model.id, model.id);
  const bases = models.filter((model) => !model.parent);
  const adapters = models.filter((model) => model.parent);
  if (!adapters.length) return bases.map(option);
  return [element("optgroup", { label: "Base model" }, ...bases.map(option)), element("optgroup", { label: "Adapters" }, ...adapters.map(option))];
}

export function choose(id) {
  $("model").value = id;
  keep();
  $("message").focus();
}

// ---- what is shown ----

const shown = () => ($("compare").checked ? ["model", "other"] : ["model"]);

function arrange() {
  $("second").hidden = !$("compare").checked;
  const isEmpty = shown().every((_, number) => !columns[number].length);
  $("chat").classList.toggle("empty", isEmpty);
  $("talk").classList.toggle("two", $("compare").checked);
  $("talk").replaceChildren(...(isEmpty ? [welcome()] : shown().map((_, number) => column(number))));
  keep();
  down(true);
}

function welcome() {
  const ideas = IDEAS.map((text) => {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => send(text));
    return button;
  });
  const words = $("compare").checked ? "One question, two answers" : "What would you like to ask?";
  return element("div", { className: "welcome" }, element("h1", { textContent: words }), element("div", { className: "ideas" }, ...ideas));
}

function column(number) {
  const made = element("div", { className: "column" });
  made.dataset.number = number;
  made.append(...columns[number].map(bubble));
  return made;
}

function bubble(message) {
  const isUser = message.role === "user";
  const made = element("article", { className: `message ${message.role}` });
  if (!isUser && message.model) made.append(element("div", { className: "name", textContent: message.model }));
  const body = element("div", { className: "body" });
  fill(body, message);
  made.append(body);
  if (message.note) made.append(element("div", { className: `note ${message.failed ? "error" : ""}`, textContent: message.note }));
  return made;
}

function fill(body, message) {
  if (message.role === "user") body.textContent = message.content;
  else if (message.content) body.replaceChildren(drawn(message.content));
  else body.replaceChildren(message.writing ? element("span", { className: "dots" }, element("i"), element("i"), element("i")) : "");
}

// An answer must never break the page: if its Markdown cannot be drawn, it is shown as plain text.
function drawn(text) {
  try {
    return markdown(text);
  } catch {
    return text;
  }
}

// Scrolls to the end, unless the reader has scrolled up.
function down(always = false) {
  const talk = $("talk");
  if (always || talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

function grow() {
  const field = $("message");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
}

// ---- messages ----

async function send(text) {
  if (!text.trim() || running.length || !$("model").value) return;
  $("message").value = "";
  grow();
  const answers = shown().map((id, number) => {
    const answer = { role: "assistant", content: "", model: $(id).value, writing: true };
    columns[number].push({ role: "user", content: text }, answer);
    return answer;
  });
  running = answers.map(() => new AbortController());
  $("send").classList.add("running");
  $("send").setAttribute("aria-label", "Stop");
  try {
    arrange();
    await Promise.allSettled(answers.map((answer, number) => write(answer, number, running[number].signal)));
  } finally {
    running = [];
    $("send").classList.remove("running");
    $("send").setAttribute("aria-label", "Send");
    keep();
  }
}

async function write(answer, number, signal) {
  let waiting = false;
  const place = () => document.querySelector(`.column[data-number="${number}"] .message:last-child`);
  const draw = () => {
    waiting = false;
    const body = place()?.querySelector(".body");
    if (body && answer.writing) fill(body, answer);
    down();
  };
  const started = performance.now();
  let first, usage, reason;
  try {
    for await (const event of events("/v1/chat/completions", body(answer, number), signal)) {
      const piece = event.choices?.[0]?.delta?.content ?? "";
      if (piece) first ??= performance.now();
      answer.content += piece;
      reason = event.choices?.[0]?.finish_reason ?? reason;
      usage = event.usage ?? usage;
      if (!waiting) requestAnimationFrame(draw);
      waiting = true;
    }
    answer.note = speed(usage, started, first, reason);
  } catch (error) {
    if (error.name === "AbortError") answer.note = "stopped";
    else [answer.note, answer.failed] = [error instanceof ApiError ? error.message : String(error), true];
  }
  delete answer.writing;
  place()?.replaceWith(bubble(answer));
  down();
}

function body(answer, number) {
  // A question without an answer is left out too: many chat templates refuse two questions in a row.
  const isKept = (reply) => !reply || (!reply.failed && reply.content);
  const earlier = columns[number].slice(0, -1);
  const turns = earlier.filter((message, index) => isKept(message.role === "user" ? earlier[index + 1] : message));
  const most = models.find((model) => model.id === answer.model)?.max_tokens ?? Infinity;
  const system = setting("system").trim();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  const seed = setting("seed");
  return {
    model: answer.model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: setting("temperature"),
    ...(setting("temperature") > 0 ? { top_p: setting("top-p") } : {}),
    ...(setting("max-tokens") ? { max_tokens: Math.min(setting("max-tokens"), most) } : {}),
    ...(seed === "" ? {} : { seed }),
  };
}

function speed(usage, started, first, reason) {
  const words = reason === "length" ? ["cut at the longest answer"] : [];
  if (usage && first) {
    const seconds = (performance.now() - first) / 1000;
    words.unshift(`${usage.completion_tokens} tokens`);
    if (usage.completion_tokens > 1 && seconds > 0.05) words.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} per second`);
    words.push(`first after ${((first - started) / 1000).toFixed(2)} s`);
  }
  return words.join(" · ");
}

function stop() {
  for (const one of running) one.abort();
}

function clear() {
  stop();
  columns = [[], []];
  arrange();
  $("message").focus();
}

// ---- kept in the browser ----

function keep() {
  const kept = columns.map((messages) => messages.map(({ writing, ...message }) => message));
  try {
    localStorage.setItem(NAME, JSON.stringify({ columns: kept, compare: $("compare").checked, model: $("model").value, other: $("other").value }));
  } catch {
    // The chat is too long for the browser's storage. It is lost when the page is closed.
  }
}

function restored() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}
