// Puts the drawings in their places and the buttons to work.
document.querySelectorAll("canvas.lanes").forEach(canvas => charts.push(new Lanes(canvas, panels[+canvas.dataset.panel])));
document.querySelectorAll("canvas.memory").forEach(canvas =>
  charts.push(new MemoryMap(canvas, panels[+canvas.dataset.panel])));
if (by("roofline")) charts.push(new Roofline(by("roofline")));
charts.push(new LayerTable(by("table")));
const pictures = by("gammas") ? data.gammas.map(gamma => new Gamma(gamma)) : [];
charts.push(...pictures);

const BUTTONS = {fit, in: () => zoom(.5), out: () => zoom(2), earlier: () => pan(-.25), later: () => pan(.25),
  next: () => step(1), previous: () => step(-1)};
for (const [id, act] of Object.entries(BUTTONS)) by(id).addEventListener("click", act);
const units = by("units");
if (panels.some(panel => !panel.spans) || !window.DecompressionStream) {
  units.disabled = true;
  units.title = "Too many instructions for a page: open trace.json in Perfetto.";
}
units.addEventListener("click", async () => {
  await Promise.all(panels.map(unpack));
  view.perUnit = !view.perUnit;
  units.setAttribute("aria-pressed", view.perUnit);
  charts.forEach(chart => chart.layout?.());
  redraw();
});
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  palette = {};
  pictures.forEach(picture => picture.paint());
  redraw();
});
redraw();
