// The page: its parts, the list of models, and the drawer of settings.

import { get } from "./api.js";
import * as chat from "./chat.js";
import * as settings from "./settings.js";
import * as training from "./training.js";

const $ = (id) => document.getElementById(id);

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function load() {
  try {
    chat.offer((await get("/v1/models")).data);
    notice("");
  } catch (error) {
    if (error.status === 401) {
      notice("This server needs an API key. Enter it in the settings.");
      drawer(true);
      $("key").focus();
    } else notice(error.message);
    return;
  }
  $("show-training").hidden = !(await training.find());
  document.querySelector(".tabs").hidden = $("show-training").hidden;
}

function part(name) {
  for (const one of ["chat", "training"]) {
    $(one).hidden = one !== name;
    $(`show-${one}`).setAttribute("aria-pressed", String(one === name));
  }
  $("new-chat").hidden = name !== "chat";
  name === "training" ? training.open() : training.close();
}

function drawer(isOpen) {
  $("settings").hidden = $("shade").hidden = !isOpen;
  $("open-settings").setAttribute("aria-expanded", String(isOpen));
}

settings.applyTheme();
settings.connect((name) => name === "key" && load());
chat.begin();
training.begin(load, async (model) => {
  await load();
  part("chat");
  chat.choose(model);
});
$("show-chat").addEventListener("click", () => part("chat"));
$("show-training").addEventListener("click", () => part("training"));
$("theme").addEventListener("click", settings.changeTheme);
$("open-settings").addEventListener("click", () => drawer($("settings").hidden));
for (const id of ["close-settings", "shade"]) $(id).addEventListener("click", () => drawer(false));
addEventListener("keydown", (event) => event.key === "Escape" && drawer(false));
load();
