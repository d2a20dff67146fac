// Canvases over the time axis: their coordinates, axis and marks, and what mouse, touch and keys do on them.
const AXIS = 24;
const left = canvas => canvas.clientWidth < 560 ? 62 : 84;
const wide = canvas => canvas.clientWidth - left(canvas);
const place = (chart, t) => left(chart.canvas) + (t - chart.panel.origin - view.start) / view.span * wide(chart.canvas);
const after = (chart, px) => view.start + (px - left(chart.canvas)) / wide(chart.canvas) * view.span;
const time = (chart, px) => chart.panel.origin + after(chart, px);

function paper(chart, height) {  // an empty drawing in the canvas' own pixels
  const {canvas} = chart, ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  canvas.style.height = height + "px";
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const g = canvas.getContext("2d");
  g.scale(ratio, ratio);
  g.font = "12px system-ui, sans-serif";
  g.textBaseline = "middle";
  return g;
}
function inside(chart, g, bottom, draw) {  // draws nothing left of the axis; the chosen layer and the cursor on top
  const {canvas, panel} = chart, from = left(canvas);
  g.save();
  g.beginPath();
  g.rect(from, 0, wide(canvas), bottom + AXIS);
  g.clip();
  drawTicks(chart, g, bottom);
  draw();
  const layer = panel.layers[panel.place.get(view.chosen)];
  g.strokeStyle = color("ink");
  if (layer) {
    const a = place(chart, layer[1]), b = place(chart, layer[1] + layer[2]);
    g.lineWidth = 1.5;
    g.strokeRect(a, .75, Math.max(1, b - a), bottom - 1.5);
    g.lineWidth = 1;
  }
  if (view.cursor !== null) {
    g.globalAlpha = .5;
    g.fillStyle = color("ink");
    g.fillRect(Math.round(from + (view.cursor - view.start) / view.span * wide(canvas)), 0, 1, bottom);
    g.globalAlpha = 1;
  }
  g.restore();
}
function drawTicks(chart, g, bottom) {
  const about = view.span * (wide(chart.canvas) < 500 ? 56 : 84) / wide(chart.canvas), ten = 10 ** Math.floor(Math.log10(about));
  const every = ten * ([1, 2, 5].find(m => ten * m >= about) || 10);
  const [scale, unit] = every >= 1e-5 ? [1e3, "ms"] : [1e6, "µs"];
  const digits = Math.max(0, -Math.floor(Math.log10(every * scale * 1.01)));
  const begin = chart.panel.origin + view.start, right = left(chart.canvas) + wide(chart.canvas);
  for (let i = Math.ceil(begin / every); i * every <= begin + view.span; i++) {
    const at = place(chart, i * every);
    g.fillStyle = color("line");
    g.fillRect(Math.round(at), 0, 1, bottom);
    g.fillStyle = color("quiet");
    g.textAlign = at < left(chart.canvas) + 20 ? "left" : "center";
    if (at < right - 44) g.fillText((i * every * scale).toFixed(digits), at, bottom + AXIS / 2);
  }
  g.textAlign = "right";
  g.fillText(unit, right - 2, bottom + AXIS / 2);
  g.textAlign = "left";
}
const layerAt = (panel, t) => panel.layers.find(([, start, seconds]) => start <= t && t < start + seconds);

function interact(chart) {
  const {canvas, panel} = chart, fingers = new Map();
  let drag = null;
  const hover = e => {
    view.cursor = e.offsetX >= left(canvas) ? after(chart, e.offsetX) : null;
    tip(view.cursor === null ? null : chart.describe(e.offsetX, e.offsetY), e);
    redraw();
  };
  const leave = () => { view.cursor = null; tip(null); redraw(); };
  canvas.addEventListener("wheel", e => {
    const sideways = e.shiftKey ? e.deltaY : e.deltaX;
    if (!e.ctrlKey && !e.metaKey && Math.abs(sideways) <= Math.abs(e.deltaY) && !e.shiftKey) return;  // scrolls the page
    e.preventDefault();
    if (e.ctrlKey || e.metaKey) zoom(Math.exp(Math.max(-1, Math.min(1, e.deltaY / 200))), after(chart, e.offsetX));
    else pan(sideways / 1000);
  }, {passive: false});
  canvas.addEventListener("pointerdown", e => {
    canvas.setPointerCapture(e.pointerId);
    fingers.set(e.pointerId, e.offsetX);
    drag = {at: e.offsetX, from: e.offsetX, start: view.start, span: view.span, moved: false};
  });
  canvas.addEventListener("pointermove", e => {
    if (!drag) return hover(e);
    const before = fingers.get(e.pointerId);
    fingers.set(e.pointerId, e.offsetX);
    drag.moved ||= Math.abs(e.offsetX - drag.from) > 4;
    if (fingers.size === 2) {
      const [one, two] = fingers.values(), other = one === e.offsetX ? two : one;
      const apart = Math.abs(before - other), now = Math.abs(e.offsetX - other);
      if (apart > 8 && now > 8) zoom(apart / now, after(chart, other));
    } else if (drag.moved) {
      show(drag.start + (drag.from - e.offsetX) / wide(canvas) * drag.span, drag.span);
      tip(null);
    }
  });
  const release = e => {
    const done = drag;
    fingers.delete(e.pointerId);
    drag = null;
    if (e.type === "pointercancel" || !done || done.moved || done.at < left(canvas)) return;
    const layer = layerAt(panel, time(chart, done.at));
    if (layer) choose(panel.names[layer[0]], false);
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("dblclick", e => zoom(e.shiftKey ? 2.5 : .4, after(chart, e.offsetX)));
  canvas.addEventListener("keydown", e => {
    const act = KEYS[e.key] || KEYS[e.key.toLowerCase()];
    if (!act || e.ctrlKey || e.metaKey || e.altKey) return;
    e.preventDefault();
    act();
  });
}
const KEYS = {
  "+": () => zoom(.5), "=": () => zoom(.5), "-": () => zoom(2), ArrowLeft: () => pan(-.2), ArrowRight: () => pan(.2),
  Home: fit, 0: fit, n: () => step(1), p: () => step(-1), u: () => by("units").click(),
};
