// Turns Markdown into HTML elements. Text becomes only text nodes, so an answer cannot add HTML to the page.

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const DEEPEST = 8; // the most quotations inside each other; a deep nesting would overflow the stack

export function markdown(text, depth = 0) {
  const made = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/);
    if (fence) {
      const code = [];
      for (at++; at < lines.length && !lines[at].trimStart().startsWith(fence[1]); at++) code.push(lines[at]);
      at++;
      made.append(block(code.join("\n"), fence[2]));
    } else if (/^#{1,6}\s/.test(line)) {
      const level = line.match(/^#+/)[0].length;
      made.append(element(`h${Math.min(level + 2, 6)}`, {}, ...inline(line.replace(/^#+\s+/, ""))));
      at++;
    } else if (/^\s*([-*+]|\d+[.)])\s+\S/.test(line)) {
      at = list(lines, at, made);
    } else if (depth < DEEPEST && /^>\s?/.test(line)) {
      const quoted = [];
      for (; at < lines.length && /^>\s?/.test(lines[at]); at++) quoted.push(lines[at].replace(/^>\s?/, ""));
      made.append(element("blockquote", {}, markdown(quoted.join("\n"), depth + 1)));
    } else if (!line.trim()) {
      at++;
    } else {
      const words = [];
      for (; at < lines.length && lines[at].trim() && (!words.length || !begins(lines[at])); at++) words.push(lines[at]);
      made.append(element("p", {}, ...inline(words.join("\n"))));
    }
  }
  return made;
}

// Whether a line begins something other than a paragraph.
const begins = (line) => /^ {0,3}(```|~~~)|^#{1,6}\s|^\s*([-*+]|\d+[.)])\s+\S|^>/.test(line);

function list(lines, at, made) {
  const isNumbered = /^\s*\d/.test(lines[at]);
  const found = element(isNumbered ? "ol" : "ul");
  if (isNumbered) found.start = Number.parseInt(lines[at].trim(), 10);
  const entry = isNumbered ? /^\s*\d+[.)]\s+/ : /^\s*[-*+]\s+/;
  while (at < lines.length && entry.test(lines[at])) {
    const words = [lines[at].replace(entry, "")];
    for (at++; at < lines.length && /^\s{2,}\S/.test(lines[at]) && !entry.test(lines[at]); at++) words.push(lines[at].trim());
    found.append(element("li", {}, ...inline(words.join("\n"))));
    if (at + 1 < lines.length && !lines[at].trim() && entry.test(lines[at + 1])) at++;
  }
  made.append(found);
  return at;
}

function block(code, language) {
  const copy = element("button", { type: "button", className: "copy", textContent: "Copy" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(code);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  const head = element("div", { className: "code-head" }, element("span", { textContent: language || "code" }), copy);
  return element("div", { className: "code" }, head, element("pre", {}, element("code", { textContent: code })));
}

const INLINE = /`([^`\n]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*\n]*?)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(text) {
  const made = [];
  let found;
  while ((found = text.match(INLINE))) {
    if (found.index) made.push(text.slice(0, found.index));
    const [all, code, strong, soft, label, address] = found;
    if (code !== undefined) made.push(element("code", { textContent: code }));
    else if (strong !== undefined) made.push(element("strong", {}, ...inline(strong)));
    else if (soft !== undefined) made.push(element("em", {}, ...inline(soft)));
    else made.push(element("a", { href: address, textContent: label, target: "_blank", rel: "noopener noreferrer" }));
    text = text.slice(found.index + all.length);
  }
  if (text) made.push(text);
  return made;
}
