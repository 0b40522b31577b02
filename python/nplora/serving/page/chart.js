// Draws the losses of a training job as SVG.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 260;
const EDGE = { left: 46, right: 14, top: 14, bottom: 30 };

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Draws the points [step, loss] of training and of validation into a figure.
export function draw(figure, train, valid, total) {
  if (!train.length && !valid.length) {
    figure.replaceChildren();
    return;
  }
  const width = Math.max(280, figure.clientWidth || 640);
  const all = [...train, ...valid];
  const last = Math.max(total || 0, ...all.map(([step]) => step), 1);
  const losses = all.map(([, loss]) => loss);
  const [low, high, marks] = scale(Math.min(...losses), Math.max(...losses));
  const x = (step) => EDGE.left + (step / last) * (width - EDGE.left - EDGE.right);
  const y = (loss) => EDGE.top + ((high - loss) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const svg = node("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": "Loss by step" });
  for (const mark of marks) {
    svg.append(node("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(mark), y2: y(mark) }));
    svg.append(node("text", { class: "mark", x: EDGE.left - 8, y: y(mark) + 4, "text-anchor": "end" }, String(mark)));
  }
  for (const mark of scale(0, last)[2].filter((one) => one <= last && Number.isInteger(one))) {
    svg.append(node("text", { class: "mark", x: x(mark), y: HEIGHT - 10, "text-anchor": "middle" }, String(mark)));
  }
  const path = (points) => points.map(([step, loss], at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  if (train.length > 12) {
    svg.append(node("path", { class: "train each", d: path(train) }));
    svg.append(node("path", { class: "train", d: path(smooth(train)) }));
  } else if (train.length) svg.append(node("path", { class: "train", d: path(train) }));
  if (valid.length) svg.append(node("path", { class: "valid", d: path(valid) }));
  for (const [step, loss] of valid) svg.append(node("circle", { class: "valid", cx: x(step), cy: y(loss), r: 3.5 }));
  const legend = document.createElement("figcaption");
  for (const [kind, points, words] of [["train", train, "training loss"], ["valid", valid, "validation loss"]]) {
    if (!points.length) continue;
    const entry = document.createElement("span");
    entry.className = kind;
    entry.textContent = `${words} ${points.at(-1)[1].toFixed(3)}`;
    legend.append(entry);
  }
  figure.replaceChildren(svg, legend);
}

// Round numbers for the marks of an axis: the lowest, the highest, and a list of all marks.
function scale(least, most) {
  const span = most - least || Math.abs(most) || 1;
  const rough = span / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const low = Math.floor(least / step) * step;
  const high = Math.max(Math.ceil(most / step) * step, low + step);
  const marks = [];
  for (let at = 0; low + at * step <= high + step / 2; at++) marks.push(Number((low + at * step).toPrecision(6)));
  return [low, high, marks];
}

// Replaces each loss by the mean of this loss and the losses around it.
function smooth(points) {
  const reach = Math.max(1, Math.round(points.length / 24));
  return points.map(([step], at) => {
    const near = points.slice(Math.max(0, at - reach), at + reach + 1);
    return [step, near.reduce((sum, [, loss]) => sum + loss, 0) / near.length];
  });
}
