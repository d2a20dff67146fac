// What all drawings share: the data, the view of the time axis, formats, colours.
const data = JSON.parse(document.getElementById("data").textContent);
const HELD = ["tensors", "staging", "weight chunks"];
const panels = data.panels.map(panel => ({
  ...panel, origin: 0, place: new Map(panel.layers.map(([name], i) => [panel.names[name], i]))}));
// Seconds after each panel's origin: panels move together, and a chosen layer begins at the same place in all of them.
const view = {start: 0, span: data.horizon, cursor: null, perUnit: false, chosen: null};
const charts = [];  // {draw, chosen?} of everything that changes with the view or the chosen layer

const by = id => document.getElementById(id);
const number = n => Math.round(n).toLocaleString("en");
const percent = part => (100 * part).toFixed(1) + " %";
function duration(s) {
  const [scale, unit] = s >= 1 ? [1, "s"] : s >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  return (s * scale).toFixed(3) + " " + unit;
}
function large(n, unit) {
  const [scale, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]].find(([size]) => n >= size) || [1, ""];
  return (n / scale).toPrecision(3) + " " + letter + unit;
}
function kib(bytes) {
  return bytes >= 2 ** 20 ? (bytes / 2 ** 20).toFixed(2) + " MiB" : (bytes / 2 ** 10).toFixed(1) + " KiB";
}
let palette = {};
function color(name) {
  palette[name] ??= getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  return palette[name];
}

let queued = false;
function redraw() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    charts.forEach(chart => chart.draw());
    by("range").textContent = duration(view.span) + " of " + duration(data.horizon) + " in view";
    by("fit").disabled = view.span >= data.horizon && panels.every(panel => !panel.origin);
  });
}
function show(start, span) {
  view.span = Math.min(Math.max(span, 1e-9), data.horizon);
  const origins = panels.map(panel => panel.origin);
  const first = -Math.max(...origins), last = data.horizon - Math.min(...origins) - view.span;
  view.start = Math.min(Math.max(start, first), Math.max(first, last));
  redraw();
}
function zoom(factor, at = view.start + view.span / 2) {
  const span = Math.min(Math.max(view.span * factor, 1e-9), data.horizon);
  show(at - (at - view.start) * span / view.span, span);
}
const pan = part => show(view.start + part * view.span, view.span);
function fit() {
  panels.forEach(panel => { panel.origin = 0; });
  show(0, data.horizon);
}
function choose(name, zooms = true) {  // a layer by name, in all drawings and in the table
  view.chosen = name;
  const found = panels.filter(panel => panel.place.has(name));
  const layer = panel => panel.layers[panel.place.get(name)];
  if (zooms && found.length) {
    panels.forEach(panel => { panel.origin = layer(found.includes(panel) ? panel : found[0])[1]; });
    const longest = Math.max(...found.map(panel => layer(panel)[2]));
    show(-.05 * longest, 1.1 * longest || data.horizon);
  }
  charts.forEach(chart => chart.chosen?.(name));
  by("status").textContent = found.map(panel =>
    (panel.title ? panel.title + ": " : "") + name + " begins at " + duration(layer(panel)[1]) + ", takes "
    + duration(layer(panel)[2]) + ", bound by " + layer(panel)[3] + ".").join(" ");
  redraw();
}
function step(by_) {  // to the next or the previous layer
  const panel = panels[panels.length - 1], count = panel.layers.length;
  if (!count) return;
  const at = panel.place.get(view.chosen) ?? (by_ > 0 ? -1 : count);
  choose(panel.names[panel.layers[(at + by_ + count) % count][0]]);
}

function tip(lines, e) {
  const box = by("tip");
  box.hidden = !lines;
  if (!lines) return;
  box.textContent = lines.join("\n");
  box.style.left = Math.max(4, Math.min(e.clientX + 14, window.innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = Math.max(4, Math.min(e.clientY + 14, window.innerHeight - box.offsetHeight - 8)) + "px";
}
