// The settings, which are stored in the browser.

const NAME = "nplora.settings";
const DEFAULTS = { system: "", temperature: 0.7, "top-p": 0.95, "max-tokens": 512, seed: "", key: "", theme: "" };

let values = { ...DEFAULTS, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

export const setting = (name) => values[name];

export function set(name, value) {
  values = { ...values, [name]: value };
  try {
    localStorage.setItem(NAME, JSON.stringify(values));
  } catch {
    // A browser may refuse to store anything. The settings are then lost when the page is closed.
  }
}

// Connects the fields of the drawer with the settings.
export function connect(changed) {
  for (const name of Object.keys(DEFAULTS)) {
    const field = document.getElementById(name);
    if (!field || name === "theme") continue;
    field.value = values[name];
    show(field);
    field.addEventListener("input", () => {
      const number = field.type === "range" || field.type === "number";
      set(name, number && field.value !== "" ? Number(field.value) : field.value);
      show(field);
    });
    field.addEventListener("change", () => changed(name));
  }
}

function show(field) {
  const output = document.querySelector(`output[for="${field.id}"]`);
  if (output) output.value = Number(field.value).toFixed(2);
}

export function applyTheme() {
  document.documentElement.dataset.theme = values.theme;
}

export function changeTheme() {
  const isDark = values.theme ? values.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  set("theme", isDark ? "light" : "dark");
  applyTheme();
}
